"""Checkpoints: the whole of an optimizer as plain data and tensors, in files or in memory."""
