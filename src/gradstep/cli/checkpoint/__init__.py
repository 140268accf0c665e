"""`gradstep inspect` and `gradstep diff`: what a checkpoint holds, and what changed between two."""
