"""Which calls should reuse, before any run: rows of steps, noise levels, samplers by name. No tensors of a model."""
