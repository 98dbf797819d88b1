"""Reuse: ``O = P V`` of a stored block-scaled map, decoded in registers.

Per block of 128 keys ``sum_n code^2 v`` is a tensor-core product of the codes as they are (their squares
rounded to the operands' dtype); the block's scale ``exp2(block_max - lse) / L^2`` multiplies that partial
sum, not the codes: scaling these costs an operation per element, and on Hopper serialises the products.
Source: arXiv 2401.01008; formats as in :mod:`attnreuse.formats`.
"""

import math
from typing import Any

import torch

import triton
import triton.language as tl
from attnreuse.kernels import configs
from attnreuse.kernels.tiles import (
    Launch,
    alignment,
    dot,
    grid_of,
    load_tile,
    share_of_program,
    split_head_dim,
    squares,
    store_tile,
)
from attnreuse.maps.formats import BLOCK, AttentionMap


@triton.jit
def _reuse_kernel(
    codes_ptr,  # [B, H, M, ROW]: 16-bit words of u8 and u4, else the codes themselves
    block_max_ptr,  # [B, H, C, M] fp32
    lse_ptr,  # [B, H, M] fp32
    v_ptr,  # [B, H, N, D]
    out_ptr,  # [B, H, M, D]
    stride_vb, stride_vh, stride_vn: tl.constexpr, stride_vd,
    stride_ob, stride_oh, stride_om, stride_od,
    H, M, N, ROW,
    BITS: tl.constexpr,
    LOG2_SQUARE: tl.constexpr,  # of the largest squared code, by which they are divided; 0 where codes are floating
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ALIGN: tl.constexpr,
    FAR: tl.constexpr,  # keys lie too far apart for 32-bit offsets
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    bh, first = share_of_program(M, BLOCK_M)
    b, h = bh // H, bh % H
    # Rows behind the last repeat it: loads need no mask, and only stores are cut.
    offs_m = tl.arange(0, BLOCK_M)
    rows = offs_m if EVEN_M else tl.minimum(offs_m, M - 1 - first)
    at = bh * M + first
    codes_ptr += at * ROW
    block_max_ptr += bh * M * tl.cdiv(N, BLOCK_N) + first
    v_ptr += tl.multiple_of(b * stride_vb + h * stride_vh, ALIGN)
    lse = tl.load(lse_ptr + at + rows) + LOG2_SQUARE  # [BLOCK_M]

    PER_WORD: tl.constexpr = 16 // BITS
    WORDS: tl.constexpr = BLOCK_N // PER_WORD
    cols = tl.arange(0, WORDS)
    acc0 = tl.zeros((BLOCK_M, D0), tl.float32)
    if D1 > 0:
        acc1 = tl.zeros((BLOCK_M, D1), tl.float32)
    blocks = tl.cdiv(N, BLOCK_N)
    block_max = tl.load(block_max_ptr + rows)  # [BLOCK_M], a block ahead of its use
    for block in range(blocks):
        words = tl.load(  # [BLOCK_M, WORDS]; each read once
            codes_ptr + block * WORDS + rows[:, None] * ROW + cols[None, :], eviction_policy="evict_first"
        )
        scale = tl.exp2(block_max - lse)  # [BLOCK_M]
        block_max = tl.load(block_max_ptr + tl.minimum(block + 1, blocks - 1) * M + rows)
        part0 = tl.zeros((BLOCK_M, D0), tl.float32)
        if D1 > 0:
            part1 = tl.zeros((BLOCK_M, D1), tl.float32)
        for part in tl.static_range(PER_WORD):
            keys = block * BLOCK_N + part * WORDS + cols
            if not EVEN_N:
                keys = tl.minimum(keys, N - 1)  # behind the last key codes are 0, and the last is read again
            if FAR:
                keys = keys.to(tl.int64)
            p = (words if BITS == 16 else squares(words, part, BITS)).to(v_ptr.dtype.element_ty)
            part0 = dot(p, load_tile(v_ptr, keys, stride_vn, stride_vd, 0, D0, D, ALIGN), part0)
            if D1 > 0:
                part1 = dot(p, load_tile(v_ptr, keys, stride_vn, stride_vd, D0, D1, D, ALIGN), part1)
        acc0 += part0 * scale[:, None]
        if D1 > 0:
            acc1 += part1 * scale[:, None]

    out_ptr += b * stride_ob + h * stride_oh + first.to(tl.int64) * stride_om
    store_tile(out_ptr, acc0, offs_m, stride_om, stride_od, M - first, 0, D0, D)
    if D1 > 0:
        store_tile(out_ptr, acc1, offs_m, stride_om, stride_od, M - first, D0, D1, D)


def launch(
    attn_map: AttentionMap, value: torch.Tensor, out: torch.Tensor, arch: int, config: configs.Config | None = None
) -> Launch:
    """How this kernel is started on compute capability `arch` (90 for 9.0); `config` overrides the table."""
    b, h, m, n = attn_map.shape
    d = value.shape[-1]
    plain = value.dtype == torch.float16
    config = config or configs.choose("reuse", attn_map.format.name, d, arch, plain)
    codes = attn_map.words
    d0, d1 = split_head_dim(d)
    arguments: dict[str, Any] = dict(
        codes_ptr=codes, block_max_ptr=attn_map.block_max, lse_ptr=attn_map.lse, v_ptr=value, out_ptr=out,
        stride_vb=value.stride(0), stride_vh=value.stride(1), stride_vn=value.stride(2), stride_vd=value.stride(3),
        stride_ob=out.stride(0), stride_oh=out.stride(1), stride_om=out.stride(2), stride_od=out.stride(3),
        H=h, M=m, N=n, ROW=codes.shape[-1],
        BITS=attn_map.format.bits, LOG2_SQUARE=2 * math.log2(attn_map.format.levels or 1), D=d, D0=d0, D1=d1,
        ALIGN=alignment(value), FAR=n * value.stride(2) >= 2**31,
        EVEN_M=m % config.block_m == 0, EVEN_N=n % BLOCK == 0, BLOCK_M=config.block_m, BLOCK_N=BLOCK,
    )  # fmt: skip
    return Launch(_reuse_kernel, grid_of(b * h, m, config.block_m), arguments, config)
