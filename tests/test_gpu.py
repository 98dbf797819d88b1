"""What the CPU tests hold, held on a CUDA device: values, a whole run, no stray allocation."""

import pytest
import torch
from tiny_random import random_pipeline, sample

import attnreuse
from attnreuse import ops
from attnreuse.formats import FORMATS

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
    with attnreuse.enable(pipe, attnreuse.hurry(6, 3)) as session:
        first, second = sample(pipe, 6), sample(pipe, 6)
    assert torch.equal(first, second)
    assert (first - full).norm() / full.norm() < 0.05
    assert session.report().allocated_bytes == session.report().predicted_bytes > 0


def test_maps_are_given_back_at_the_end_of_a_run():
    pipe = random_pipeline().to("cuda")
    with attnreuse.enable(pipe, attnreuse.hurry(4, 2), map_format="fp32"):
        sample(pipe, 4, height=128, width=128)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        sample(pipe, 4, height=128, width=128)
        torch.cuda.synchronize()
        assert abs(torch.cuda.memory_allocated() - before) < 1 << 20
