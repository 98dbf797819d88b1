"""`attnreuse bench`: capture and reuse beside exact fused attention, measured on this machine.

Every figure is checked first: an op whose error against fp64 passes its budget is listed without a
speed. Ratios come from calls taken in turns in one run.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnreuse import native, ops
from attnreuse.maps.formats import FORMATS, AttentionMap, format_named
from attnreuse.measure.timing import IN_GRAPH, Times, interleaved, sustained
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
L2_ELEMENTS, L2_READS = 4 << 20, 64  # fp32 elements that any L2 cache of a data centre's GPU holds, and how often read
ROTATING_BYTES = 256 << 20  # of maps that sustained calls take in turns: more than any GPU's L2


class Ceilings(Result):
    """What this device reached in this run, per second.

    Attributes:
        bytes_per_s: reads plus writes of a large copy.
        read_bytes_per_s: reads alone.
        l2_bytes_per_s: reads of what the L2 cache holds; None but on CUDA.
        flop_per_s: of a large product in the tensors' dtype; on a CPU with the extension at least that of chained FMAs,
            which no fp32 product can pass.
        int8_op_per_s: of a large product of 8-bit integers; None but on CUDA.
    """

    bytes_per_s: float
    read_bytes_per_s: float
    flop_per_s: float
    l2_bytes_per_s: float | None = None
    int8_op_per_s: float | None = None

    def seconds(self, nbytes: int, flop: int, int8: bool = False) -> float:
        """The least time for that much of either, of 8-bit integers where `int8`: the roofline."""
        rate = self.int8_op_per_s if int8 and self.int8_op_per_s else self.flop_per_s
        return max(nbytes / max(self.bytes_per_s, self.read_bytes_per_s), flop / rate)


class Call(NamedTuple):
    """An op that is measured; its fields as in :class:`Row`."""

    op: str
    kind: str
    backend: str = ""


class Row(Result):
    """One op at one shape.

    Attributes:
        op: "exact", "capture" or "reuse"; kind: the SDPA backend or the map format; backend: of capture and reuse.
        error: relative Frobenius error against fp64; allowed: its budget. Past it, times are None.
        sustained_s: of a call among others, without gaps and with warm clocks; on CUDA.
        nbytes: device memory that must be read and written, once each; flop: of the products.
        of_exact: median over that of the fastest exact kind.
        of_roofline: least time over the median.
        break_even: reuses per capture from which the pair beats exact attention; of reuse rows.
        note: why the op failed, where it did.
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
    sustained_s: float | None = None
    nbytes: int = 0
    map_bytes: int = 0
    flop: int = 0
    of_exact: float | None = None
    of_roofline: float | None = None
    break_even: float | None = None
    note: str = ""

    @property
    def green(self) -> bool:
        """Whether the correctness gate holds."""
        return self.error <= self.allowed


def ceilings(device: torch.device, dtype: torch.dtype, repeats: int = 10) -> Ceilings:
    """Bandwidths and rates of products of `device`."""
    cuda = device.type == "cuda"
    side, many = (8192, 1 << 28) if cuda else (1024, 1 << 24)
    source = torch.ones(many, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    calls: dict[str, Callable[[], Any]] = {
        "copy": lambda: target.copy_(source),
        "read": lambda: source.sum(),
        "product": lambda: a @ b,
    }
    if cuda:
        again = source[:L2_ELEMENTS].expand(L2_READS, -1)
        x, y = (torch.ones(side, side, dtype=torch.int8, device=device) for _ in range(2))
        calls |= {"l2": lambda: again.sum(), "int8": lambda: torch._int_mm(x, y)}
    elif native.PATHS:
        calls["fma"] = native.multiply_add
    found = dict(zip(calls, interleaved(list(calls.values()), device, repeats), strict=True))
    flop_per_s, nbytes = 2 * side**3 / found["product"].median, 4 * many
    if "fma" in found:
        flop_per_s = max(flop_per_s, native.multiply_add() / found["fma"].p20)
    return Ceilings(
        bytes_per_s=2 * nbytes / found["copy"].median,
        read_bytes_per_s=nbytes / found["read"].median,
        flop_per_s=flop_per_s,
        l2_bytes_per_s=4 * L2_ELEMENTS * L2_READS / found["l2"].median if cuda else None,
        int8_op_per_s=2 * side**3 / found["int8"].median if cuda else None,
    )


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


class _Ops:
    """Exact attention, captures and reuses at one shape, as functions without arguments."""

    def __init__(self, shape: Shape, formats: list[str], dtype: torch.dtype, device: torch.device):
        self.tensors = inputs(shape, dtype, device)
        self.exact = exact_kinds(device, *self.tensors)
        self.maps = {name: AttentionMap.empty(format_named(name), shape[:4], device) for name in formats}
        self.out = torch.empty_like(self.tensors[0])
        self.wanted = [Call("exact", kind) for kind in self.exact]
        for name in formats:
            call = (format_named(name), device, dtype, shape[-1])
            best = ops.backend_for(*call)
            reusing = (best, *ops.named_backends(*call))
            self.wanted += [Call("capture", name, best), *(Call("reuse", name, own) for own in reusing)]

    def bound(self, which: Call, slot: AttentionMap | None = None) -> Callable[[], Any]:
        """The op on `slot`, or on the map of its format."""
        query, key, value = self.tensors
        if which.op == "exact":
            return self.exact[which.kind]
        slot = slot or self.maps[which.kind]
        if which.op == "capture":
            return lambda: ops.capture(query, key, value, into=slot)[0]
        return lambda: ops.reuse(slot, value, out=self.out, backend=which.backend)

    def errors(self) -> tuple[dict[Call, float], dict[Call, str]]:
        """Of each op against fp64; infinite, with a note, where it fails."""
        errors, notes = {}, {}
        for which in self.wanted:
            try:
                errors[which] = check(self.bound(which)(), *self.tensors)
            except Exception as error:  # kernels raise their own kinds; one that fails marks its own rows
                errors[which], notes[which] = math.inf, str(error).splitlines()[0]
        return errors, notes

    def sustained(self, which: Call, device: torch.device, repeats: int) -> float | None:
        """Seconds in a graph, on maps in turn; None where there is none, or others' kernels may not be for graphs."""
        if device.type != "cuda" or (which.op == "exact" and not which.kind.startswith("sdpa")):
            return None
        if which.op == "exact":
            return sustained([self.bound(which)], device, repeats)
        return sustained([self.bound(which, slot) for slot in _rotating(self.maps[which.kind])], device, repeats)


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
    at = _Ops(shape, formats, dtype, device)
    errors, notes = at.errors()
    plain = plain_error(*at.tensors)
    budgets = {which: allowed(which, plain) for which in at.wanted}
    green = [which for which in at.wanted if errors[which] <= budgets[which]]
    times = dict(zip(green, interleaved([at.bound(which) for which in green], device, repeats), strict=True))
    steady = {which: at.sustained(which, device, repeats) for which in green}
    b, h, m, n, d = shape
    rows = []
    for which in at.wanted:
        held = 0 if which.op == "exact" else at.maps[which.kind].nbytes
        nbytes, flop = work(which.op, shape, dtype.itemsize, held)
        rows.append(
            Row(
                shape=name, b=b, h=h, m=m, n=n, d=d, dtype=str(dtype).removeprefix("torch."), **which._asdict(),
                error=errors[which], allowed=budgets[which], nbytes=nbytes, map_bytes=held, flop=flop,
                note=notes.get(which, ""), sustained_s=steady.get(which), **_speeds(which, times, limits, nbytes, flop),
            )
        )  # fmt: skip
    return rows


def _rotating(attn_map: AttentionMap) -> list[AttentionMap]:
    """Copies of a map that take ``ROTATING_BYTES`` together, itself the first."""
    count = min(IN_GRAPH, math.ceil(ROTATING_BYTES / attn_map.nbytes))
    copies = (AttentionMap.view(attn_map.format, attn_map.shape, attn_map.storage.clone()) for _ in range(count - 1))
    return [attn_map, *copies]


def work(op: str, shape: Shape, itemsize: int, map_bytes: int) -> tuple[int, int]:
    """Bytes that an op must read and write, once each, and the FLOP of its products."""
    b, h, m, n, d = shape
    moved = itemsize * b * h * d * (n + m if op == "reuse" else 2 * (n + m))
    return map_bytes + moved, (2 if op == "reuse" else 4) * b * h * m * n * d


def allowed(which: Call, plain: float) -> float:
    """Budget of an op's error: twice the `plain` one (:func:`plain_error`), and what its format documents."""
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
        "of_roofline": limits.seconds(nbytes, flop, int8=which.op == "reuse" and which.kind == "u7") / own.median,
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


def plain_error(query: Tensor, key: Tensor, value: Tensor) -> float:
    """The error of unfused attention in the same dtype, by what :func:`check` reads of it."""
    q, k, v = query[-1:, -1:, -CHECKED_QUERIES:], key[-1:, -1:], value[-1:, -1:]
    return check((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v, query, key, value)


def to_dicts(rows: list[Row], limits: Ceilings) -> list[dict[str, Any]]:
    """Plain data, ready for JSON or CSV; infinite break-even as text."""
    device = {f"device_{key}": value for key, value in limits.to_dict().items()}
    plain = [row.to_dict() | device for row in rows]
    return [{k: str(v) if v == math.inf else v for k, v in row.items()} for row in plain]
