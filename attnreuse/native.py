"""The compiled extension (`csrc/`); everything works without it, through torch."""

from __future__ import annotations

import torch

from attnreuse.formats import MapFormat

try:
    import attnreuse._native as extension
except ImportError as error:  # not built, or built for another Python or system
    extension, INFO = None, f"not built: {error}"
else:
    INFO = extension.build_info()


def unserved(map_format: MapFormat, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the extension cannot serve such a call, or None."""
    return INFO if extension is None else "this version of the extension holds no kernels"
