"""The families: one file each. A rule is fields, slots and pure math, nothing else."""
