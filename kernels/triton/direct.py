"""Direct reuse of u7 maps: ``O = P V`` by the tensor cores' integer product, without decoding.

A u7 code is an integer of at most 127, so a byte of the map is an operand as it lies in memory. A pass before it makes
the values 8-bit integers, relative to the largest magnitude ``limit`` of their head and column, and lays them out by
columns, keys in the order of the codes: byte j of a block is of key j // 2 + 64 (j % 2)::

    q[d, j] = round(127 v[key(j), d] / limit[d])
    out[m, d] = limit[d] / 127^2 * sum_blocks exp2(block_max - lse)[m] * sum_j code[m, j] q[d, j]

Sums of a block are exact (128 * 127 * 127 < 2^31). A column that holds inf or NaN gives inf or NaN, as it does exactly.
Source: arXiv 2401.01008; formats as in :mod:`attnreuse.formats`.
"""

from typing import Any

import torch

import triton
import triton.language as tl
from attnreuse.kernels import configs
from attnreuse.kernels.tiles import Launch, grid_of, share_of_program, split_head_dim, store_tile
from attnreuse.maps.formats import BLOCK, AttentionMap, MapFormat, align

COLUMNS, AT_ONCE = 16, 512  # of the values, and keys, that a program makes integers at once
QUANTISE = configs.Config(AT_ONCE, 4, 1)


@triton.jit
def _quantise_kernel(
    v_ptr,  # [B, H, N, D]
    columns_ptr,  # [B H, PADDED, ROW] s8, written
    limit_ptr,  # [B H, PADDED] fp32, written
    stride_vb, stride_vh, stride_vn, stride_vd,
    H, N, ROW,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    FAR: tl.constexpr,  # keys lie too far apart for 32-bit offsets
    BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = PADDED // COLUMNS
    bh = (tl.program_id(0) // parts).to(tl.int64)
    d = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    v_ptr += bh // H * stride_vb + bh % H * stride_vh
    j = tl.arange(0, AT_ONCE)
    key = j // BLOCK_N * BLOCK_N + j % BLOCK_N // 2 + BLOCK_N // 2 * (j % 2)
    bits = tl.zeros((COLUMNS,), tl.int32)  # of magnitudes: they are ordered as these are, and NaN is above all
    for first in range(0, ROW, AT_ONCE):
        v = _values(v_ptr, first + key, d, stride_vn, stride_vd, N, D, FAR)
        bits = tl.maximum(bits, tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1))
    limit = bits.to(tl.float32, bitcast=True)
    tl.store(limit_ptr + bh * PADDED + d, limit)
    factor = tl.where(limit > 0, 127.0 / limit, 0.0)
    columns_ptr += (bh * PADDED + d[:, None]) * ROW
    for first in range(0, ROW, AT_ONCE):
        v = _values(v_ptr, first + key, d, stride_vn, stride_vd, N, D, FAR)
        q = tl.floor(v * factor[:, None] + 0.5).to(tl.int8)
        at = first + j[None, :]
        tl.store(columns_ptr + at, q, mask=at < ROW)


@triton.jit
def _values(ptr, keys, d, stride_n, stride_d, N, D: tl.constexpr, FAR: tl.constexpr):
    """Columns `d` of the values of `keys` as fp32 [columns, keys], zeros outside of N and D."""
    inside = (keys[None, :] < N) & (d[:, None] < D)
    if FAR:
        keys = keys.to(tl.int64)
    return tl.load(ptr + keys[None, :] * stride_n + d[:, None] * stride_d, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _direct_kernel(
    codes_ptr,  # [B, H, M, ROW] s8
    block_max_ptr,  # [B, H, C, M] fp32
    lse_ptr,  # [B, H, M] fp32
    columns_ptr,  # [B H, D0 + D1, ROW] s8
    limit_ptr,  # [B H, D0 + D1] fp32
    out_ptr,  # [B, H, M, D]
    stride_ob, stride_oh, stride_om, stride_od,
    H, M, ROW,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    EVEN_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    bh, first = share_of_program(M, BLOCK_M)
    # Rows behind the last repeat it: loads need no mask, and only stores are cut.
    offs_m = tl.arange(0, BLOCK_M)
    rows = offs_m if EVEN_M else tl.minimum(offs_m, M - 1 - first)
    cols = tl.arange(0, BLOCK_N)
    at = bh * M + first
    blocks = ROW // BLOCK_N
    codes_ptr += at * ROW
    block_max_ptr += bh * M * blocks + first
    columns_ptr += bh * (D0 + D1) * ROW
    limit_ptr += bh * (D0 + D1)
    lse = tl.load(lse_ptr + at + rows)  # [BLOCK_M]
    d0 = tl.arange(0, D0)
    acc0 = tl.zeros((BLOCK_M, D0), tl.float32)
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        acc1 = tl.zeros((BLOCK_M, D1), tl.float32)
    block_max = tl.load(block_max_ptr + rows)  # [BLOCK_M], a block ahead of its use
    for block in range(blocks):
        scale = tl.exp2(block_max - lse)  # [BLOCK_M]
        block_max = tl.load(block_max_ptr + tl.minimum(block + 1, blocks - 1) * M + rows)
        codes = tl.load(  # [BLOCK_M, BLOCK_N]; each read once
            codes_ptr + block * BLOCK_N + rows[:, None] * ROW + cols[None, :], eviction_policy="evict_first"
        )
        q0 = tl.load(columns_ptr + block * BLOCK_N + d0[:, None] * ROW + cols[None, :])
        acc0 += tl.dot(codes, tl.trans(q0), out_dtype=tl.int32).to(tl.float32) * scale[:, None]
        if D1 > 0:
            q1 = tl.load(columns_ptr + block * BLOCK_N + d1[:, None] * ROW + cols[None, :])
            acc1 += tl.dot(codes, tl.trans(q1), out_dtype=tl.int32).to(tl.float32) * scale[:, None]

    out_ptr += bh // H * stride_ob + bh % H * stride_oh + first.to(tl.int64) * stride_om
    unit: tl.constexpr = 1.0 / (127 * 127)
    acc0 *= tl.load(limit_ptr + d0)[None, :] * unit
    store_tile(out_ptr, acc0, offs_m, stride_om, stride_od, M - first, 0, D0, D)
    if D1 > 0:
        acc1 *= tl.load(limit_ptr + d1)[None, :] * unit
        store_tile(out_ptr, acc1, offs_m, stride_om, stride_od, M - first, D0, D1, D)


def serves(map_format: MapFormat) -> bool:
    """Whether codes are integers in proportion to what they stand for, and 7 bits of a byte."""
    return map_format.levels == 127 and not map_format.root


def workspace_bytes(shape: tuple[int, int, int, int], head_dim: int) -> int:
    """Bytes that :func:`launches` writes between its two kernels, for a map of this shape."""
    return sum(_workspace_parts(shape, head_dim))


def _workspace_parts(shape: tuple[int, int, int, int], head_dim: int) -> tuple[int, int]:
    """Bytes of the values by columns, and of their limits."""
    b, h, _, n = shape
    columns = b * h * sum(split_head_dim(head_dim))
    return align(columns * -(-n // BLOCK) * BLOCK), align(4 * columns)


def launches(
    attn_map: AttentionMap,
    value: torch.Tensor,
    out: torch.Tensor,
    workspace: torch.Tensor,
    arch: int,
    config: configs.Config | None = None,
) -> tuple[Launch, Launch]:
    """How the two kernels are started, one after the other; `workspace`: uint8, at least :func:`workspace_bytes`."""
    b, h, m, n = attn_map.shape
    d = value.shape[-1]
    config = config or configs.choose("direct", attn_map.format.name, d, arch)
    d0, d1 = split_head_dim(d)
    codes, padded = attn_map.codes.view(torch.int8), d0 + d1
    row, (nbytes, _) = codes.shape[-1], _workspace_parts(attn_map.shape, d)
    columns = workspace[: b * h * padded * row].view(torch.int8)
    limit = workspace[nbytes : nbytes + 4 * b * h * padded].view(torch.float32)
    quantise: dict[str, Any] = dict(
        v_ptr=value, columns_ptr=columns, limit_ptr=limit,
        stride_vb=value.stride(0), stride_vh=value.stride(1), stride_vn=value.stride(2), stride_vd=value.stride(3),
        H=h, N=n, ROW=row, D=d, PADDED=padded, FAR=n * value.stride(2) >= 2**31, BLOCK_N=BLOCK, COLUMNS=COLUMNS,
        AT_ONCE=AT_ONCE,
    )  # fmt: skip
    product: dict[str, Any] = dict(
        codes_ptr=codes, block_max_ptr=attn_map.block_max, lse_ptr=attn_map.lse, columns_ptr=columns, limit_ptr=limit,
        out_ptr=out, stride_ob=out.stride(0), stride_oh=out.stride(1), stride_om=out.stride(2), stride_od=out.stride(3),
        H=h, M=m, ROW=row, D=d, D0=d0, D1=d1, EVEN_M=m % config.block_m == 0, BLOCK_M=config.block_m, BLOCK_N=BLOCK,
    )  # fmt: skip
    return (
        Launch(_quantise_kernel, (b * h * (padded // COLUMNS),), quantise, QUANTISE),
        Launch(_direct_kernel, grid_of(b * h, m, config.block_m), product, config),
    )
