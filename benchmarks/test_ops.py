"""Microbenchmarks of exact attention, capture and reuse, on whatever device is here.

    pytest benchmarks --benchmark-only --benchmark-json ops.json     all; -k reuse, -k "SDXL and u8" for some
    pytest benchmarks --benchmark-only --benchmark-compare           beside a run kept by --benchmark-autosave
    python -m benchmarks.plot ops.json                               memory against latency

`extra_info` of each: sizes, bytes of the map, bytes moved, TFLOP/s. An op whose error against fp64 is too large fails
and has no speed. For ratios to exact attention in one run, side by side, `attnreuse bench` is the better measure.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from attnreuse import ops
from attnreuse.cli.inputs import default_dtype
from attnreuse.maps.formats import AttentionMap, format_named
from attnreuse.measure.environment import default_device, environment
from attnreuse.study import bench

DEVICE = default_device()
DTYPE = default_dtype(DEVICE)
SHAPES = bench.SHAPES if DEVICE.type == "cuda" else bench.CPU_SHAPES
FORMATS = ("fp16", "u8", "u7", "u4")
BACKENDS = ("", *ops.NAMED)  # of reuse; "": the one that is chosen


@pytest.fixture(scope="module", params=SHAPES)
def given(request: pytest.FixtureRequest) -> tuple[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Name of a shape; q, k, v."""
    return request.param, bench.inputs(SHAPES[request.param], DTYPE, DEVICE)


def measure(benchmark: Any, call: Callable[[], torch.Tensor], which: bench.Call, given: Any, map_bytes: int) -> None:
    """Check what `call` gives, then time it."""
    name, (query, key, value) = given
    sizes = dict(zip("bhmnd", SHAPES[name], strict=True))
    error = bench.check(call(), query, key, value)
    allowed = bench.allowed(which, bench.plain_error(query, key, value))
    assert error <= allowed, f"relative error {error:.1e} is above {allowed:.1e}: no speed"

    def finished() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = name
    nbytes, flop = bench.work(which.op, SHAPES[name], query.element_size(), map_bytes)
    benchmark(finished)
    about = {"shape": name, "map_bytes": map_bytes, "bytes_moved": nbytes, "error": error}
    benchmark.extra_info |= sizes | which._asdict() | about | {"device": environment(DEVICE)["device"]}
    if benchmark.stats:  # none with --benchmark-disable
        benchmark.extra_info["tflop_per_s"] = flop / benchmark.stats["median"] / 1e12


def test_exact(benchmark: Any, given: Any) -> None:
    exact = bench.exact_kinds(DEVICE, *given[1])["sdpa"]
    measure(benchmark, exact, bench.Call("exact", "sdpa"), given, 0)


@pytest.mark.parametrize("name", FORMATS)
def test_capture(benchmark: Any, given: Any, name: str) -> None:
    shape, (query, key, value) = given
    into = AttentionMap.empty(format_named(name), SHAPES[shape][:4], DEVICE)
    backend = ops.backend_for(name, DEVICE, DTYPE, SHAPES[shape][-1])
    which = bench.Call("capture", name, backend)
    measure(benchmark, lambda: ops.capture(query, key, value, into=into)[0], which, given, into.nbytes)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_reuse(benchmark: Any, given: Any, name: str, backend: str) -> None:
    shape, (query, key, value) = given
    kind = (format_named(name), DEVICE, DTYPE, SHAPES[shape][-1])
    if backend and (reason := ops.NAMED[backend].unserved(*kind)):
        pytest.skip(reason)
    attn_map, out = ops.capture(query, key, value, map_format=name)[1], torch.empty_like(query)
    which = bench.Call("reuse", name, backend or ops.backend_for(*kind))

    def call() -> torch.Tensor:
        return ops.reuse(attn_map, value, out=out, backend=which.backend)

    measure(benchmark, call, which, given, attn_map.nbytes)
