"""The extension's CPU kernels as a backend of :mod:`attnreuse.ops`; everything works without them, through torch.

They take fp32 tensors (fp16 and bf16 ones are converted) and run by the best instruction set that the CPU has;
``ATTNREUSE_CPU`` = portable, avx2, avx512 or avx512vnni forces one. Capture calculates in fp32. So does reuse of fp32
and fp16 maps; reuse of integer codes rounds the values to integers of ``VALUE_BITS``, relative to the largest of 128
keys, and sums exactly.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from attnreuse.backends.extension import INFO, PATHS, extension, slot, strided
from attnreuse.maps.formats import AttentionMap, MapFormat

SERVED = [] if extension is None else extension.cpu_formats()
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
        path(), sizes, strided(query), strided(key), strided(value), None if mask is None else strided(mask),
        scale, into.format.name, slot(into), strided(target)[:4], workspace.data_ptr(), threads,
    )  # fmt: skip
    if target is not out:
        out.copy_(target)


def workspace_bytes(map_format: MapFormat, shape: tuple[int, int, int, int], head_dim: int) -> int:
    """None for its reuses."""
    return 0


def reuse(attn_map: AttentionMap, value: Tensor, out: Tensor, workspace: Tensor | None = None) -> None:
    """:func:`attnreuse.ops.reuse`, its arguments checked; shapes as in :mod:`attnreuse.reference`."""
    value = value.float()
    sizes = (*attn_map.shape, value.shape[-1], value.shape[-1])
    threads, target = torch.get_num_threads(), _writable(out)
    workspace = _floats(extension.cpu_workspace(sizes, threads)[1])
    extension.cpu_reuse(
        path(), sizes, attn_map.format.name, slot(attn_map), strided(value), strided(target)[:4],
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
