"""The compiled extension (`csrc/`): whether it is there, what it holds, and how tensors are handed to it."""

from __future__ import annotations

from torch import Tensor

from attnreuse.maps.formats import AttentionMap

try:
    import attnreuse._native as extension
except ImportError as error:  # not built, or built for another Python or system
    extension, PATHS, INFO = None, [], f"not built: {error}"
else:
    PATHS = extension.cpu_paths()
    INFO = f"{extension.build_info()}; CPU kernels: {', '.join(PATHS)}"


def strided(tensor: Tensor) -> tuple[int, ...]:
    """Address and strides in elements."""
    return tensor.data_ptr(), *tensor.stride()


def slot(attn_map: AttentionMap) -> tuple[int, int, int]:
    """Addresses of codes, block maxima and log-sum-exp."""
    return attn_map.codes.data_ptr(), attn_map.block_max.data_ptr(), attn_map.lse.data_ptr()
