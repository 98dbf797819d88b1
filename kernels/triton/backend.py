"""The Triton kernels as a backend of :mod:`attnreuse.ops`.

They serve maps of fp16, bf16, u8, u7 and u4 from fp16 or bf16 tensors, on CUDA devices of compute capability
8.0 and later, and, with ``TRITON_INTERPRET=1``, on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os

import torch

from attnreuse.maps.formats import AttentionMap, MapFormat

DTYPES = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 160  # above, registers spill in every configuration tried


def unserved(map_format: MapFormat, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why these kernels cannot serve such a call, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not map_format.scaled:
        return f"no kernel for {map_format.name} maps (fp16, bf16, u8, u7 and u4 have one)"
    if dtype not in DTYPES:
        return f"no kernel for {dtype} tensors (fp16 and bf16 have one)"
    if head_dim > MAX_HEAD_DIM:
        return f"no kernel for head dim {head_dim} (up to {MAX_HEAD_DIM} have one)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None if device.type in ("cpu", "cuda") else f"the interpreter does not serve {device.type}"
    if device.type != "cuda":
        return f"no kernel for {device.type} devices (TRITON_INTERPRET=1 interprets them on the CPU)"
    if torch.version.hip:
        return "the kernels are written for NVIDIA devices"
    arch = arch_of(device)
    return None if arch >= 80 else f"compute capability {arch / 10} is below 8.0"


def capture(query, key, value, mask, scale: float, into: AttentionMap, out) -> None:
    """:func:`attnreuse.ops.capture`, its arguments checked; shapes as in :mod:`attnreuse.reference`."""
    from attnreuse.kernels.capture import launch

    with _on(query.device):
        launch(query, key, value, mask, scale, into, out, arch_of(query.device)).run()


def workspace_bytes(map_format: MapFormat, shape: tuple[int, int, int, int], head_dim: int) -> int:
    """Bytes of the values as integers, where the codes are an operand of an integer product."""
    from attnreuse.kernels import direct

    return direct.workspace_bytes(shape, head_dim) if direct.serves(map_format) else 0


def reuse(attn_map: AttentionMap, value, out, workspace=None) -> None:
    """:func:`attnreuse.ops.reuse`, its arguments checked; shapes as in :mod:`attnreuse.reference`."""
    from attnreuse.kernels import direct
    from attnreuse.kernels.reuse import launch

    arch = arch_of(value.device)
    with _on(value.device):
        if direct.serves(attn_map.format):
            for each in direct.launches(attn_map, value, out, workspace, arch):
                each.run()
        else:
            launch(attn_map, value, out, arch).run()


@functools.cache
def arch_of(device: torch.device) -> int:
    """Compute capability, 90 for 9.0; the interpreter takes the newest's configurations."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, not on its tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
