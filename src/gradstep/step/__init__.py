"""One step from the inside: arrays matched and checked, batches of tensors, kernels launched."""
