"""Capture: exact attention in one pass over the keys that also writes the block-scaled map.

Flash attention keeps a running maximum m and sum l per row. Here each block of 128 keys is taken
relative to its own maximum, which is what the map stores, and enters the running sums by a factor::

    mb = max_n s,  t = exp2((s - mb) / 2),  p = t^2             per block; the codes are t (or p)
    mn = max(m, mb),  alpha = exp2(m - mn),  beta = exp2(mb - mn)
    l = l alpha + beta sum p,  acc = acc alpha + beta (p V),  m = mn
    O = acc / l,  lse = m + log2 l                              at the end

The output never sees the map's rounding. Multiplying the partial product by beta, instead of adding
it into acc by the tensor core, is also what keeps Hopper's products asynchronous beside the stores.
Source: arXiv 2401.01008; FlashAttention-2, arXiv 2307.08691; formats as in :mod:`attnreuse.formats`.
"""

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
    pack_bytes,
    pack_u4,
    share_of_program,
    split_head_dim,
    store_tile,
)
from attnreuse.maps.formats import BLOCK, NO_KEY, AttentionMap

LOG2_E = tl.constexpr(1.4426950408889634)
MASKED = tl.constexpr(NO_KEY)  # score of a masked key: finite, so that no difference is NaN
LEAST_MASK = tl.constexpr(-1e28)  # of additive masks but -inf: a row of nothing else is still attended
ULP = tl.constexpr(2.0**-23)  # of fp32
MASKED_ROW = tl.constexpr(-5e29)  # a row's maximum lies below only where every key is masked
STRIDES = tuple(
    f"stride_{tensor}{axis}"
    for tensor, axes in (("q", "bhmd"), ("k", "bhnd"), ("v", "bhnd"), ("m", "bhmn"), ("o", "bhmd"))
    for axis in axes
)


@triton.jit
def _capture_kernel(
    q_ptr,  # [B, H, M, D]
    k_ptr,  # [B, H, N, D]
    v_ptr,  # [B, H, N, V]
    mask_ptr,  # [B, H, M, N] by strides, or a dummy
    codes_ptr,  # [B, H, M, ROW]: 16-bit words of u8, u7 and u4, else the codes themselves
    block_max_ptr,  # [B, H, C, M] fp32
    lse_ptr,  # [B, H, M] fp32
    out_ptr,  # [B, H, M, V]
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn: tl.constexpr, stride_kd,
    stride_vb, stride_vh, stride_vn: tl.constexpr, stride_vd,
    stride_mb, stride_mh, stride_mm, stride_mn,
    stride_ob, stride_oh, stride_om, stride_od,
    scale_log2,  # scale * log2(e); positive without a mask
    H, M, N, ROW,
    BITS: tl.constexpr,
    ROOT: tl.constexpr,  # codes are square roots
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    V: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    ALIGN: tl.constexpr,
    FAR: tl.constexpr,  # keys lie too far apart for 32-bit offsets
    MASK: tl.constexpr,  # "none", "bool" or "additive"
    MASK_ROWS: tl.constexpr,  # the mask differs between queries
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    bh, first = share_of_program(M, BLOCK_M)
    b, h = bh // H, bh % H
    offs_m = tl.arange(0, BLOCK_M)
    # Rows behind the last repeat it: loads need no mask, and only stores are cut.
    rows = offs_m if EVEN_M else tl.minimum(offs_m, M - 1 - first)
    at = bh * M + first
    q_ptr += tl.multiple_of(b * stride_qb + h * stride_qh + first.to(tl.int64) * stride_qm, ALIGN)
    k_ptr += tl.multiple_of(b * stride_kb + h * stride_kh, ALIGN)
    v_ptr += tl.multiple_of(b * stride_vb + h * stride_vh, ALIGN)
    mask_ptr += b * stride_mb + h * stride_mh + first.to(tl.int64) * stride_mm
    codes_ptr += at * ROW
    block_max_ptr += bh * M * tl.cdiv(N, BLOCK_N) + first

    q0 = load_tile(q_ptr, rows, stride_qm, stride_qd, 0, D0, D, ALIGN)
    if D1 > 0:
        q1 = load_tile(q_ptr, rows, stride_qm, stride_qd, D0, D1, D, ALIGN)
    m = tl.full((BLOCK_M,), MASKED, tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)  # noqa: E741
    acc0 = tl.zeros((BLOCK_M, V0), tl.float32)
    if V1 > 0:
        acc1 = tl.zeros((BLOCK_M, V1), tl.float32)
    WORDS: tl.constexpr = BLOCK_N * BITS // 16

    for block in range(tl.cdiv(N, BLOCK_N)):
        keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = keys if EVEN_N else tl.minimum(keys, N - 1)
        if FAR:
            inside = inside.to(tl.int64)
        s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        s = dot(q0, tl.trans(load_tile(k_ptr, inside, stride_kn, stride_kd, 0, D0, D, ALIGN)), s)
        if D1 > 0:
            s = dot(q1, tl.trans(load_tile(k_ptr, inside, stride_kn, stride_kd, D0, D1, D, ALIGN)), s)
        if MASK == "none":
            factor = scale_log2  # folded into the exponent's multiply-add
        else:
            factor = 1.0
            bias = tl.load(mask_ptr + inside * stride_mn)[None, :]
            if MASK_ROWS:
                bias = tl.load(mask_ptr + rows[:, None] * stride_mm + inside[None, :] * stride_mn)
            if MASK == "bool":
                s = tl.where(bias, s * scale_log2, MASKED)
            else:
                bias = bias.to(tl.float32)
                s = tl.fma(s, scale_log2, tl.maximum(bias * LOG2_E, LEAST_MASK))
                s = tl.where(bias == float("-inf"), MASKED, s)
        if not EVEN_N:
            s = tl.where(keys[None, :] < N, s, MASKED / factor)

        mb = tl.max(s, 1) * factor
        if MASK == "none":  # not below the unrounded products: a code above the levels would be another's
            mb += tl.abs(mb) * ULP
        mn = tl.maximum(m, mb)
        alpha, beta = tl.exp2(m - mn), tl.exp2(mb - mn)
        if ROOT:
            t = tl.exp2(tl.fma(s, factor * 0.5, -0.5 * mb[:, None]))
            stored = pack_bytes(t.to(tl.float16), BLOCK_M, 255) if BITS == 8 else pack_u4(t, BLOCK_M)
            p = t * t
        else:
            p = tl.exp2(tl.fma(s, factor, -mb[:, None]))
            stored = pack_bytes(p.to(tl.float16), BLOCK_M, 127) if BITS == 8 else p.to(codes_ptr.dtype.element_ty)
        codes = codes_ptr + block * WORDS
        if ROOT:
            _store_codes(codes, stored, ROW, M - first, EVEN_M)
        tl.store(block_max_ptr + block * M + offs_m, mb, mask=None if EVEN_M else offs_m < M - first)
        l = l * alpha + beta * tl.sum(p, 1)  # noqa: E741
        p = p.to(v_ptr.dtype.element_ty)
        part0 = dot(
            p, load_tile(v_ptr, inside, stride_vn, stride_vd, 0, V0, V, ALIGN), tl.zeros((BLOCK_M, V0), tl.float32)
        )
        acc0 = acc0 * alpha[:, None] + part0 * beta[:, None]
        if V1 > 0:
            part1 = tl.zeros((BLOCK_M, V1), tl.float32)
            part1 = dot(p, load_tile(v_ptr, inside, stride_vn, stride_vd, V0, V1, V, ALIGN), part1)
            acc1 = acc1 * alpha[:, None] + part1 * beta[:, None]
        if not ROOT:  # they are made of the product's operand: stored before it, that would live twice
            _store_codes(codes, stored, ROW, M - first, EVEN_M)
        m = mn

    attended = m > MASKED_ROW
    share = tl.where(attended, 1.0 / l, 0.0)
    lse = tl.where(attended, m + tl.log2(l), float("inf"))
    tl.store(lse_ptr + at + offs_m, lse, mask=offs_m < M - first)
    out_ptr += b * stride_ob + h * stride_oh + first.to(tl.int64) * stride_om
    store_tile(out_ptr, acc0 * share[:, None], offs_m, stride_om, stride_od, M - first, 0, V0, V)
    if V1 > 0:
        store_tile(out_ptr, acc1 * share[:, None], offs_m, stride_om, stride_od, M - first, V0, V1, V)


@triton.jit
def _store_codes(ptr, codes, ROW, M, EVEN_M: tl.constexpr):
    """Write a tile of codes, [rows, words], within M rows; it is not read in this step."""
    offs_m = tl.arange(0, codes.shape[0])[:, None]
    at = ptr + offs_m * ROW + tl.arange(0, codes.shape[1])[None, :]
    tl.store(at, codes, mask=None if EVEN_M else offs_m < M, cache_modifier=".cs")


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    into: AttentionMap,
    out: torch.Tensor,
    arch: int,
    config: configs.Config | None = None,
) -> Launch:
    """How this kernel is started on compute capability `arch` (90 for 9.0); `config` overrides the table."""
    b, h, m, n = into.shape
    d, dv = query.shape[-1], value.shape[-1]
    plain = mask is None and scale > 0 and n % BLOCK == 0
    config = config or configs.choose("capture", into.format.name, max(d, dv), arch, plain)
    kind = "none"
    if mask is not None:
        kind = "bool" if mask.dtype == torch.bool else "additive"
        mask = mask.expand(into.shape)
    elif scale <= 0:  # the maximum must be taken after scaling
        kind, mask = "additive", query.new_zeros(()).expand(into.shape)
    of_mask = (0,) * 4 if mask is None else mask.stride()
    strides = (*query.stride(), *key.stride(), *value.stride(), *of_mask, *out.stride())
    (d0, d1), (v0, v1) = split_head_dim(d), split_head_dim(dv)
    words = into.words
    arguments: dict[str, Any] = dict(
        q_ptr=query, k_ptr=key, v_ptr=value, mask_ptr=query if mask is None else mask,
        codes_ptr=words, block_max_ptr=into.block_max, lse_ptr=into.lse, out_ptr=out,
        **dict(zip(STRIDES, strides, strict=True)), scale_log2=scale * LOG2_E.value, H=h, M=m, N=n, ROW=words.shape[-1],
        BITS=into.format.bits, ROOT=into.format.root, D=d, D0=d0, D1=d1, V=dv, V0=v0, V1=v1,
        ALIGN=alignment(query, key, value), FAR=n * max(key.stride(2), value.stride(2)) >= 2**31,
        MASK=kind, MASK_ROWS=mask is not None and mask.stride(2) != 0,
        EVEN_M=m % config.block_m == 0, EVEN_N=n % BLOCK == 0, BLOCK_M=config.block_m, BLOCK_N=BLOCK,
    )  # fmt: skip
    return Launch(_capture_kernel, grid_of(b * h, m, config.block_m), arguments, config)
