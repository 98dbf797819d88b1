"""Plain torch as a backend: the specification, a piece at a time so that no large fp32 map is ever materialised."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from attnreuse.maps import reference
from attnreuse.maps.formats import AttentionMap, MapFormat

SLICE_BYTES = 16 << 20  # of fp32 map that is held at a time


def unserved(map_format: MapFormat, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """It serves every call."""


def capture(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, into: AttentionMap, out: Tensor
) -> None:
    """:func:`attnreuse.ops.capture`, its arguments checked; shapes as in :mod:`attnreuse.reference`."""
    for part in _pieces(into.shape):
        own_mask = None if mask is None else mask.expand(into.shape)[part]
        keys, values = key[part[:2]], value[part[:2]]
        reference.capture(query[part], keys, values, own_mask, scale, into.part(*part), out[part])


def workspace_bytes(map_format: MapFormat, shape: tuple[int, int, int, int], head_dim: int) -> int:
    """None for its reuses."""
    return 0


def reuse(attn_map: AttentionMap, value: Tensor, out: Tensor, workspace: Tensor | None = None) -> None:
    """:func:`attnreuse.ops.reuse`, its arguments checked; shapes as in :mod:`attnreuse.reference`."""
    for part in _pieces(attn_map.shape):
        reference.reuse(attn_map.part(*part), value[part[:2]], out[part])


def convert(attn_map: AttentionMap, into: AttentionMap) -> None:
    """:func:`attnreuse.ops.convert`, its arguments checked."""
    for part in _pieces(attn_map.shape):
        reference.convert(attn_map.part(*part), into.part(*part))


def drift(first: AttentionMap, second: AttentionMap, total_variation: Tensor, distance: Tensor) -> None:
    """:func:`attnreuse.ops.drift`, its arguments checked."""
    for part in _pieces(first.shape):
        reference.drift(first.part(*part), second.part(*part), total_variation[part], distance[part])


def _pieces(shape: tuple[int, int, int, int]) -> list[tuple[slice, slice, slice]]:
    """(batch rows, heads, queries) that cover `shape`, each with an fp32 map of at most ``SLICE_BYTES``."""
    b, h, m, n = shape
    queries = min(m, max(1, SLICE_BYTES // (4 * n)))
    whole = max(1, SLICE_BYTES // (4 * m * n))  # maps of one head
    rows, heads = max(1, whole // h), min(h, whole)
    starts = itertools.product(range(0, b, rows), range(0, h, heads), range(0, m, queries))
    return [(slice(i, i + rows), slice(j, j + heads), slice(k, k + queries)) for i, j, k in starts]
