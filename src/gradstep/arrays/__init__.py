"""The array libraries: one small file each, imported when its arrays are first seen."""
