"""The compiled extension (`csrc/`) as backends of :mod:`attnreuse.ops`; everything works without it, through torch.

Its CPU kernels take fp32 tensors (fp16 and bf16 ones are converted) and run by the best instruction set that
the CPU has; ``ATTNREUSE_CPU`` = portable, avx2, avx512 or avx512vnni forces one. Capture calculates in fp32. So
does reuse of fp32 and fp16 maps; reuse of integer codes rounds the values to integers of ``VALUE_BITS``, relative
to the largest of 128 keys, and sums exactly. :class:`Cuda` is its part for CUDA devices.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from attnreuse.formats import AttentionMap, MapFormat

try:
    import attnreuse._native as extension
except ImportError as error:  # not built, or built for another Python or system
    extension, PATHS, SERVED, INFO = None, [], [], f"not built: {error}"
else:
    PATHS, SERVED = extension.cpu_paths(), extension.cpu_formats()
    INFO = f"{extension.build_info()}; CPU kernels: {', '.join(PATHS)}"

VALUE_BITS = {"u8": 11, "u7": 7, "u4": 16}  # sign included; what keeps every sum within its 32 (u7: 16) bits


def unserved(map_format: MapFormat, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the extension cannot serve such a call, or None."""
    if extension is None:
        return INFO
    if device.type != "cpu":
        return f"the extension holds no kernel for {device.type} devices"
    if map_format.name not in SERVED:
        return f"no CPU kernel for {map_format.name} maps ({', '.join(SERVED)} have one)"
    return None


def path() -> str:
    """The instruction set in use: the best, or the one that ``ATTNREUSE_CPU`` forces.

    Raises:
        ValueError: one that this CPU lacks.
    """
    forced = os.environ.get("ATTNREUSE_CPU")
    if forced and forced not in PATHS:
        raise ValueError(f"ATTNREUSE_CPU must be one of {', '.join(PATHS)} on this CPU, got {forced!r}")
    return forced or PATHS[0]


def capture(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, into: AttentionMap, out: Tensor
) -> None:
    """:func:`attnreuse.ops.capture`, its arguments checked; shapes as in :mod:`attnreuse.reference`."""
    query, key, value = query.float(), key.float(), value.float()
    sizes = (*into.shape, query.shape[-1], value.shape[-1])
    threads, target = torch.get_num_threads(), _writable(out)
    workspace = _floats(extension.cpu_workspace(sizes, threads)[0])
    mask = None if mask is None else _additive(mask).expand(into.shape)
    extension.cpu_capture(
        path(), sizes, _strided(query), _strided(key), _strided(value), None if mask is None else _strided(mask),
        scale, into.format.name, _slot(into), _strided(target)[:4], workspace.data_ptr(), threads,
    )  # fmt: skip
    if target is not out:
        out.copy_(target)


def reuse(attn_map: AttentionMap, value: Tensor, out: Tensor) -> None:
    """:func:`attnreuse.ops.reuse`, its arguments checked; shapes as in :mod:`attnreuse.reference`."""
    value = value.float()
    sizes = (*attn_map.shape, value.shape[-1], value.shape[-1])
    threads, target = torch.get_num_threads(), _writable(out)
    workspace = _floats(extension.cpu_workspace(sizes, threads)[1])
    extension.cpu_reuse(
        path(), sizes, attn_map.format.name, _slot(attn_map), _strided(value), _strided(target)[:4],
        workspace.data_ptr(), threads,
    )  # fmt: skip
    if target is not out:
        out.copy_(target)


def multiply_add() -> float:
    """FLOP of some milliseconds of chained FMAs on all of torch's threads, to be timed: the CPU's fp32 peak."""
    return extension.cpu_multiply_add(path(), 1 << 20, torch.get_num_threads())


def _floats(*sizes: int) -> Tensor:
    """Unfilled fp32 memory of the host, whatever torch's default type and device are."""
    return torch.empty(*sizes, dtype=torch.float32, device="cpu")


def _strided(tensor: Tensor) -> tuple[int, ...]:
    """Address and strides in elements."""
    return tensor.data_ptr(), *tensor.stride()


def _slot(attn_map: AttentionMap) -> tuple[int, int, int]:
    """Addresses of codes, block maxima and log-sum-exp."""
    return attn_map.codes.data_ptr(), attn_map.block_max.data_ptr(), attn_map.lse.data_ptr()


def _writable(out: Tensor) -> Tensor:
    """`out` where the kernels can write to it: fp32 with rows of adjacent elements; else a stand-in."""
    direct = out.dtype == torch.float32 and (out.stride(-1) == 1 or out.shape[-1] == 1)
    return out if direct else _floats(*out.shape)


def _additive(mask: Tensor) -> Tensor:
    """What is added to the scores, fp32, as in :mod:`attnreuse.reference`; broadcast axes stay."""
    if mask.dtype == torch.bool:
        return _floats(*mask.shape).zero_().masked_fill_(~mask, float("-inf"))
    mask = mask.float()
    return mask - mask.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)


class Cuda:
    """The CUDA kernels: reuse of u8 and u4 maps on fp16 tensors, conversion, drift.

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
                sizes, attn_map.format.bits, _slot(attn_map), _strided(value), _strided(target)[:4], _stream(value)
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
                _slot(first), _slot(second), total_variation.data_ptr(), distance.data_ptr(), b * h * m, m,
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
