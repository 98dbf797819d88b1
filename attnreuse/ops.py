"""The public ops: `capture` and `reuse` validate once, choose a backend and call a torch.library op.

A backend is a module or class of the shape of :class:`attnreuse.backends.Backend`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnreuse.backends import Backend, cpu, plain
from attnreuse.backends.cuda import Cuda, Hopper
from attnreuse.kernels import backend as triton_kernels
from attnreuse.maps.formats import AttentionMap, MapFormat, format_named

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
ALIGNED = 16  # bytes: what the kernels load and store at once


BEST = "best"  # what the ops are told where the caller names no backend
_BACKENDS: dict[str, Backend] = {"triton": triton_kernels, "native": cpu, "torch": plain}  # best first
NAMED: dict[str, Backend] = {"cuda": Cuda, "hopper": Hopper}  # they reuse, where a caller names them


def unserved_dtype(dtype: torch.dtype) -> str | None:
    """Why tensors of this type cannot be served, or None."""
    return None if dtype in DTYPES else f"{str(dtype).removeprefix('torch.')} tensors are not served"


def backend_for(map_format: str | MapFormat, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Name of the backend that :func:`capture` and :func:`reuse` use for such a call."""
    unserved = unserved_reasons(map_format, device, dtype, head_dim)
    return next(name for name in _BACKENDS if name not in unserved)


def unserved_reasons(
    map_format: str | MapFormat, device: torch.device, dtype: torch.dtype, head_dim: int
) -> dict[str, str]:
    """Backends that cannot serve such a call, and why."""
    chosen = format_named(map_format)
    reasons = {n: b.unserved(chosen, device, dtype, head_dim) for n, b in _BACKENDS.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def named_backends(map_format: str | MapFormat, device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Backends that :func:`reuse` takes such a call to where a caller names them, and nowhere else."""
    call = (format_named(map_format), device, dtype, head_dim)
    return [name for name, backend in NAMED.items() if not backend.unserved(*call)]


def fallback_reason(map_format: str | MapFormat, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why such a call on a CUDA device, where kernels exist, would run through plain torch; or None."""
    reasons = unserved_reasons(map_format, device, dtype, head_dim)
    if device.type != "cuda" or len(reasons) < len(_BACKENDS) - 1:
        return None
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def capture(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    map_format: str | MapFormat = "u8",
    into: AttentionMap | None = None,
    backend: str | None = None,
) -> tuple[Tensor, AttentionMap]:
    """Exact attention that also keeps its map: ``O = P V``, ``P = softmax(scale * Q K^T + mask)``.

    Args:
        query: ``[B, H, M, D]`` fp32, fp16 or bf16; any strides; ``D <= 256``.
        key: ``[B, H, N, D]``, like query.
        value: ``[B, H, N, Dv]``, like query; ``Dv <= 256``.
        mask: bool (True: attend) or floating (added to the scores), broadcastable to
            ``[B, H, M, N]``. A row with every key masked gives zeros.
        scale: factor of the dot products; ``D ** -0.5`` by default.
        map_format: "fp32", "fp16", "bf16", "u8", "u7" or "u4"; ignored where `into` is given.
        into: the map to overwrite, of shape ``(B, H, M, N)``; allocated by default.
        backend: "triton", "native" or "torch"; by default the first that serves the call.

    Returns:
        The output ``[B, H, M, Dv]`` in ``query.dtype`` (not affected by the map's rounding), and the map.

    Raises:
        ValueError: shapes, devices or `into` do not fit, or `backend` cannot serve the call.
        TypeError: unsupported dtype.
        RuntimeError: a gradient is wanted; there is none.

    Source: arXiv 2401.01008; block scaling as in :mod:`attnreuse.formats`.
    """
    shape = _check_capture(query, key, value, mask)
    if into is None:
        into = AttentionMap.empty(format_named(map_format), shape, query.device)
    _check_map(into, shape, query.device)
    return capture_into(into.storage, query, key, value, mask, scale, into.format.name, backend), into


def capture_into(
    storage: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    map_format: str,
    backend: str | None = None,
) -> Tensor:
    """:func:`capture` without its checks, into the `storage` of a map that fits; returns the output."""
    out = _output(value, query.shape[2])
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    torch.ops.attnreuse.capture.default(query, key, value, mask, scale, map_format, backend or BEST, storage, out)
    return out


def reuse(
    attn_map: AttentionMap,
    value: Tensor,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Apply a captured map to fresh values: ``O = P V``.

    Args:
        attn_map: map of ``(B, H, M, N)`` in any format.
        value: ``[B, H, N, Dv]`` fp32, fp16 or bf16; any strides; ``Dv <= 256``.
        out: ``[B, H, M, Dv]``, ``value.dtype``, to write to; allocated by default.
        backend: "triton", "native" or "torch", by default the first that serves the call; or one of the
            extension's CUDA kernels, "cuda" (compute capability 8.0 and later) and "hopper" (9.0).

    Returns:
        ``[B, H, M, Dv]``, ``value.dtype``, accumulated in fp32 (by integer codes on a CPU: see
        :mod:`attnreuse.native`).

    Raises:
        ValueError: shapes or devices do not fit, or `backend` cannot serve the call.
        TypeError: unsupported dtype.
        RuntimeError: a gradient is wanted; there is none.

    Source: arXiv 2401.01008; block scaling as in :mod:`attnreuse.formats`.
    """
    b, h, m, n = attn_map.shape
    _check_tensor("value", value, (b, h, n, None))
    _check_map(attn_map, attn_map.shape, value.device)
    expected = (b, h, m, value.shape[-1])
    if out is not None and (out.shape != expected or out.dtype != value.dtype or out.device != value.device):
        raise ValueError(
            f"out must be {list(expected)} {value.dtype} on {value.device}, "
            f"got {list(out.shape)} {out.dtype} on {out.device}"
        )
    return reuse_into(attn_map.storage, m, value, attn_map.format.name, out, backend)


def reuse_into(
    storage: Tensor,
    queries: int,
    value: Tensor,
    map_format: str,
    out: Tensor | None = None,
    backend: str | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """:func:`reuse` without its checks, of a map of `queries` rows per head that lies in `storage`.

    Args:
        workspace: uint8, at least :func:`workspace_bytes`, that starts as storages do; allocated where it is None.
    """
    out = _output(value, queries) if out is None else out
    torch.ops.attnreuse.reuse.default(storage, queries, value, map_format, backend or BEST, out, workspace)
    return out


def workspace_bytes(
    map_format: str | MapFormat,
    shape: tuple[int, int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
) -> int:
    """Bytes that :func:`reuse` of a map of `shape` works in besides, by the backend that serves the call."""
    backend = _BACKENDS[backend_for(map_format, device, dtype, head_dim)]
    return backend.workspace_bytes(format_named(map_format), shape, head_dim)


def _capture(query, key, value, mask, scale, map_format, backend, storage, out) -> None:
    shape = (*query.shape[:3], key.shape[2])
    into = _map_in(storage, map_format, shape)
    head_dim = max(query.shape[-1], value.shape[-1])
    _chosen(backend, map_format, value.device, value.dtype, head_dim).capture(query, key, value, mask, scale, into, out)


def _reuse(storage, queries, value, map_format, backend, out, workspace=None) -> None:
    b, h, n, d = value.shape
    attn_map = _map_in(storage, map_format, (b, h, queries, n))
    chosen = _chosen(backend, map_format, value.device, value.dtype, d, reuse=True)
    if workspace is None and (nbytes := chosen.workspace_bytes(attn_map.format, attn_map.shape, d)):
        workspace = torch.empty(nbytes, dtype=torch.uint8, device=value.device)
    chosen.reuse(attn_map, value, out, workspace)


def _map_in(storage: Tensor, map_format: str, shape: tuple[int, int, int, int]) -> AttentionMap:
    """The map in `storage`; where that starts is checked here, as what is traced has no address."""
    past = storage.data_ptr() % ALIGNED
    if past:
        raise ValueError(
            f"the map's storage must start at a multiple of {ALIGNED} bytes, got an address {past} bytes past one: "
            f"slice buffers at multiples of {ALIGNED}"
        )
    return AttentionMap.view(format_named(map_format), shape, storage)


_LIBRARY = torch.library.Library("attnreuse", "DEF")


def _register(implementation: Callable[..., None], schema: str) -> None:
    """An op that writes to its arguments and returns nothing; `torch.library.custom_op` takes ten times as long."""
    name = _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")  # the door refuses what needs gradients
    torch.library.register_fake(f"attnreuse::{name}", lambda *args: None, lib=_LIBRARY)


_register(
    _capture,
    "capture(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, str map_format, str backend, "
    "Tensor(a!) storage, Tensor(b!) out) -> ()",
)
_register(
    _reuse,
    "reuse(Tensor storage, SymInt queries, Tensor value, str map_format, str backend, Tensor(a!) out, "
    "Tensor(b!)? workspace=None) -> ()",
)


def _output(value: Tensor, queries: int) -> Tensor:
    """An empty ``[B, H, M, Dv]`` that lies as B M H D, so that merging the heads is a view."""
    b, h, _, d = value.shape
    return value.new_empty(b, queries, h, d).transpose(1, 2)


@functools.cache
def _chosen(
    backend: str, map_format: str, device: torch.device, dtype: torch.dtype, head_dim: int, reuse: bool = False
) -> Any:
    """The backend of that name, or the best; that plain torch serves a CUDA device is said, once per call's kind.

    The ops ask for it, not the door, so that tracing a call under ``torch.compile`` chooses nothing.
    """
    call = (map_format, device, dtype, head_dim)
    if backend == BEST:
        reason = fallback_reason(*call)
        if reason:
            warnings.warn(
                f"attnreuse: {map_format} maps of {dtype} tensors with head dim {head_dim} run through plain torch "
                f"on {device}, slower than exact attention ({reason})",
                stacklevel=2,
            )
        return _BACKENDS[backend_for(*call)]
    known = _BACKENDS | (NAMED if reuse else {})
    if backend not in known:
        raise ValueError(f"backend must be one of {', '.join(known)}, got {backend!r}")
    reason = known[backend].unserved(format_named(map_format), device, dtype, head_dim)
    if reason:
        raise ValueError(f"backend {backend!r} cannot serve this call: {reason}; leave backend=None to fall back")
    return known[backend]


def convert(attn_map: AttentionMap, map_format: str | MapFormat, *, into: AttentionMap | None = None) -> AttentionMap:
    """A map in fewer bits, without its queries and keys.

    Args:
        attn_map: an fp16 or bf16 map ``(B, H, M, N)``.
        map_format: "u8", "u7" or "u4"; ignored where `into` is given.
        into: the map to overwrite, of the same shape; allocated by default.

    Returns:
        The converted map; it shares nothing with `attn_map`.

    Raises:
        ValueError: the formats, shapes or devices do not fit.
    """
    device = attn_map.storage.device
    _check_map(attn_map, attn_map.shape, device)
    if into is None:
        into = AttentionMap.empty(format_named(map_format), attn_map.shape, device)
    _check_map(into, attn_map.shape, device)
    if not attn_map.format.scaled or attn_map.format.levels or not into.format.levels:
        raise ValueError(
            f"convert goes from fp16 or bf16 to u8, u7 or u4, got {attn_map.format.name} to {into.format.name}"
        )
    plain.convert(attn_map, into)
    return into


def drift(first: AttentionMap, second: AttentionMap) -> tuple[Tensor, Tensor]:
    """How far two maps of one format are apart, row by row.

    Args:
        first: ``(B, H, M, N)``; second: the same shape, format and device.

    Returns:
        Total variation ``[B, H, M]`` fp32, half the sum over keys of ``|P - P'|``, in [0, 1]; and the
        Euclidean distance ``[B, H, M]`` fp32.

    Raises:
        ValueError: the maps do not fit each other.
    """
    device = first.storage.device
    _check_map(first, first.shape, device)
    _check_map(second, first.shape, device)
    if first.format != second.format:
        raise ValueError(f"both maps must be {first.format.name} maps, got {second.format.name}")
    distances = torch.empty(2, *first.shape[:3], dtype=torch.float32, device=device)
    plain.drift(first, second, *distances)
    return distances[0], distances[1]


def _check_capture(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[int, int, int, int]:
    _check_tensor("query", query, (None, None, None, None))
    b, h, m, d = query.shape
    _check_tensor("key", key, (b, h, None, d), like=query)
    n = key.shape[2]
    _check_tensor("value", value, (b, h, n, None), like=query)
    if mask is not None:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"mask must be bool or floating, got {mask.dtype}")
        if mask.device != query.device:
            raise ValueError(f"mask must be on {query.device} like query, got {mask.device}")
        sizes = (1,) * (4 - mask.ndim) + tuple(mask.shape)
        if len(sizes) != 4 or any(s not in (1, full) for s, full in zip(sizes, (b, h, m, n), strict=True)):
            raise ValueError(f"mask must broadcast to [B, H, M, N] = {[b, h, m, n]}, got {list(mask.shape)}")
    return b, h, m, n


def _check_tensor(name: str, tensor: Tensor, sizes: tuple[int | None, ...], like: Tensor | None = None) -> None:
    if tensor.ndim != 4 or any(s is not None and s != t for s, t in zip(sizes, tensor.shape, strict=True)):
        wanted = ", ".join(axis if size is None else str(size) for axis, size in zip("BHND", sizes, strict=True))
        raise ValueError(f"{name} must be [{wanted}], got {list(tensor.shape)}")
    if 0 in tensor.shape or tensor.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"{name} must be non-empty with head dim <= {MAX_HEAD_DIM}, got {list(tensor.shape)}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be fp32, fp16 or bf16, got {tensor.dtype}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} requires a gradient, but capture and reuse have none: call them under torch.no_grad(), "
            "or disable reuse where gradients are needed"
        )
    if like is not None and (tensor.dtype != like.dtype or tensor.device != like.device):
        raise ValueError(
            f"{name} must be {like.dtype} on {like.device} like query, got {tensor.dtype} on {tensor.device}"
        )


def _check_map(attn_map: AttentionMap, shape: tuple[int, int, int, int], device: torch.device) -> None:
    storage = attn_map.storage
    if tuple(attn_map.shape) != tuple(shape):
        raise ValueError(f"the map must stand for [B, H, M, N] = {list(shape)}, got {list(attn_map.shape)}")
    if storage.device != device:
        raise ValueError(f"the map must be on {device}, got {storage.device}")
    if storage.dtype != torch.uint8 or storage.shape != (attn_map.nbytes,) or not storage.is_contiguous():
        raise ValueError(
            f"the map's storage must be contiguous uint8 [{attn_map.nbytes}], got {storage.dtype} {list(storage.shape)}"
        )
