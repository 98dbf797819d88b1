"""Map formats: how an attention map lies in memory, its bytes, packing, block scales and error.

Every format but fp32 is block-scaled. For each query row and each block of ``BLOCK`` keys the map
keeps codes relative to the row's maximum in that block, so one pass over the keys suffices and the
scales double as quantisation scales. With base-2 scores ``s = (q . k * scale + mask) * log2(e)``::

    block_max[b, h, m, c] = max of s over the block        lse[b, h, m] = log2(sum_n exp2(s))
    linear (fp16, bf16):   code = exp2(s - block_max),      P = code * exp2(block_max - lse)
    linear (u7):           code = round(127 * exp2(s - block_max)),
                           P = code / 127 * exp2(block_max - lse)
    square root (u8, u4):  code = round(L * exp2((s - block_max) / 2)),
                           P = (code / L)^2 * exp2(block_max - lse),   L = 255 or 15

Codes of a row lie block by block, the last block filled up with zeros, so that tiles need no mask and
start aligned. Integer codes lie in 16-bit words, so that the keys of each field of the words are a
range of their own, which tensor cores want: word w of a block holds keys w and w + 64 (u8, u7, low byte
first) or w, w + 32, w + 64 and w + 96 (u4, low nibble first).

Storing the root spends the codes where probabilities are small: a fourth to a sixth of the output
error of linear u8 or e4m3 on peaky rows. fp32 keeps P itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128  # keys that share one block maximum
ALIGNMENT = 256  # bytes; where a map and each of its parts start
NO_KEY = -1e30  # block_max of a block whose keys are all masked: its scale is exp2(NO_KEY - lse) = 0


@dataclass(frozen=True)
class MapFormat:
    """One way to store a map ``[B, H, M, N]``.

    Attributes:
        name: "fp32", "fp16", "bf16", "u8", "u7" or "u4".
        code_dtype: dtype of the stored codes.
        bits: bits that a code takes.
        levels: largest integer code, ``L``; 0 where codes are floating.
        error: documented quantisation error: the largest relative Frobenius error of ``P V`` against
            the unquantised map for Gaussian q, k and V, over logits from flat (q as drawn) to peaky
            (q times 4); flat rows are the hard case. It includes what a CPU rounds values to
            (``attnreuse.native.VALUE_BITS``). ``tests/test_ops.py`` holds it.
        root: whether codes are square roots.
    """

    name: str
    code_dtype: torch.dtype
    bits: int
    levels: int
    error: float
    root: bool = False

    @property
    def scaled(self) -> bool:
        """True where the map carries block maxima and log-sum-exp."""
        return self.name != "fp32"

    def row_codes(self, n: int) -> int:
        """Stored elements of ``code_dtype`` per query row of `n` keys (two u4 codes share a byte)."""
        return self.blocks(n) * BLOCK * self.bits // (8 * self.code_dtype.itemsize) if self.scaled else n

    def blocks(self, n: int) -> int:
        """Block maxima per query row of `n` keys."""
        return math.ceil(n / BLOCK) if self.scaled else 0

    def parts(self, shape: tuple[int, int, int, int]) -> tuple[int, int, int]:
        """Bytes of the codes, block maxima and log-sum-exp of a map of `shape`, unpadded."""
        b, h, m, n = shape
        rows = b * h * m
        codes = rows * self.row_codes(n) * self.code_dtype.itemsize
        return codes, 4 * rows * self.blocks(n), 4 * rows * self.scaled

    def nbytes(self, shape: tuple[int, int, int, int]) -> int:
        """Bytes a map of `shape` occupies, each part padded to ``ALIGNMENT``."""
        return sum(align(part) for part in self.parts(shape))

    def element_error(self, t: Tensor) -> Tensor:
        """Largest error of ``P / exp2(block_max - lse)`` by rounding a code whose exact value is `t`.

        Args:
            t: ``sqrt(P / block scale)`` for the square-root formats, ``P / block scale`` for the
                linear ones, ``P`` for fp32; in [0, 1], any shape.
        """
        if self.root:
            return t / self.levels + 0.25 / self.levels**2
        if self.levels:
            return torch.full_like(t, 0.5 / self.levels)
        return t * torch.finfo(self.code_dtype).eps + torch.finfo(self.code_dtype).tiny


FORMATS = {
    f.name: f
    for f in (
        MapFormat("fp32", torch.float32, 32, 0, 1e-6),
        MapFormat("fp16", torch.float16, 16, 0, 5e-4),
        MapFormat("bf16", torch.bfloat16, 16, 0, 4e-3),
        MapFormat("u8", torch.uint8, 8, 255, 5e-3, root=True),
        MapFormat("u7", torch.uint8, 8, 127, 2.5e-2),
        MapFormat("u4", torch.uint8, 4, 15, 9e-2, root=True),
    )
}


def format_named(name: str | MapFormat) -> MapFormat:
    """The format of that name; ValueError that lists the names otherwise."""
    if isinstance(name, MapFormat):
        return name
    if name not in FORMATS:
        raise ValueError(f"map_format must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


def align(nbytes: int) -> int:
    """`nbytes` rounded up to ``ALIGNMENT``."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """A stored map: views into one flat buffer of bytes.

    Attributes:
        format: how it is stored.
        shape: ``(B, H, M, N)`` of the map it stands for.
        storage: uint8 ``[nbytes]``, contiguous; a slot of a :class:`attnreuse.maps.ring.MapRing` or its own.
        codes: ``[B, H, M, row_codes(N)]``, ``format.code_dtype``.
        block_max: ``[B, H, M, ceil(N / BLOCK)]`` fp32, base 2; last axis empty for fp32 maps. It lies
            as B H C M, so that a block's maxima are read at once.
        lse: ``[B, H, M]`` fp32, base 2, ``+inf`` for a row with every key masked; last axis empty
            for fp32 maps.
    """

    format: MapFormat
    shape: tuple[int, int, int, int]
    storage: Tensor
    codes: Tensor
    block_max: Tensor
    lse: Tensor

    @classmethod
    def view(cls, map_format: MapFormat, shape: tuple[int, int, int, int], storage: Tensor) -> AttentionMap:
        """The map of `shape` that lies in `storage`, uint8 ``[nbytes]``."""
        b, h, m, n = shape
        codes, block_max, lse = map_format.parts(shape)
        first, second = align(codes), align(codes) + align(block_max)
        return cls(
            map_format,
            shape,
            storage,
            storage[:codes].view(map_format.code_dtype).view(b, h, m, map_format.row_codes(n)),
            storage[first : first + block_max].view(torch.float32).view(b, h, map_format.blocks(n), m).mT,
            storage[second : second + lse].view(torch.float32).view(b, h, m if map_format.scaled else 0),
        )

    @classmethod
    def empty(cls, map_format: MapFormat, shape: tuple[int, int, int, int], device: torch.device) -> AttentionMap:
        """An unfilled map in memory of its own."""
        return cls.view(map_format, shape, torch.empty(map_format.nbytes(shape), dtype=torch.uint8, device=device))

    def part(self, batch: slice, heads: slice, queries: slice) -> AttentionMap:
        """The part of the map that belongs to these batch rows, heads and queries; it shares the memory."""
        at = (batch, heads, queries)
        codes = self.codes[at]
        shape = (*codes.shape[:3], self.shape[3])
        return AttentionMap(self.format, shape, self.storage, codes, self.block_max[at], self.lse[at])

    @property
    def nbytes(self) -> int:
        """Bytes it occupies, padding included."""
        return self.format.nbytes(self.shape)

    @property
    def words(self) -> Tensor:
        """The codes as kernels see them: int16 words of u8 and u4 codes, else :attr:`codes`."""
        return self.codes.view(torch.int16) if self.format.levels else self.codes

    def dense(self) -> Tensor:
        """The map as the format holds it: fp32 ``[B, H, M, N]``."""
        if not self.format.scaled:
            return self.codes
        scale = (self.block_max - self.lse[..., None]).exp2_()
        if self.format.levels:
            scale /= self.format.levels ** (2 if self.format.root else 1)
            values = _unpack(self.format, self.codes).to(torch.float32)
            values = values.square_() if self.format.root else values
        else:
            values = self.codes.to(torch.float32).unflatten(-1, (-1, BLOCK))
        return values.mul_(scale[..., None]).flatten(-2)[..., : self.shape[3]]


def encode(map_format: MapFormat, scores: Tensor, block_max: Tensor) -> Tensor:
    """Codes of base-2 `scores`; :meth:`AttentionMap.dense` undoes it up to rounding.

    Args:
        scores: fp32 ``[..., N]``, ``-inf`` where masked.
        block_max: fp32 ``[..., ceil(N / BLOCK)]``, finite.

    Returns:
        ``[..., row_codes(N)]``, ``code_dtype``.
    """
    filled = torch.nn.functional.pad(scores, (0, -scores.shape[-1] % BLOCK), value=-math.inf)
    relative = filled.unflatten(-1, (-1, BLOCK)) - block_max[..., None]  # [..., C, BLOCK], at most 0
    return codes_of(map_format, relative.mul_(0.5 if map_format.root else 1.0).exp2_())


def codes_of(map_format: MapFormat, t: Tensor) -> Tensor:
    """Codes ``[..., row_codes(N)]`` of exact ones: fp32 `t` ``[..., C, BLOCK]`` in [0, 1], overwritten."""
    if not map_format.levels:
        return t.to(map_format.code_dtype).flatten(-2)
    return _pack(map_format, t.mul_(map_format.levels).round_().to(torch.uint8))


def _pack(map_format: MapFormat, codes: Tensor) -> Tensor:
    """Codes ``[..., C, BLOCK]``, one a byte, as they lie in a row: ``[..., row_codes]``."""
    if map_format.bits == 4:
        codes = codes.unflatten(-1, (2, 2, BLOCK // 4))  # byte of the word, nibble, word
        codes = codes[..., 0, :] | (codes[..., 1, :] << 4)
    else:
        codes = codes.unflatten(-1, (2, BLOCK // 2))  # byte, word
    return codes.mT.flatten(-3)


def _unpack(map_format: MapFormat, codes: Tensor) -> Tensor:
    """The inverse of :func:`_pack`."""
    codes = codes.unflatten(-1, (-1, 8 * map_format.bits, 2)).mT  # [..., C, 2, words]
    if map_format.bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-2)
    return codes.flatten(-2 if map_format.bits == 8 else -3)


map_format = format_named  # as programs of earlier versions call it
