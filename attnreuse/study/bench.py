"""`attnreuse bench`: capture and reuse beside exact fused attention, measured on this machine.

Every figure is checked first: an op whose error against fp64 passes its budget is listed without a
speed. Ratios come from calls taken in turns in one run.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnreuse import native, ops
from attnreuse.maps.formats import FORMATS, AttentionMap, MapFormat, format_named
from attnreuse.measure.timing import Times, interleaved
from attnreuse.results import Result

Shape = tuple[int, int, int, int, int]  # B, H, M, N, D
SHAPES: dict[str, Shape] = {  # two rows: guidance
    "SD1.5 512 self 4096": (2, 8, 4096, 4096, 40),
    "SD1.5 512 self 1024": (2, 8, 1024, 1024, 80),
    "SD1.5 512 self 256": (2, 8, 256, 256, 160),
    "SD1.5 512 cross 4096": (2, 8, 4096, 77, 40),
    "SDXL 1024 self 4096": (2, 10, 4096, 4096, 64),
    "SDXL 1024 self 1024": (2, 20, 1024, 1024, 64),
    "Flux-like 1024 joint": (2, 24, 4608, 4608, 128),
}
CPU_SHAPES: dict[str, Shape] = {  # tiny-shapes' layers: four pictures with guidance
    "tiny-shapes self 1024": (8, 4, 1024, 1024, 16),
    "tiny-shapes self 256": (8, 4, 256, 256, 20),
}
CHECKED_QUERIES = 128  # of one head, held against fp64


@dataclass(frozen=True)
class Ceilings:
    """What this device reached in this run: bytes per second of a large copy, FLOP per second of a large product.

    On a CPU with the extension the latter are those of chained FMAs, which no fp32 product can pass.
    """

    bytes_per_s: float
    flop_per_s: float

    def seconds(self, nbytes: int, flop: int) -> float:
        """The least time for that much of either: the roofline."""
        return max(nbytes / self.bytes_per_s, flop / self.flop_per_s)


class Call(NamedTuple):
    """An op that is measured; its fields as in :class:`Row`."""

    op: str
    kind: str
    backend: str = ""


@dataclass(frozen=True)
class Row:
    """One op at one shape.

    Attributes:
        op: "exact", "capture" or "reuse"; kind: the SDPA backend or the map format; backend: of capture and reuse.
        error: relative Frobenius error against fp64; allowed: its budget. Past it, times are None.
        nbytes: device memory that must be read and written, once each; flop: of the products.
        of_exact: median over that of the fastest exact kind.
        of_roofline: least time over the median.
        break_even: reuses per capture from which the pair beats exact attention; of reuse rows.
    """

    shape: str
    b: int
    h: int
    m: int
    n: int
    d: int
    dtype: str
    op: str
    kind: str
    backend: str
    error: float
    allowed: float
    median_s: float | None = None
    p20_s: float | None = None
    p80_s: float | None = None
    nbytes: int = 0
    map_bytes: int = 0
    flop: int = 0
    of_exact: float | None = None
    of_roofline: float | None = None
    break_even: float | None = None

    @property
    def green(self) -> bool:
        """Whether the correctness gate holds."""
        return self.error <= self.allowed


def ceilings(device: torch.device, dtype: torch.dtype, repeats: int = 10) -> Ceilings:
    """Copy bandwidth (reads plus writes) and matmul rate of `device`."""
    cuda = device.type == "cuda"
    source = torch.ones((1 << 30) if cuda else (1 << 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192 if cuda else 1024, 8192 if cuda else 1024, device=device).to(dtype) for _ in range(2))
    copy, product = interleaved([lambda: target.copy_(source), lambda: a @ b], device, repeats)
    flop_per_s = 2 * a.shape[0] ** 3 / product.median
    if not cuda and native.PATHS:
        flop = native.multiply_add()
        flop_per_s = max(flop_per_s, flop / interleaved([native.multiply_add], device, repeats)[0].p20)
    return Ceilings(2 * source.numel() / copy.median, flop_per_s)


def exact_kinds(device: torch.device, query: Tensor, key: Tensor, value: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Exact attention by every fused implementation that runs this call here, by name."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def sdpa(backend: SDPBackend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value)

        return call

    kinds: dict[str, Callable[[], Tensor]] = {"sdpa": lambda: F.scaled_dot_product_attention(query, key, value)}
    if device.type == "cuda":
        for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
            kinds[f"sdpa {name.split('_')[0].lower()}"] = sdpa(getattr(SDPBackend, name))
        if importlib.util.find_spec("flash_attn"):
            from flash_attn import flash_attn_func

            bshd = [x.transpose(1, 2) for x in (query, key, value)]
            kinds["flash-attn"] = lambda: flash_attn_func(*bshd).transpose(1, 2)
        if importlib.util.find_spec("sageattention"):
            from sageattention import sageattn

            kinds["SageAttention"] = lambda: sageattn(query, key, value)
    return {name: call for name, call in kinds.items() if _runs(call)}


def _runs(call: Callable[[], Tensor]) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # why not, at length
        try:
            call()
        except RuntimeError:  # the backend does not take this shape or dtype
            return False
    return True


def measure(
    name: str,
    shape: Shape,
    formats: list[str],
    dtype: torch.dtype,
    device: torch.device,
    limits: Ceilings,
    repeats: int = 30,
) -> list[Row]:
    """Exact attention, capture and reuse at one shape, checked and timed in turns."""
    b, h, m, n, d = shape
    query, key, value = inputs(shape, dtype, device)
    calls: dict[Call, Callable[[], Tensor]] = {
        Call("exact", kind): call for kind, call in exact_kinds(device, query, key, value).items()
    }
    maps = {f: AttentionMap.empty(format_named(f), (b, h, m, n), device) for f in formats}
    out = torch.empty_like(query)
    for kind, slot in maps.items():
        best = ops.backend_for(kind, device, dtype, d)
        calls[Call("capture", kind, best)] = lambda slot=slot: ops.capture(query, key, value, into=slot)[0]
        named = [own for own, backend in ops.NAMED.items() if not backend.unserved(slot.format, device, dtype, d)]
        for own in (best, *named):
            calls[Call("reuse", kind, own)] = lambda slot=slot, own=own: ops.reuse(slot, value, out=out, backend=own)
    errors = {which: check(call(), query, key, value) for which, call in calls.items()}
    plain = check(_plain(query, key, value), query, key, value)
    allowed = {which: _budget(which, plain) for which in calls}
    green = {which: call for which, call in calls.items() if errors[which] <= allowed[which]}
    times = dict(zip(green, interleaved(list(green.values()), device, repeats), strict=True))
    io = query.element_size() * b * h * d
    rows = []
    for which in calls:
        held = 0 if which.op == "exact" else maps[which.kind].nbytes
        nbytes = held + io * (n + m if which.op == "reuse" else 2 * (n + m))
        flop = (2 if which.op == "reuse" else 4) * b * h * m * n * d
        rows.append(
            Row(
                name, *shape, str(dtype).removeprefix("torch."), *which, errors[which], allowed[which],
                nbytes=nbytes, map_bytes=held, flop=flop, **_speeds(which, times, limits, nbytes, flop),
            )
        )  # fmt: skip
    return rows


def _budget(which: Call, plain: float) -> float:
    """Of an op's error, where plain torch in the same dtype has error `plain`."""
    if "Sage" in which.kind:  # 8-bit by design
        return max(2 * plain, 2e-2)
    return 2 * plain + (FORMATS[which.kind].error if which.op == "reuse" else 0.0)


def _speeds(which: Call, times: dict[Call, Times], limits: Ceilings, nbytes: int, flop: int) -> dict[str, float | None]:
    """Times and ratios of one op, from all that were measured."""
    own = times.get(which)
    exact = min((t.median for w, t in times.items() if w.op == "exact" and "Sage" not in w.kind), default=None)
    if own is None:
        return {}
    speeds: dict[str, float | None] = {
        "median_s": own.median,
        "p20_s": own.p20,
        "p80_s": own.p80,
        "of_roofline": limits.seconds(nbytes, flop) / own.median,
        "of_exact": own.median / exact if exact else None,
    }
    capture = next((t for w, t in times.items() if w[:2] == ("capture", which.kind)), None)
    if which.op == "reuse" and exact and capture:
        gain = exact - own.median
        speeds["break_even"] = max(0.0, capture.median - exact) / gain if gain > 0 else math.inf
    return speeds


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v as diffusers hands them over: views ``[B, H, N, D]`` of ``[B, N, H, D]``."""
    b, h, m, n, d = shape
    g = torch.Generator().manual_seed(0)
    sizes = ((b, m, h, d), (b, n, h, d), (b, n, h, d))
    query, key, value = (torch.randn(size, generator=g).to(device, dtype).transpose(1, 2) for size in sizes)
    return query, key, value


def check(out: Tensor, query: Tensor, key: Tensor, value: Tensor) -> float:
    """Relative Frobenius error of some queries of the last head, against fp64."""
    head = (-1, -1, slice(-CHECKED_QUERIES, None))
    scores = query[head].double() @ key[-1, -1].double().T * query.shape[-1] ** -0.5
    expected = scores.softmax(-1) @ value[-1, -1].double()
    error = (out[head].double() - expected).norm() / expected.norm()
    return float(error) if error.isfinite() else math.inf


def _plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What :func:`check` reads of unfused attention in the same dtype."""
    q, k, v = query[-1:, -1:, -CHECKED_QUERIES:], key[-1:, -1:], value[-1:, -1:]
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def to_dicts(rows: list[Row], limits: Ceilings) -> list[dict[str, Any]]:
    """Plain data, ready for JSON or CSV; infinite break-even as text."""
    plain = [asdict(row) | {f"device_{key}": value for key, value in asdict(limits).items()} for row in rows]
    return [{k: str(v) if v == math.inf else v for k, v in row.items()} for row in plain]


class Tuned(Result):
    """One launch configuration of one kernel: its time, or why it has none."""

    op: str
    map_format: str
    head_dim: int
    config: Any
    shipped: bool
    times: Times | None = None
    reason: str = ""


def tune(device: torch.device, shapes: list[Shape], formats: list[str], repeats: int = 20) -> Iterator[Tuned]:
    """Time every sensible configuration of the Triton kernels, the shipped one among them, op by op.

    Raises:
        ValueError: the device is none that the Triton kernels run on.
    """
    from attnreuse.kernels import backend

    reason = backend.unserved(FORMATS["u8"], device, torch.float16, 64)
    if reason or device.type != "cuda":
        raise ValueError(
            f"--tune measures the Triton kernels on a CUDA device: {reason or 'the interpreter has no speed'}"
        )
    for shape in shapes:
        for name in formats:
            yield from _tune_at(shape, format_named(name), device, repeats)


def _tune_at(shape: Shape, map_format: MapFormat, device: torch.device, repeats: int) -> Iterator[Tuned]:
    from attnreuse.kernels import capture as capture_kernel
    from attnreuse.kernels import configs
    from attnreuse.kernels import reuse as reuse_kernel
    from attnreuse.kernels.backend import arch_of

    query, key, value = inputs(shape, torch.float16, device)
    out, arch, d = torch.empty_like(query), arch_of(device), shape[-1]
    slot = ops.capture(query, key, value, map_format=map_format, backend="triton")[1]
    for op in ("capture", "reuse"):
        about = {"op": op, "map_format": map_format.name, "head_dim": d}
        shipped = configs.choose(op, map_format.name, d, arch)
        launches, failed = {}, []
        for config in {shipped: None} | dict.fromkeys(configs.CANDIDATES):
            if op == "capture":
                given = (query, key, value, None, d**-0.5, slot, out, arch)
                launch = capture_kernel.launch(*given, config=config)
            else:
                launch = reuse_kernel.launch(slot, value, out, arch, config=config)
            try:
                launch.run()
                written = ops.reuse(slot, value, backend="triton")
                worst = max(check(x, query, key, value) for x in (out, written))
                reason = "" if worst <= 2e-3 + map_format.error else f"wrong: relative error {worst:.1e}"
            except Exception as error:  # Triton raises its own kinds: out of resources, failed passes
                reason = str(error).splitlines()[0]
            if reason:
                failed.append(Tuned(**about, config=config, shipped=config == shipped, reason=reason))
            else:
                launches[config] = launch
        timed = interleaved([launch.run for launch in launches.values()], device, repeats)
        found = [
            Tuned(**about, config=config, shipped=config == shipped, times=times)
            for config, times in zip(launches, timed, strict=True)
        ]
        yield from [*sorted(found, key=lambda t: t.times.median), *failed]
