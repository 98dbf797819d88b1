"""The extension's CUDA kernels: reuse where it is named, conversion, drift."""

from __future__ import annotations

import torch
from torch import Tensor

from attnreuse.backends.extension import INFO, extension, slot, strided
from attnreuse.maps.formats import AttentionMap, MapFormat


class Cuda:
    """Reuse of u8 and u4 maps on fp16 tensors, conversion, drift.

    They do not capture, and no row says yet that their reuse is faster than Triton's: it serves where it is named.
    """

    SERVED = ("fp16", "u8", "u7", "u4")  # of conversion and drift
    KERNEL = "cuda"  # of reuse: `csrc/cuda/reuse.cuh`

    @staticmethod
    def present(device: torch.device) -> bool:
        """Whether kernels were built that such a device can run."""
        return _is_nvidia(device) and hasattr(extension, "cuda_reuse")

    @classmethod
    def unserved(cls, map_format: MapFormat, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why reuse cannot serve such a call, or None."""
        if not _is_nvidia(device):
            return f"the {cls.KERNEL} kernel needs a CUDA device, this is {'ROCm' if device.type == 'cuda' else device}"
        if not hasattr(extension, f"{cls.KERNEL}_reuse"):
            return f"the extension holds no {cls.KERNEL} kernel ({INFO})"
        if not map_format.root or dtype != torch.float16:
            return f"no CUDA kernel for {map_format.name} maps of {dtype} tensors (u8 and u4 of fp16 have one)"
        with torch.cuda.device(device):
            return getattr(extension, f"{cls.KERNEL}_reuse_unserved")(head_dim, map_format.bits) or None

    @classmethod
    def reuse(cls, attn_map: AttentionMap, value: Tensor, out: Tensor) -> None:
        """:func:`attnreuse.ops.reuse`, its arguments checked; shapes as in :mod:`attnreuse.reference`."""
        fits = _rows_at(value, 8) and 0 not in value.stride()  # TMA takes no stride of 0
        value = value if fits else value.contiguous()
        target = out if _rows_at(out, 2) else torch.empty_like(out, memory_format=torch.contiguous_format)
        sizes = (*attn_map.shape, value.shape[-1], value.shape[-1])
        with torch.cuda.device(value.device):
            getattr(extension, f"{cls.KERNEL}_reuse")(
                sizes, attn_map.format.bits, slot(attn_map), strided(value), strided(target)[:4], _stream(value)
            )
        if target is not out:
            out.copy_(target)

    @staticmethod
    def convert(attn_map: AttentionMap, into: AttentionMap) -> None:
        """:func:`attnreuse.ops.convert` from fp16, its arguments checked."""
        blocks = attn_map.block_max.numel()
        with torch.cuda.device(into.storage.device):
            extension.cuda_convert(
                attn_map.codes.data_ptr(), into.codes.data_ptr(), blocks, into.format.name, _stream(into.storage)
            )
        into.block_max.copy_(attn_map.block_max)
        into.lse.copy_(attn_map.lse)

    @staticmethod
    def drift(first: AttentionMap, second: AttentionMap, total_variation: Tensor, distance: Tensor) -> None:
        """:func:`attnreuse.ops.drift`, its arguments checked."""
        b, h, m, n = first.shape
        with torch.cuda.device(distance.device):
            extension.cuda_drift(
                slot(first), slot(second), total_variation.data_ptr(), distance.data_ptr(), b * h * m, m,
                first.format.blocks(n), first.format.name, _stream(distance),
            )  # fmt: skip


class Hopper(Cuda):
    """Their reuse for compute capability 9.0, by TMA and wgmma (`csrc/cuda/hopper.cuh`)."""

    KERNEL = "hopper"


def _is_nvidia(device: torch.device) -> bool:
    """ROCm's devices are "cuda" to torch, too."""
    return device.type == "cuda" and not torch.version.hip


def _rows_at(tensor: Tensor, elements: int) -> bool:
    """Whether rows are of adjacent elements and start at multiples of so many."""
    starts = (tensor.data_ptr() // tensor.element_size(), *tensor.stride()[:-1])
    return tensor.stride(-1) == 1 and all(at % elements == 0 for at in starts)


def _stream(tensor: Tensor) -> int:
    """Address of the current stream of its device."""
    return torch.cuda.current_stream(tensor.device).cuda_stream
