"""Triton kernels; installs as `attnreuse.kernels`.

This version holds none yet: on CUDA, too, :mod:`attnreuse.ops` runs through torch.
"""
