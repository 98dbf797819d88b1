"""Public path of the compiled extension: :mod:`attnreuse.backends.cpu` and :mod:`attnreuse.backends.cuda`."""

from attnreuse.backends.cpu import SERVED, VALUE_BITS, capture, multiply_add, path, reuse, unserved
from attnreuse.backends.cuda import Cuda, Hopper
from attnreuse.backends.extension import INFO, PATHS, extension

__all__ = [
    "INFO", "PATHS", "SERVED", "VALUE_BITS", "Cuda", "Hopper", "capture", "extension", "multiply_add", "path", "reuse",
    "unserved",
]  # fmt: skip
