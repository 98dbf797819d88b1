"""What the capture and reuse kernels share: head-dim split, product, tiles, codes, launches.

Codes of a block of 128 keys lie as 16-bit words (see :mod:`attnreuse.formats`): u8 word w holds keys
w and w + 64, u4 word w keys w, w + 32, w + 64 and w + 96. A tile of words then splits, inside the
registers, into tiles of whole key ranges, each an operand of a tensor-core product of its own.

Inline assembly serves two elements per register. The interpreter cannot run it and takes the plain
twin behind ``INTERPRET``; a GPU test holds what the twins write equal.
"""

import functools
import os
from dataclasses import dataclass
from typing import Any

import torch

import triton
import triton.language as tl
from attnreuse.kernels.configs import Config

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@functools.cache
def split_head_dim(d: int) -> tuple[int, int]:
    """`d` as two tile widths, powers of two of at least 16; the second is 0 up to 64.

    80 is 64 + 16 and 160 is 128 + 32: padding to 128 and 256 costs more. 40 is 64: 32 + 16 costs more.
    """
    first = max(16, triton.next_power_of_2(d)) if d <= 64 else 1 << (d.bit_length() - 1)
    rest = d - first
    return first, max(16, triton.next_power_of_2(rest)) if rest > 0 else 0


@dataclass(frozen=True)
class Launch:
    """A kernel and everything it is started with; the compile gate builds just what would run."""

    kernel: Any
    grid: tuple[int]
    arguments: dict[str, Any]
    config: Config

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self._options())

    def compile(self) -> Any:
        """The kernel compiled for the current target, not launched."""
        return self.kernel.warmup(**self.arguments, **self._options(), grid=self.grid)

    def _options(self) -> dict[str, Any]:
        config = self.config
        options = dict(num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True)
        return options if config.registers is None else {**options, "maxnreg": config.registers}


@triton.jit
def share_of_program(M, BLOCK_M: tl.constexpr):
    """Head (of B H) and first query of a program. Programs of a head are neighbours, and share its values in L2.

    The grid has one axis, as the others end at 65,535.
    """
    tiles = tl.cdiv(M, BLOCK_M)
    return (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * BLOCK_M


@triton.jit
def dot(a, b, acc):
    """``acc + a b`` in fp32; the interpreter multiplies bf16 as raw bits, so it gets fp32."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


def alignment(*tensors: torch.Tensor) -> int:
    """8 where every head and row of the tensors starts at a multiple of 8 elements, else 1.

    Triton itself only asks whether a stride is a multiple of 16, which 40, SD1.5's, is not; its loads
    would then be of single elements.
    """
    rows = all(x.stride(3) == 1 and not any(size % 8 for size in x.stride()[:3]) for x in tensors)
    return 8 if rows else 1


def grid_of(heads: int, m: int, block_m: int) -> tuple[int]:
    """Programs of `heads` times as many as `m` queries take: see :func:`share_of_program`."""
    return (heads * -(-m // block_m),)


@triton.jit
def load_tile(
    ptr, rows, stride_row, stride_col, FIRST: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, ALIGN: tl.constexpr
):
    """Columns FIRST to FIRST + WIDTH of `rows`, zeros from column SIZE on: [rows, WIDTH]."""
    cols = FIRST + tl.arange(0, WIDTH)
    at = ptr + tl.multiple_of(rows * stride_row, ALIGN)[:, None] + cols[None, :] * stride_col
    if FIRST + WIDTH <= SIZE:
        return tl.load(at)
    else:
        return tl.load(at, mask=cols[None, :] < SIZE, other=0.0)


@triton.jit
def store_tile(
    ptr, tile, rows, stride_row, stride_col, M, FIRST: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr
):
    """Write `tile` [rows, WIDTH] from column FIRST on, within M rows and SIZE columns."""
    cols = FIRST + tl.arange(0, WIDTH)
    at = ptr + rows[:, None] * stride_row + cols[None, :] * stride_col
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=(rows[:, None] < M) & (cols[None, :] < SIZE))


@triton.jit
def halves(tile, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS, WIDTH] as its left and right halves; every thread keeps what it holds."""
    return tl.split(tile.reshape(ROWS, 2, WIDTH // 2).permute(0, 2, 1))


# fp16 fma(t, levels, 1024) has the rounded code as its low bits: no conversion instruction per element.
@triton.constexpr_function
def _pack_bytes_asm(levels: int) -> str:
    """Of two registers with two keys in fp16 each."""
    factor = {255: "0x5bf85bf8", 127: "0x57f057f0"}[levels]  # two fp16 numbers
    return f"""{{
        .reg .b32 a, b, levels, one;
        mov.b32 levels, {factor};
        mov.b32 one, 0x64006400;
        fma.rn.f16x2 a, $1, levels, one;
        fma.rn.f16x2 b, $2, levels, one;
        prmt.b32 $0, a, b, 0x6240;
    }}"""


_PACK_U4 = tl.constexpr("""{
    .reg .b32 a, b, c, d, levels, one;
    mov.b32 levels, 0x4b804b80;
    mov.b32 one, 0x64006400;
    cvt.rn.f16x2.f32 a, $2, $1;
    cvt.rn.f16x2.f32 b, $4, $3;
    cvt.rn.f16x2.f32 c, $6, $5;
    cvt.rn.f16x2.f32 d, $8, $7;
    fma.rn.f16x2 a, a, levels, one;
    fma.rn.f16x2 b, b, levels, one;
    fma.rn.f16x2 c, c, levels, one;
    fma.rn.f16x2 d, d, levels, one;
    shl.b32 b, b, 4;
    shl.b32 d, d, 4;
    lop3.b32 a, a, 0x000f000f, b, 0xe2;
    lop3.b32 c, c, 0x000f000f, d, 0xe2;
    prmt.b32 $0, a, c, 0x6240;
}""")


@triton.constexpr_function
def _square_asm(part: int, bits: int) -> str:
    """0x6400 | code is fp16 1024 + code; 255 squared stays below fp16's largest number."""
    code = f"prmt.b32 h, $1, one, {'0x5250' if part == 0 else '0x5351'};"
    if bits == 4:
        code = f"shr.b32 h, $1, {4 * part}; lop3.b32 h, h, 0x000f000f, one, 0xea;"
    return f"""{{
        .reg .b32 h, one;
        mov.b32 one, 0x64006400;
        {code}
        sub.rn.f16x2 h, h, one;
        mul.rn.f16x2 $0, h, h;
    }}"""


@triton.jit
def _code(t, LEVELS: tl.constexpr):
    """The interpreter's twin of the packing: t in fp16, rounded to a level."""
    return tl.floor(t.to(tl.float16).to(tl.float32) * LEVELS + 0.5).to(tl.int32)


@triton.jit
def pack_bytes(t, ROWS: tl.constexpr, LEVELS: tl.constexpr):
    """`t` in [0, 1], fp16 [ROWS, 128], to words int16 [ROWS, 64] of two codes, of up to LEVELS (255 or 127)."""
    low, high = halves(t, ROWS, 128)
    if INTERPRET:
        return (_code(low, LEVELS) | (_code(high, LEVELS) << 8)).to(tl.int16)
    else:
        asm: tl.constexpr = _pack_bytes_asm(LEVELS)
        return tl.inline_asm_elementwise(asm, "=r,r,r", [low, high], dtype=tl.int16, is_pure=True, pack=2)


@triton.jit
def pack_u4(t, ROWS: tl.constexpr):
    """Square roots `t` in [0, 1], fp32 [ROWS, 128], to words int16 [ROWS, 32]."""
    left, right = halves(t, ROWS, 128)
    a, b = halves(left, ROWS, 64)
    c, d = halves(right, ROWS, 64)
    if INTERPRET:
        low = _code(a, 15) | (_code(b, 15) << 4)
        return (low | (_code(c, 15) << 8) | (_code(d, 15) << 12)).to(tl.int16)
    else:
        return tl.inline_asm_elementwise(
            _PACK_U4, "=r,r,r,r,r,r,r,r,r", [a, b, c, d], dtype=tl.int16, is_pure=True, pack=2
        )


@triton.jit
def squares(words, PART: tl.constexpr, BITS: tl.constexpr):
    """Squared codes of the keys in field PART (of BITS bits) of each word, fp16."""
    if INTERPRET:
        code = (words.to(tl.int32) >> (PART * BITS)) & ((1 << BITS) - 1)
        return code.to(tl.float16) * code.to(tl.float16)
    else:
        return tl.inline_asm_elementwise(
            _square_asm(PART, BITS), "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )
