"""capture and reuse against an fp64 oracle: every format, odd shapes, strides, masks, peaky and flat rows."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fp64 import error, oracle
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from attnreuse import AttentionMap, native, ops
from attnreuse.backends import plain
from attnreuse.maps.formats import BLOCK, FORMATS

SHAPES = [  # B, H, M, N, D
    (1, 1, 1, 1, 16),
    (2, 2, 63, 77, 40),
    (1, 3, 111, 129, 80),
    (1, 2, 64, 256, 160),
    (1, 1, 33, 1024, 64),
    (1, 1, 17, 4096, 40),
]
PEAKS = {"flat": 1.0, "peaky": 4.0}
NATIVE_ERROR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of rounding the output


@pytest.fixture(params=["torch", *native.PATHS], autouse=True)
def path(request, monkeypatch):
    """Every CPU implementation in turn: plain torch, and each instruction set that the extension has here."""

    def chosen(map_format, *call):
        return "torch" if native.unserved(FORMATS[map_format], *call) else "native"

    monkeypatch.setattr(ops, "backend_for", (lambda *call: "torch") if request.param == "torch" else chosen)
    if request.param != "torch":
        monkeypatch.setenv("ATTNREUSE_CPU", request.param)
    ops._chosen.cache_clear()
    yield request.param
    ops._chosen.cache_clear()


def tensors(shape, peak=1.0, dtype=torch.float32, seed=0):
    b, h, m, n, d = shape
    g = torch.Generator().manual_seed(seed)
    sizes = ((b, h, m, d), (b, h, n, d), (b, h, n, d))
    q, k, v = (torch.randn(*size, generator=g) for size in sizes)
    return (q * peak).to(dtype), k.to(dtype), v.to(dtype)


def plain_error(q, k, v, expected):
    """Error of plain torch in the same dtype."""
    return error(((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)) @ v, expected)


@pytest.mark.parametrize("peak", PEAKS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_errors_stay_within_the_budget(name, shape, peak):
    q, k, v = tensors(shape, PEAKS[peak])
    p, expected = oracle(q, k, v)
    budget = 2 * plain_error(q, k, v, expected) + 1e-7
    out, attn_map = ops.capture(q, k, v, map_format=name)
    assert error(out, expected) <= budget  # exact, whatever the map's format
    assert error(ops.reuse(attn_map, v), expected) <= budget + FORMATS[name].error
    assert attn_map.dense().shape == p.shape


@pytest.mark.parametrize("peak", PEAKS)
@pytest.mark.parametrize("name", FORMATS)
def test_each_element_is_within_the_documented_rounding(name, peak):
    q, k, v = tensors((1, 2, 63, 300, 40), PEAKS[peak])
    p, _ = oracle(q, k, v)
    _, attn_map = ops.capture(q, k, v, map_format=name)
    scale = torch.ones_like(p)
    if attn_map.format.scaled:
        per_block = (attn_map.block_max.double() - attn_map.lse.double()[..., None]).exp2()
        scale = per_block.repeat_interleave(BLOCK, -1)[..., :300]
    t = (p / scale).sqrt() if attn_map.format.root else p / scale
    allowed = scale * attn_map.format.element_error(t) + 1e-5 * p  # the last for fp32 arithmetic
    assert ((attn_map.dense() - p).abs() <= allowed).all()


@pytest.mark.parametrize("name", ["fp16", "u8", "u7", "u4"])
def test_documented_error_is_reached_not_padded(name):
    """The figure in `formats.py` is tight to a factor of two, so that it informs."""
    q, k, v = tensors((1, 4, 64, 1024, 64))
    _, expected = oracle(q, k, v)
    out = ops.reuse(ops.capture(q, k, v, map_format=name)[1], v)
    assert FORMATS[name].error / 4 <= error(out, expected) <= FORMATS[name].error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_half_precision_inputs(name, dtype):
    q, k, v = tensors((2, 2, 63, 77, 40), dtype=dtype)
    _, expected = oracle(q, k, v)
    out, attn_map = ops.capture(q, k, v, map_format=name)
    again = ops.reuse(attn_map, v)
    assert out.dtype == again.dtype == dtype
    budget = 2 * NATIVE_ERROR[dtype]
    assert error(out, expected) <= budget
    assert error(again, expected) <= budget + FORMATS[name].error


def test_same_step_reuse_of_an_fp32_map_is_exact_to_rounding():
    q, k, v = tensors((2, 4, 111, 111, 40))
    out, attn_map = ops.capture(q, k, v, map_format="fp32")
    torch.testing.assert_close(ops.reuse(attn_map, v), out, rtol=0, atol=1e-6)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=0, atol=2e-6)


def test_reuse_applies_the_map_to_fresh_values_of_another_head_dim():
    q, k, v = tensors((1, 2, 63, 77, 40))
    p, _ = oracle(q, k, v)
    fresh = torch.randn(1, 2, 77, 24)
    _, attn_map = ops.capture(q, k, v, map_format="fp32")
    assert error(ops.reuse(attn_map, fresh), p @ fresh.double()) < 1e-6


@pytest.mark.parametrize("name", FORMATS)
def test_strided_inputs_and_output(name):
    q, k, v = tensors((2, 3, 65, 77, 40))
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    strided.append(torch.stack((v, v), dim=-1)[..., 0])
    out, attn_map = ops.capture(q, k, v, map_format=name)
    out_strided, map_strided = ops.capture(*strided, map_format=name)
    torch.testing.assert_close(out_strided, out, rtol=0, atol=1e-6)
    into = torch.empty(2, 65, 3, 40).transpose(1, 2)
    assert ops.reuse(map_strided, strided[2], out=into) is into
    torch.testing.assert_close(into, ops.reuse(attn_map, v), rtol=0, atol=2e-2 if name in ("u4", "u7") else 2e-3)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["bool", "additive", "per key", "fp16"])
def test_masks(kind, name):
    q, k, v = tensors((2, 2, 63, 200, 40))
    allowed = torch.rand(2, 1, 63, 200, generator=torch.Generator().manual_seed(1)) > 0.5
    allowed[0, 0, 5] = False  # a row with every key masked
    allowed[1, 0, :, :140] = False  # the whole first block
    mask = {
        "bool": allowed,
        "additive": torch.where(allowed, 0.5, -math.inf),
        "per key": torch.where(allowed[:, :, :1], 0.0, torch.finfo(torch.float32).min),
        "fp16": torch.where(allowed, 0.0, -1e4).half(),
    }[kind]
    p, expected = oracle(q, k, v, mask)
    out, attn_map = ops.capture(q, k, v, mask=mask, map_format=name)
    assert error(out, expected) < 1e-6
    assert error(ops.reuse(attn_map, v), expected) <= FORMATS[name].error + 1e-6
    assert (attn_map.dense()[p == 0] == 0).all()
    if kind in ("bool", "additive"):
        assert (out[0, :, 5] == 0).all()


def test_mask_and_scale_agree_with_sdpa():
    q, k, v = tensors((2, 2, 63, 77, 40))
    mask = torch.randn(63, 77)
    out, _ = ops.capture(q, k, v, mask=mask, scale=0.3)
    torch.testing.assert_close(
        out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3), rtol=0, atol=4e-6
    )


@pytest.mark.parametrize("heads", [2, 0.3, 0.01], ids=["two heads", "a third of a head", "one query"])
@pytest.mark.parametrize("name", FORMATS)
def test_large_maps_go_in_pieces_and_agree_with_one_piece(name, heads, monkeypatch):
    q, k, v = tensors((3, 4, 50, 60, 16))
    whole = ops.capture(q, k, v, map_format=name)
    monkeypatch.setattr(plain, "SLICE_BYTES", int(heads * 4 * 50 * 60))
    sliced = ops.capture(q, k, v, map_format=name)
    torch.testing.assert_close(sliced[0], whole[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(ops.reuse(sliced[1], v), ops.reuse(whole[1], v), rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", FORMATS)
def test_identical_bits_run_to_run(name):
    q, k, v = tensors((2, 2, 63, 77, 40))
    first, second = (ops.capture(q, k, v, map_format=name) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1].codes, second[1].codes)
    assert torch.equal(ops.reuse(first[1], v), ops.reuse(second[1], v))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_every_byte_of_the_map_is_accounted_for(name, shape):
    b, h, m, n, _ = shape
    attn_map = AttentionMap.empty(FORMATS[name], (b, h, m, n), torch.device("cpu"))
    used = sum(part.numel() * part.element_size() for part in (attn_map.codes, attn_map.block_max, attn_map.lse))
    assert attn_map.nbytes == attn_map.storage.numel()
    assert used == sum(FORMATS[name].parts((b, h, m, n))) <= attn_map.nbytes < used + 3 * 256
    assert FORMATS[name].nbytes((1, 1, 4096, 4096)) / (4096 * 4096) < FORMATS[name].bits / 8 + 0.04


@pytest.mark.parametrize("name", ["fp32", "u8", "u4"])
def test_ops_pass_opcheck(name):
    q, k, v = tensors((1, 2, 5, 7, 16))
    storage = ops.capture(q, k, v, map_format=name)[1].storage
    mask = torch.ones(5, 7, dtype=torch.bool)
    torch.library.opcheck(
        torch.ops.attnreuse.capture, (q, k, v, mask, 0.25, name, "torch", storage, torch.zeros_like(q))
    )
    torch.library.opcheck(torch.ops.attnreuse.reuse, (storage, 5, v, name, "torch", torch.zeros_like(q)))


def test_a_wanted_gradient_is_refused_not_lost():
    q, k, v = tensors((1, 2, 5, 7, 16))
    attn_map = ops.capture(q, k, v)[1]
    weights = v.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"value requires a gradient, .* torch\.no_grad"):
        ops.capture(q, k, weights)
    with pytest.raises(RuntimeError, match="value requires a gradient"):
        ops.reuse(attn_map, weights)
    with torch.no_grad():
        assert torch.equal(ops.reuse(attn_map, weights), ops.reuse(attn_map, v))


def test_the_storage_of_a_map_starts_where_kernels_can_load_it():
    q, k, v = tensors((1, 2, 33, 77, 40))
    map_format, shape = FORMATS["u8"], (1, 2, 33, 77)
    buffer = torch.empty(map_format.nbytes(shape) + 32, dtype=torch.uint8)
    start = -buffer.data_ptr() % 16
    for off in (0, 4, 8):
        attn_map = AttentionMap.view(map_format, shape, buffer[start + off :][: map_format.nbytes(shape)])
        calls = (partial(ops.capture, q, k, v, into=attn_map), partial(ops.reuse, attn_map, v))
        for call in calls if off else ():
            with pytest.raises(ValueError, match=f"start at a multiple of 16 bytes, got an address {off} bytes past"):
                call()
        if not off:
            assert torch.equal(calls[0]()[0], ops.capture(q, k, v)[0])


def test_ops_compile_without_graph_breaks():
    q, k, v = tensors((1, 2, 33, 77, 40))
    into = AttentionMap.empty(FORMATS["u8"], (1, 2, 33, 77), torch.device("cpu"))

    def both(q, k, v, fresh):
        out, attn_map = ops.capture(q, k, v, into=into)
        return out, ops.reuse(attn_map, fresh)

    expected = both(q, k, v, 2 * v)
    actual = torch.compile(both, fullgraph=True, backend="aot_eager")(q, k, v, 2 * v)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize(
    ("change", "raised", "said"),
    [
        ({"query": torch.zeros(2, 3, 4)}, ValueError, r"query must be \[B, H, N, D\], got \[2, 3, 4\]"),
        ({"key": torch.zeros(1, 2, 7, 8)}, ValueError, r"key must be \[1, 2, N, 16\], got \[1, 2, 7, 8\]"),
        ({"value": torch.zeros(1, 2, 9, 16)}, ValueError, r"value must be \[1, 2, 7, D\], got \[1, 2, 9, 16\]"),
        ({"value": torch.zeros(1, 2, 7, 16).half()}, ValueError, "value must be torch.float32 on cpu like query"),
        (
            {"query": torch.zeros(1, 2, 5, 16).double()},
            TypeError,
            "must be fp32, fp16 or bf16, got torch.float64",
        ),
        ({"query": torch.zeros(1, 2, 5, 300)}, ValueError, "head dim <= 256"),
        ({"query": torch.zeros(1, 2, 0, 16)}, ValueError, "non-empty"),
        ({"mask": torch.ones(5, 9)}, ValueError, r"mask must broadcast to .* \[1, 2, 5, 7\], got \[5, 9\]"),
        ({"mask": torch.ones(5, 7, dtype=torch.int64)}, TypeError, "mask must be bool or floating"),
        ({"map_format": "u2"}, ValueError, "map_format must be one of fp32, fp16, bf16, u8, u7, u4, got 'u2'"),
        ({"backend": "tpu"}, ValueError, "backend must be one of triton, native, torch, got 'tpu'"),
        ({"backend": "native", "map_format": "bf16"}, ValueError, "backend 'native' cannot serve this call"),
    ],
)
def test_bad_input_is_refused_with_expected_and_actual(change, raised, said):
    given = {"query": torch.zeros(1, 2, 5, 16), "key": torch.zeros(1, 2, 7, 16), "value": torch.zeros(1, 2, 7, 16)}
    given.update(change)
    with pytest.raises(raised, match=said):
        ops.capture(given.pop("query"), given.pop("key"), given.pop("value"), **given)


def test_a_map_or_output_of_the_wrong_shape_is_refused():
    q, k, v = tensors((1, 2, 5, 7, 16))
    other = AttentionMap.empty(FORMATS["u8"], (1, 2, 5, 8), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"the map must stand for .* \[1, 2, 5, 7\], got \[1, 2, 5, 8\]"):
        ops.capture(q, k, v, into=other)
    _, attn_map = ops.capture(q, k, v)
    with pytest.raises(ValueError, match=r"value must be \[1, 2, 7, D\], got \[1, 2, 8, 16\]"):
        ops.reuse(attn_map, torch.zeros(1, 2, 8, 16))
    with pytest.raises(ValueError, match=r"out must be \[1, 2, 5, 16\]"):
        ops.reuse(attn_map, v, out=torch.zeros(1, 2, 7, 16))


@pytest.mark.parametrize("kernel", ops.NAMED)
def test_a_cuda_kernel_named_for_a_cpu_is_refused(kernel):
    q, k, v = tensors((1, 2, 5, 7, 16))
    _, attn_map = ops.capture(q, k, v)
    with pytest.raises(ValueError, match=f"backend '{kernel}' cannot serve .* needs a CUDA device, this is cpu"):
        ops.reuse(attn_map, v, backend=kernel)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_nothing_is_written_beside_the_slot_and_the_output(name, shape):
    q, k, v = tensors(shape)
    b, h, m, n, d = shape
    nbytes, guard = FORMATS[name].nbytes((b, h, m, n)), 4096
    buffer = torch.full((nbytes + 2 * guard,), 170, dtype=torch.uint8)
    into = AttentionMap.view(FORMATS[name], (b, h, m, n), buffer[guard : guard + nbytes])
    around = torch.full((b, h, m, d + 8), 7.0)
    ops.capture(q, k, v, into=into)
    ops.reuse(into, v, out=around[..., 4:-4])
    assert (buffer[:guard] == 170).all()
    assert (buffer[guard + nbytes :] == 170).all()
    assert (around[..., :4] == 7).all()
    assert (around[..., -4:] == 7).all()
    assert around.isfinite().all()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", ["fp32", "fp16", "u8", "u7", "u4"])
def test_the_number_of_threads_changes_no_bit_of_the_kernels(name, threads, path):
    if path == "torch":
        pytest.skip("torch's products depend on its threads")
    q, k, v = tensors((2, 2, 111, 300, 40))
    before, (out, attn_map) = torch.get_num_threads(), ops.capture(q, k, v, map_format=name)
    try:
        torch.set_num_threads(threads)
        again, other = ops.capture(q, k, v, map_format=name)
        assert torch.equal(again, out)
        assert torch.equal(other.codes, attn_map.codes)
        assert torch.equal(ops.reuse(other, v), ops.reuse(attn_map, v))
    finally:
        torch.set_num_threads(before)


def rounded_values(v, name):
    """Largest step that reuse on a CPU rounds values to: ``[B, H, 1, Dv]``."""
    if name not in native.VALUE_BITS:
        return torch.zeros(1, 1, 1, 1)
    return v.abs().amax(dim=-2, keepdim=True) / (2 ** (native.VALUE_BITS[name] - 1) - 1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.tuples(*(st.integers(1, most) for most in (2, 3, 70, 300, 96, 96))),
    st.sampled_from(["fp32", "fp16", "u8", "u7", "u4"]),
    st.permutations(range(4)),
    st.integers(0, 3),
)
@example((2, 2, 24, 24, 3, 7), "u8", [3, 1, 2, 0], 3)  # a row that is nearly one key
def test_any_shape_stride_and_offset(sizes, name, order, offset):
    b, h, m, n, d, dv = sizes
    g = torch.Generator().manual_seed(m * n + d)

    def strided(*shape):
        """A view of `shape` whose axes lie in memory in `order`, every second element, from `offset` on."""
        flat = torch.randn(2 * math.prod(shape) + offset, generator=g)[offset::2][: math.prod(shape)]
        inverse = [order.index(axis) for axis in range(4)]
        return flat.view([shape[axis] for axis in order]).permute(inverse)

    q, k, v = strided(b, h, m, d), strided(b, h, n, d), strided(b, h, n, dv)
    p, expected = oracle(q, k, v)
    size = p @ v.double().abs()  # of the terms: sums may cancel
    out, attn_map = ops.capture(q, k, v, map_format=name)
    assert ((out - expected).abs() <= 1e-5 * size).all()
    held = attn_map.dense().double()
    allowed = 1e-5 * size + held.sum(-1, keepdim=True) * 0.5 * rounded_values(v, name)
    if name == "u8":  # a square of a code is rounded to a multiple of 4, of 255^2 that stand for the block's maximum
        allowed += 2 / 255**2 * held.amax(-1, keepdim=True) * v.double().abs().sum(-2, keepdim=True)
    assert ((ops.reuse(attn_map, v) - held @ v.double()).abs() <= allowed).all()


@pytest.mark.parametrize("name", FORMATS)
def test_a_query_or_key_that_is_not_a_number_reaches_the_output(name):
    q, k, v = tensors((1, 2, 7, 300, 16))
    q[0, 0, 3, 5] = math.nan
    k[0, 1, 200, 0] = math.nan
    out, attn_map = ops.capture(q, k, v, map_format=name)
    for found in (out, ops.reuse(attn_map, v)):
        assert found[0, 0, 3].isnan().all()
        assert found[0, 0, [0, 1, 2, 4, 5, 6]].isfinite().all()
        assert found[0, 1].isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", FORMATS)
def test_a_value_that_is_not_finite_reaches_the_output(name, bad):
    q, k, v = tensors((1, 1, 7, 300, 16))
    _, attn_map = ops.capture(q, k, v, map_format=name)
    v[0, 0, 200, 3] = bad
    out = ops.reuse(attn_map, v)
    assert not out[..., 3].isfinite().any()
    assert out[..., [*range(3), *range(4, 16)]].isfinite().all()


@pytest.mark.parametrize("peak", PEAKS)
@pytest.mark.parametrize("start", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["u8", "u7", "u4"])
def test_a_converted_map_reuses_as_if_captured_so(name, start, peak):
    q, k, v = tensors((2, 2, 63, 300, 40), PEAKS[peak])
    _, expected = oracle(q, k, v)
    source = ops.capture(q, k, v, map_format=start)[1]
    before = source.storage.clone()
    made = ops.convert(source, name)
    assert made.format.name == name
    assert error(ops.reuse(made, v), expected) <= FORMATS[name].error + FORMATS[start].error
    assert torch.equal(source.storage, before)
    with pytest.raises(ValueError, match=f"convert goes from fp16 or bf16 to u8, u7 or u4, got {name} to u8"):
        ops.convert(made, "u8")


@pytest.mark.parametrize("name", FORMATS)
def test_drift_is_the_distance_of_the_maps(name, monkeypatch):
    monkeypatch.setattr(plain, "SLICE_BYTES", 4 * 50 * 300)
    first, second = (ops.capture(*tensors((2, 2, 63, 300, 40), seed=seed), map_format=name)[1] for seed in (0, 1))
    off = first.dense().double() - second.dense().double()
    variation, distance = ops.drift(first, second)
    torch.testing.assert_close(variation.double(), off.abs().sum(-1) / 2, rtol=1e-5, atol=0)
    torch.testing.assert_close(distance.double(), off.norm(dim=-1), rtol=1e-5, atol=0)
    assert (variation <= 1 + FORMATS[name].error).all()
    assert not any(x.any() for x in ops.drift(first, first))
    other = AttentionMap.empty(FORMATS["u8" if name != "u8" else "u4"], first.shape, torch.device("cpu"))
    with pytest.raises(ValueError, match=f"both maps must be {name} maps"):
        ops.drift(first, other)


def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch):
    if native.extension is None:
        pytest.skip("the extension was not built")
    monkeypatch.setenv("ATTNREUSE_CPU", "sse9")
    q, k, v = tensors((1, 1, 3, 3, 8))
    with pytest.raises(ValueError, match="ATTNREUSE_CPU must be one of"):
        ops.capture(q, k, v, backend="native")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_torchs_default_type_does_not_matter(dtype):
    q, k, v = (torch.randn(2, 3, 65, 40) for _ in range(3))
    mask = torch.rand(1, 1, 65, 65) > 0.2
    outs = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            out, attn_map = ops.capture(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask=mask)
            outs.append((out, ops.reuse(attn_map, v), *ops.drift(attn_map, attn_map)))
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
