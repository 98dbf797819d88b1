"""What computes maps: plain torch and the compiled extension. The Triton kernels install as `attnreuse.kernels`."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from attnreuse.maps.formats import AttentionMap, MapFormat


class Backend(Protocol):
    """A module or class that computes capture and reuse of arguments that are checked."""

    def unserved(self, map_format: MapFormat, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why it cannot serve such a call, or None."""

    def capture(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        into: AttentionMap,
        out: Tensor,
    ) -> None:
        """Write the map into `into` and the output ``[B, H, M, Dv]`` to `out`; some only reuse."""

    def reuse(self, attn_map: AttentionMap, value: Tensor, out: Tensor, workspace: Tensor | None) -> None:
        """Write the map's product with `value` ``[B, H, N, Dv]`` to `out`; `workspace`: :meth:`workspace_bytes`."""

    def workspace_bytes(self, map_format: MapFormat, shape: tuple[int, int, int, int], head_dim: int) -> int:
        """Bytes, uint8, that a reuse of a map of this shape writes to and nobody reads afterwards; 0: none."""
