"""The compiled extension (`csrc/`), loaded at first use; everything works without it, through torch."""

from __future__ import annotations

import functools
import importlib
import types

import torch

from attnreuse.formats import MapFormat


@functools.cache
def load() -> tuple[types.ModuleType | None, str]:
    """The extension and how it was built, or None and why it is not there."""
    try:
        extension = importlib.import_module("attnreuse._native")
    except ImportError as error:
        return None, f"not built: {error}"
    return extension, extension.build_info()


def unserved(map_format: MapFormat, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the extension cannot serve such a call, or None."""
    extension, info = load()
    return info if extension is None else "the compiled extension holds no kernels for it"
