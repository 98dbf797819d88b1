"""The extension's CUDA kernels: reuse, where it is named."""

from __future__ import annotations

import torch
from torch import Tensor

from attnreuse.backends.extension import INFO, extension, slot, strided
from attnreuse.maps.formats import AttentionMap, MapFormat

ROW_BYTES = 16  # rows of values start at multiples of so many: what cp.async copies, and what TMA asks of strides


class Cuda:
    """Reuse of u8 and u4 maps on fp16 tensors (`csrc/cuda/reuse.cuh`).

    No row says yet that it is faster than Triton's: it serves where it is named.
    """

    KERNEL = "cuda"

    @classmethod
    def unserved(cls, map_format: MapFormat, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why reuse cannot serve such a call, or None."""
        if device.type != "cuda" or torch.version.hip:  # ROCm's devices are "cuda" to torch, too
            return f"the {cls.KERNEL} kernel needs a CUDA device, this is {'ROCm' if device.type == 'cuda' else device}"
        if not hasattr(extension, f"{cls.KERNEL}_reuse"):
            return f"the extension holds no {cls.KERNEL} kernel ({INFO})"
        if not map_format.root or dtype != torch.float16:
            return f"no CUDA kernel for {map_format.name} maps of {dtype} tensors (u8 and u4 of fp16 have one)"
        with torch.cuda.device(device):
            return getattr(extension, f"{cls.KERNEL}_reuse_unserved")(head_dim, map_format.bits, _index(device)) or None

    @staticmethod
    def workspace_bytes(map_format: MapFormat, shape: tuple[int, int, int, int], head_dim: int) -> int:
        """None for its reuses."""
        return 0

    @classmethod
    def reuse(cls, attn_map: AttentionMap, value: Tensor, out: Tensor, workspace: Tensor | None = None) -> None:
        """:func:`attnreuse.ops.reuse`, its arguments checked; shapes as in :mod:`attnreuse.reference`."""
        value, target = readable(value), writable(out)
        sizes = (*attn_map.shape, value.shape[-1], value.shape[-1])
        stream = torch.cuda.current_stream(value.device).cuda_stream
        with torch.cuda.device(value.device):
            getattr(extension, f"{cls.KERNEL}_reuse")(
                sizes, attn_map.format.bits, slot(attn_map), strided(value), strided(target)[:4],
                value.device.index, stream,
            )  # fmt: skip
        if target is not out:
            out.copy_(target)


class Hopper(Cuda):
    """Their reuse for compute capability 9.0, by TMA and wgmma (`csrc/cuda/hopper.cuh`)."""

    KERNEL = "hopper"


def readable(value: Tensor) -> Tensor:
    """`value` as the kernels read it: a copy where it lies otherwise, as a slice of a larger buffer may."""
    fits = _rows_at(value, ROW_BYTES) and 0 not in value.stride()  # TMA takes no stride of 0
    return value if fits else value.clone(memory_format=torch.contiguous_format)


def writable(out: Tensor) -> Tensor:
    """`out` where the kernels can write to it, two elements at once; else a stand-in."""
    direct = _rows_at(out, 2 * out.element_size())
    return out if direct else torch.empty_like(out, memory_format=torch.contiguous_format)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _rows_at(tensor: Tensor, nbytes: int) -> bool:
    """Whether rows are of adjacent elements and start at addresses that are multiples of so many bytes."""
    size = tensor.element_size()
    starts = (tensor.data_ptr(), *(size * stride for stride in tensor.stride()[:-1]))
    return tensor.stride(-1) == 1 and all(at % nbytes == 0 for at in starts)
