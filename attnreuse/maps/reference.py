"""Capture and reuse in plain torch: the specification that every kernel is judged against.

fp32 throughout, the whole map materialised; :mod:`attnreuse.ops` calls it in slices where no kernel
serves. Formulas and layout: :mod:`attnreuse.formats`. Source: arXiv 2401.01008.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnreuse.maps.formats import BLOCK, NO_KEY, AttentionMap, codes_of, encode

LOG2_E = math.log2(math.e)


def capture(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    into: AttentionMap,
    out: Tensor,
) -> None:
    """``out = softmax(scale * Q K^T + mask) V``, exact, and the map written to `into`.

    Args:
        query: ``[B, H, M, D]``; key: ``[B, H, N, D]``; value: ``[B, H, N, Dv]``.
        mask: None, bool (True: attend) or additive, broadcastable to ``[B, H, M, N]``. A row with
            every key masked gives zeros.
        scale: factor of the dot products.
        into: the map to fill, ``(B, H, M, N)``.
        out: ``[B, H, M, Dv]`` to fill.
    """
    scores = query.float() @ key.float().mT  # [B, H, M, N]
    scores *= scale
    if mask is not None:
        scores = _masked(scores, mask)
    probabilities = torch.softmax(scores, dim=-1, out=None if into.format.scaled else into.codes)
    if mask is not None:
        probabilities.nan_to_num_(0.0)  # rows with every key masked
    out.copy_(probabilities @ value.float())
    if not into.format.scaled:
        return
    scores *= LOG2_E
    block_max = torch.stack([part.amax(dim=-1) for part in scores.split(BLOCK, dim=-1)], dim=-1)
    # The largest probability of a row is exp2(max - lse).
    lse = block_max.amax(dim=-1) - probabilities.amax(dim=-1).log2()  # [B, H, M]
    into.lse.copy_(lse.nan_to_num_(math.inf))
    into.block_max.copy_(block_max.clamp_(min=NO_KEY))
    into.codes.copy_(encode(into.format, scores, block_max))


def reuse(attn_map: AttentionMap, value: Tensor, out: Tensor) -> None:
    """``out = P V`` of the stored map `attn_map` ``(B, H, M, N)`` and value ``[B, H, N, Dv]``."""
    out.copy_(attn_map.dense() @ value.float())


def convert(attn_map: AttentionMap, into: AttentionMap) -> None:
    """The floating block-scaled map `attn_map` in the format of `into`; both ``(B, H, M, N)``."""
    t = attn_map.codes.float().unflatten(-1, (-1, BLOCK))
    into.codes.copy_(codes_of(into.format, t.sqrt_() if into.format.root else t))
    into.block_max.copy_(attn_map.block_max)
    into.lse.copy_(attn_map.lse)


def drift(first: AttentionMap, second: AttentionMap, total_variation: Tensor, distance: Tensor) -> None:
    """Row by row, to ``[B, H, M]``: half the sum over keys of ``|P - P'|``, and the root of that of its squares."""
    off = first.dense() - second.dense()
    total_variation.copy_(0.5 * off.abs().sum(dim=-1))
    distance.copy_(off.norm(dim=-1))


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -math.inf)
    # Softmax ignores a shift of the whole row: a row of finfo.min, as of zeros, is uniform attention.
    mask = mask.float()
    return scores + (mask - mask.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min))
