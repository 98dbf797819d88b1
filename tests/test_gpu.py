"""What only a CUDA device can show: no synchronisation, no allocation, graphs, large maps, whole runs.

The kernels' values on the device are held by test_triton.py, which runs there too.
"""

import warnings

import pytest
import torch
from tiny_random import random_pipeline, sample

import attnreuse
from attnreuse import ops
from attnreuse.maps.formats import FORMATS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(2, 2, 63, 77, 40), (1, 2, 111, 1024, 80), (1, 1, 1, 1, 160)])
def test_capture_and_reuse_agree_with_fp64(shape, name, dtype):
    b, h, m, n, d = shape
    q, k, v = (torch.randn(b, h, length, d, device="cuda", dtype=dtype) for length in (m, n, n))
    p = (q.double() @ k.double().mT * d**-0.5).softmax(-1)
    expected = p @ v.double()
    budget = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-3}[dtype]  # TF32 may be on
    out, attn_map = ops.capture(q, k, v, map_format=name)
    assert (out.double() - expected).norm() / expected.norm() <= budget
    again = ops.reuse(attn_map, v)
    assert (again.double() - expected).norm() / expected.norm() <= budget + FORMATS[name].error


def test_a_run_on_the_device():
    pipe = random_pipeline().to("cuda")
    full = sample(pipe, 6)
    with attnreuse.enable(pipe, attnreuse.hurry(6, 3, None)) as session:
        first, second = sample(pipe, 6), sample(pipe, 6)
    assert torch.equal(first, second)
    assert (first - full).norm() / full.norm() < 0.05
    assert session.report().allocated_bytes == session.report().predicted_bytes > 0


def test_maps_are_given_back_at_the_end_of_a_run():
    pipe = random_pipeline().to("cuda")
    with attnreuse.enable(pipe, attnreuse.hurry(4, 2, None), map_format="fp32"):
        sample(pipe, 4, height=128, width=128)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        sample(pipe, 4, height=128, width=128)
        torch.cuda.synchronize()
        assert abs(torch.cuda.memory_allocated() - before) < 1 << 20


def inputs(shape, dtype=torch.float16):
    """q, k, v as views [B, H, N, D] of [B, N, H, D]."""
    b, h, m, n, d = shape
    return [torch.randn(b, length, h, d, device="cuda", dtype=dtype).transpose(1, 2) for length in (m, n, n)]


@pytest.mark.parametrize(
    "shape",
    [
        (2, 3, 63, 77, 40),
        (1, 2, 150, 300, 64),
        (1, 2, 128, 1024, 80),
        (2, 8, 111, 129, 96),
        (1, 1, 1, 1, 128),
        (2, 2, 257, 1000, 160),
        (2, 160, 300, 700, 64),
    ],
)
@pytest.mark.parametrize("name", ["u8", "u4"])
@pytest.mark.parametrize("backend", ops.NAMED)
def test_reuse_of_the_extension_agrees_with_the_reference(backend, name, shape):
    q, k, v = inputs(shape)
    if reason := ops.NAMED[backend].unserved(FORMATS[name], v.device, v.dtype, shape[-1]):
        pytest.skip(reason)
    attn_map = ops.capture(q, k, v, map_format=name)[1]
    expected = attn_map.dense().double() @ v.double()
    into = torch.full((*shape[:3], shape[4] + 8), 7.0, device="cuda", dtype=torch.float16)
    out = ops.reuse(attn_map, v, out=into[..., 4:-4], backend=backend)
    assert (out.double() - expected).norm() / expected.norm() < 2e-3
    assert (into[..., :4] == 7).all()
    assert (into[..., -4:] == 7).all()
    assert torch.equal(out, ops.reuse(attn_map, v, backend=backend))


REUSES = [("fp16", "triton"), ("u8", "triton"), ("u7", "triton"), ("u4", "triton")]
REUSES += [(name, backend) for backend in ops.NAMED for name in ("u8", "u4")]


def skip_unserved(name, backend, value):
    named = ops.NAMED.get(backend)
    reason = named and named.unserved(FORMATS[name], value.device, value.dtype, value.shape[-1])
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize(("name", "backend"), REUSES)
@pytest.mark.parametrize("d", [40, 64, 80, 160])
def test_a_call_neither_waits_for_the_device_nor_allocates_but_its_output(name, backend, d):
    q, k, v = inputs((2, 8, 1024, 1024, d))
    skip_unserved(name, backend, v)
    into = ops.capture(q, k, v, map_format=name, backend="triton")[1]
    nbytes = ops.workspace_bytes(name, into.shape, v.device, v.dtype, d)
    workspace = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    stored = (into.storage, 1024, v, name)
    out = ops.reuse_into(*stored, None, backend, workspace)
    torch.cuda.synchronize()

    def allocations():
        return torch.cuda.memory_stats()["allocation.all.allocated"]

    torch.cuda.set_sync_debug_mode("error")
    try:
        before = allocations()
        ops.reuse_into(*stored, out, backend, workspace)
        assert allocations() == before
        ops.capture(q, k, v, into=into, backend="triton")
        assert allocations() == before + 1
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("name", "backend"), REUSES)
@pytest.mark.parametrize("shape", [(2, 4, 300, 300, 40), (4, 16, 1024, 700, 64)])  # few blocks, and many
def test_cuda_graphs_replay_capture_and_reuse_on_new_values(name, backend, shape):
    q, k, v = inputs(shape)
    skip_unserved(name, backend, v)
    into = ops.capture(q, k, v, map_format=name, backend="triton")[1]
    out = ops.reuse(into, v, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        exact = ops.capture(q, k, v, into=into, backend="triton")[0]
        ops.reuse(into, v, out=out, backend=backend)
    for x, fresh in zip((q, k, v), inputs(shape), strict=True):
        x.copy_(fresh)
    graph.replay()
    expected, attn_map = ops.capture(q, k, v, map_format=name, backend="triton")
    assert torch.equal(exact, expected)
    assert torch.equal(out, ops.reuse(attn_map, v, backend=backend))


@pytest.mark.parametrize(("name", "backend"), REUSES)
def test_values_may_start_at_any_address(name, backend):
    shape = (2, 3, 150, 300, 64)
    q, k, v = inputs(shape)
    skip_unserved(name, backend, v)
    attn_map = ops.capture(q, k, v, map_format=name, backend="triton")[1]
    flat = torch.empty(v.numel() + 1, device="cuda", dtype=torch.float16)
    odd = flat[1:].view(v.shape).copy_(v)
    assert torch.equal(ops.reuse(attn_map, odd, backend=backend), ops.reuse(attn_map, v, backend=backend))


@pytest.mark.parametrize(("name", "backend"), REUSES)
def test_more_heads_than_a_grid_has_along_its_second_axis(name, backend):
    shape = (700, 100, 3, 5, 64)
    q, k, v = inputs(shape)
    skip_unserved(name, backend, v)
    out, attn_map = ops.capture(q, k, v, map_format=name, backend="triton")
    again = ops.reuse(attn_map, v, backend=backend)
    expected = (q.double() @ k.double().mT * 64**-0.5).softmax(-1) @ v.double()
    assert (out.double() - expected).norm() / expected.norm() < 2e-3
    assert (again.double() - expected).norm() / expected.norm() < FORMATS[name].error + 2e-3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second device")
@pytest.mark.parametrize(("name", "backend"), REUSES)
def test_tensors_on_a_device_that_is_not_the_current_one(name, backend):
    q, k, v = (x.to("cuda:1") for x in inputs((1, 2, 150, 300, 64)))
    skip_unserved(name, backend, v)
    attn_map = ops.capture(q, k, v, map_format=name, backend="triton")[1]
    out = ops.reuse(attn_map, v, backend=backend)
    expected = attn_map.dense().double() @ v.double()
    assert (out.double() - expected).norm() / expected.norm() < FORMATS[name].error + 2e-3
    assert torch.cuda.current_device() == 0


def test_compiled_graphs_read_maps_where_they_lie():
    """CUDA graphs of the compiler copy what they do not know to stay to inputs of their own, in every call."""
    pipe = random_pipeline().to("cuda", torch.float16)
    policy = attnreuse.hurry(8, 4, None)
    with attnreuse.enable(pipe, policy) as session:
        expected = sample(pipe, 8, height=256, width=256)
        maps = session.report().allocated_bytes
    torch._dynamo.reset()
    pipe.unet = torch.compile(pipe.unet, mode="reduce-overhead")
    with attnreuse.enable(pipe, policy):
        sample(pipe, 8, height=256, width=256)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        actual = sample(pipe, 8, height=256, width=256)
    grown = torch.cuda.max_memory_allocated() - before
    assert (actual - expected).norm() / expected.norm() < 2e-2
    assert grown < 1.5 * maps  # the maps themselves, and no second ones


def test_ops_compile_with_inductor():
    q, k, v = inputs((1, 2, 128, 77, 64))

    def both(q, k, v):
        out, attn_map = ops.capture(q, k, v)
        return out + 1, ops.reuse(attn_map, 2 * v)

    for actual, expected in zip(torch.compile(both, fullgraph=True)(q, k, v), both(q, k, v), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-3)


def test_a_map_of_more_than_2_31_elements():
    m, n, d = 34_000, 65_536, 64
    q, k, v = inputs((1, 1, m, n, d))
    out, attn_map = ops.capture(q, k, v, backend="triton")
    again = ops.reuse(attn_map, v, backend="triton")
    last = slice(m - 100, m)
    expected = (q[:, :, last].double() @ k.double().mT * d**-0.5).softmax(-1) @ v.double()
    for x in (out, again):
        assert (x[:, :, last].double() - expected).norm() / expected.norm() < FORMATS["u8"].error + 2e-3


def test_a_half_precision_run_uses_the_kernels_without_a_warning():
    pipe = random_pipeline().to("cuda", torch.float16)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="attnreuse")
        with attnreuse.enable(pipe, attnreuse.hurry(6, 3, None), strict=True) as session:
            first, second = (sample(pipe, 6) for _ in range(2))
    assert torch.equal(first, second)
    assert session.report().allocated_bytes == session.report().predicted_bytes > 0
