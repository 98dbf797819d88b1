"""The Triton kernels against an fp64 oracle: on a CUDA device where there is one, else interpreted."""

import itertools
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from fp64 import error, oracle
from tiny_random import random_pipeline, sample

import attnreuse
from attnreuse import AttentionMap, ops
from attnreuse.kernels import backend, tiles
from attnreuse.maps.formats import FORMATS

pytest.importorskip("triton", reason="triton is not installed")
from attnreuse.kernels import capture as capture_kernel
from attnreuse.kernels import reuse as reuse_kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCALED = ["fp16", "bf16", "u8", "u7", "u4"]
HEAD_DIMS = [40, 64, 72, 80, 96, 128, 160]
CASES = [(1, 1, 1), (63, 77, 4), (111, 300, 1), (128, 256, 4)]  # M, N, factor of q: flat and peaky rows


def tensors(b, h, m, n, d, dtype=torch.float16, peak=1.0, seed=0):
    """q, k, v as diffusers hands them over: views [B, H, N, D] of [B, N, H, D]."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, length, h, d, generator=g) for length in (m, n, n))
    return tuple(x.to(DEVICE, dtype).transpose(1, 2) for x in (q * peak, k, v))


def budget(q, k, v, mask=None):
    """Twice the error of plain torch in the same dtype (its products in fp32 on the CPU, as on tensor cores)."""
    p, expected = oracle(q, k, v, mask)
    scores = (q.float() @ k.float().mT * q.shape[-1] ** -0.5).to(q.dtype).float()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.float()
    plain = scores.softmax(-1).nan_to_num(0.0).to(q.dtype).float() @ v.float()
    return p, expected, 2 * error(plain.to(q.dtype), expected) + 1e-6


def poisoned(name, shape, v):
    """A map full of 255s and an output full of NaN."""
    into = AttentionMap.empty(FORMATS[name], shape, DEVICE)
    into.storage.fill_(255)
    return into, torch.full((*shape[:3], v.shape[-1]), math.nan, dtype=v.dtype, device=DEVICE)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("name", SCALED)
def test_errors_stay_within_the_budget(name, d, case):
    """Outputs exact, maps within the documented error, every element written, the same bits again."""
    m, n, peak = case
    q, k, v = tensors(1, 2, m, n, d, peak=peak)
    p, expected, allowed = budget(q, k, v)
    into, fresh = poisoned(name, tuple(p.shape), v)
    out, attn_map = ops.capture(q, k, v, into=into, backend="triton")
    assert error(out, expected) <= allowed
    assert error(ops.reuse(attn_map, v, out=fresh, backend="triton"), expected) <= allowed + FORMATS[name].error
    again, second = ops.capture(q, k, v, map_format=name, backend="triton")
    assert torch.equal(again, out)
    assert torch.equal(second.codes, attn_map.codes)
    assert torch.equal(second.lse, attn_map.lse)


@pytest.mark.parametrize("name", SCALED)
def test_bf16_inputs(name):
    q, k, v = tensors(2, 2, 63, 200, 64, torch.bfloat16)
    _, expected, allowed = budget(q, k, v)
    out, attn_map = ops.capture(q, k, v, map_format=name, backend="triton")
    assert error(out, expected) <= allowed
    assert error(ops.reuse(attn_map, v, backend="triton"), expected) <= allowed + FORMATS[name].error


@pytest.mark.parametrize("name", SCALED)
def test_the_map_is_the_one_the_reference_writes(name):
    """Block maxima and log-sum-exp to rounding; codes at most one step apart, where a score rounds another way."""
    q, k, v = tensors(2, 3, 65, 300, 40)
    attn_map = ops.capture(q, k, v, map_format=name, backend="triton")[1]
    expected = ops.capture(q, k, v, map_format=name, backend="torch")[1]
    torch.testing.assert_close(attn_map.block_max, expected.block_max, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(attn_map.lse, expected.lse, rtol=1e-5, atol=1e-4)
    p, _ = oracle(q, k, v)
    scale = (attn_map.block_max - attn_map.lse[..., None]).exp2().double().repeat_interleave(128, -1)[..., :300]
    t = (p / scale).clamp(0, 1).sqrt() if attn_map.format.root else p / scale
    step = attn_map.format.element_error(t) * (2.1 if attn_map.format.root else 1) + 1e-3 * t
    assert ((attn_map.dense() - p).abs() <= scale * step + 1e-5).all()


@pytest.mark.parametrize("name", SCALED)
def test_maps_pass_between_backends(name):
    """What one backend captures another reuses: the layout is one."""
    q, k, v = tensors(1, 2, 63, 200, 80)
    _, expected, allowed = budget(q, k, v)
    for capturing, reusing in itertools.permutations(("triton", "torch"), 2):
        attn_map = ops.capture(q, k, v, map_format=name, backend=capturing)[1]
        out = ops.reuse(attn_map, v, backend=reusing)
        assert error(out, expected) <= allowed + FORMATS[name].error


@pytest.mark.parametrize("op", ["capture", "reuse"])
def test_any_number_of_heads_can_be_launched(op):
    """CUDA's grids end at 65,535 but along their first axis."""
    b, h, m, d = 700, 100, 130, 40
    with torch.device("meta"):
        q, out = torch.empty(b, h, m, d, dtype=torch.float16), torch.empty(b, h, m, d, dtype=torch.float16)
        attn_map = AttentionMap.empty(FORMATS["u8"], (b, h, m, m), torch.device("meta"))
    if op == "capture":
        launch = capture_kernel.launch(q, q, q, None, d**-0.5, attn_map, out, 90)
    else:
        launch = reuse_kernel.launch(attn_map, q, out, 90)
    assert launch.grid[0] == b * h * 2
    assert all(size < 1 << 16 for size in launch.grid[1:])


def layouts(x):
    """The same values BHND and contiguous, as a slice of a fused projection, and with strided columns."""
    fused = torch.cat([x.transpose(1, 2).flatten(2)] * 3, dim=-1)  # [B, N, 3 H D]
    width = x.shape[1] * x.shape[3]
    yield x.contiguous()
    yield fused[..., width : 2 * width].unflatten(-1, x.shape[1::2]).transpose(1, 2)
    yield torch.stack((x, x), dim=-1)[..., 0]


@pytest.mark.parametrize("d", [40, 80])
@pytest.mark.parametrize("layout", range(3), ids=["contiguous", "fused", "columns"])
def test_strides_are_read_in_place(layout, d):
    q, k, v = tensors(2, 3, 65, 200, d)
    out, attn_map = ops.capture(q, k, v, backend="triton")
    views = [list(layouts(x))[layout] for x in (q, k, v)]
    again, same = ops.capture(*views, backend="triton")
    assert torch.equal(again, out)
    assert torch.equal(same.codes, attn_map.codes)
    into = torch.full((2, 65, 3, d), math.nan, dtype=q.dtype, device=DEVICE).transpose(1, 2)
    assert torch.equal(ops.reuse(same, views[2], out=into, backend="triton"), ops.reuse(attn_map, v, backend="triton"))


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("kind", ["bool", "additive", "per key", "fp16", "lowest"])
def test_masks(kind, name):
    q, k, v = tensors(2, 2, 63, 200, 40)
    allowed = torch.rand(2, 1, 63, 200, generator=torch.Generator().manual_seed(1)) > 0.5
    allowed[0, 0, 5] = False  # a row with every key masked
    allowed[1, 0, :, :140] = False  # the whole first block
    mask = {
        "bool": allowed,
        "additive": torch.where(allowed, 0.5, -math.inf),
        "per key": torch.where(allowed[:, :, :1], 0.0, torch.finfo(torch.float32).min),
        "fp16": torch.where(allowed, 0.0, -1e4).half(),
        "lowest": torch.full((1, 1, 1, 200), torch.finfo(torch.float16).min).half(),  # as no mask at all
    }[kind].to(DEVICE)
    p, expected, most = budget(q, k, v, mask)
    out, attn_map = ops.capture(q, k, v, mask=mask, map_format=name, backend="triton")
    assert error(out, expected) <= most
    assert error(ops.reuse(attn_map, v, backend="triton"), expected) <= most + FORMATS[name].error
    if kind in ("bool", "additive"):
        assert (out[0, :, 5] == 0).all()
        assert (attn_map.dense()[p == 0] == 0).all()


def test_values_of_another_head_dim_scales_and_masked_scores():
    q, k, _ = tensors(1, 2, 63, 77, 40)
    other = tensors(1, 2, 63, 77, 96, seed=3)[2]
    for scale in (0.3, -0.3, 0.0):
        p, expected = oracle(q, k, other, scale=scale)
        out, attn_map = ops.capture(q, k, other, scale=scale, backend="triton")
        assert error(out, expected) < 2e-3
        assert error(attn_map.dense(), p) < FORMATS["u8"].error + 1e-3


def test_large_values_do_not_overflow():
    """fp16's largest codes are 65025 after squaring; V of 1000 times more still sums in fp32."""
    q, k, v = tensors(1, 1, 64, 256, 64)
    v = v * 1000
    _, expected = oracle(q, k, v)
    out = ops.reuse(ops.capture(q, k, v, backend="triton")[1], v, backend="triton")
    assert error(out, expected) < FORMATS["u8"].error + 2e-3


def test_rows_behind_2_31_elements_are_addressed(tmp_path):
    """Keys and values whose rows lie 2^24 elements apart, in a sparse file."""
    if DEVICE.type == "cuda":
        pytest.skip("needs 14 GB of device memory; test_gpu.py has a map of that size")
    n, d, apart = 200, 16, 1 << 24
    file = np.memmap(tmp_path / "sparse", np.float16, "w+", shape=(n * apart,))
    far = torch.from_numpy(file).as_strided((1, 1, n, d), (0, 0, apart, 1))
    q, k, _ = tensors(1, 1, 5, n, d)
    far.copy_(k)
    out, attn_map = ops.capture(q, far, far, backend="triton")
    assert torch.equal(out, ops.capture(q, k, k, backend="triton")[0])
    assert torch.equal(ops.reuse(attn_map, far, backend="triton"), ops.reuse(attn_map, k, backend="triton"))


def rounded(v):
    """Values as the direct product has them: a scale per head and column, 127 levels either way."""
    limit = v.double().abs().amax(2, keepdim=True)
    return (v.double() * 127 / limit + 0.5).floor() * limit / 127


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_the_direct_product_is_that_of_integers(d, dtype):
    """More keys than the pass before it takes at once; bits do not depend on whose memory it works in."""
    q, k, v = tensors(1, 2, 65, 700, d, dtype)
    attn_map = ops.capture(q, k, v, map_format="u7", backend="triton")[1]
    out = ops.reuse(attn_map, v, backend="triton")
    off = error(out, attn_map.dense().double() @ rounded(v))
    assert off < (2e-3 if dtype == torch.float16 else 8e-3)  # values between two levels may round either way
    nbytes = ops.workspace_bytes("u7", attn_map.shape, DEVICE, dtype, d)
    workspace = torch.full((nbytes + 16,), 255, dtype=torch.uint8, device=DEVICE)
    stored = (attn_map.storage, 65, v, "u7", None, "triton")
    assert torch.equal(ops.reuse_into(*stored, workspace=workspace[:nbytes]), out)
    assert (workspace[nbytes:] == 255).all()
    assert ops.workspace_bytes("u8", attn_map.shape, DEVICE, dtype, d) == 0


def test_a_run_works_in_memory_that_its_ring_owns():
    """No allocation for the values as integers: what is planned for them is in the buffer."""
    pipe = random_pipeline()
    pipe.to(DEVICE, torch.float16)
    with attnreuse.enable(pipe, attnreuse.hurry(4, 2), map_format="u7", strict=True) as session:
        first, second = sample(pipe, 4), sample(pipe, 4)
    report = session.report()
    assert torch.equal(first, second)
    assert report.allocated_bytes == report.predicted_bytes
    with attnreuse.enable(pipe, attnreuse.hurry(4, 2), map_format="u8") as session:
        sample(pipe, 4)
    work = report.allocated_bytes - session.report().allocated_bytes  # the maps are as large
    shapes = [(layer.shape, layer.head_dim) for layer in report.layers if layer.map_bytes]
    assert work == max(ops.workspace_bytes("u7", shape, DEVICE, torch.float16, d) for shape, d in shapes) > 0


def test_columns_that_are_not_numbers_stay_so_in_the_direct_product():
    q, k, v = tensors(1, 2, 65, 200, 40)
    v[..., 2] = 0
    attn_map = ops.capture(q, k, v, map_format="u7", backend="triton")[1]
    expected = ops.reuse(attn_map, v, backend="triton")
    assert (expected[..., 2] == 0).all()
    v[:, :, 7, 5], v[:, :, 150, 39] = math.nan, math.inf
    out = ops.reuse(attn_map, v, backend="triton")
    assert not out[..., [5, 39]].isfinite().any()
    others = [d for d in range(40) if d not in (5, 39)]
    assert torch.equal(out[..., others], expected[..., others])


@pytest.mark.parametrize("name", ["u8", "u7"])
def test_scores_of_any_size_give_codes_within_the_levels(name):
    """Products are rounded once, the maximum twice: a code above the levels would be that of another probability."""
    q, k, v = tensors(1, 1, 128, 256, 64, peak=300.0)
    q, k = q * 10, k * 10
    _, expected = oracle(q, k, v)
    attn_map = ops.capture(q, k, v, map_format=name, backend="triton")[1]
    assert attn_map.codes.max() <= attn_map.format.levels
    assert error(ops.reuse(attn_map, v, backend="triton"), expected) < FORMATS[name].error + 2e-3


@pytest.mark.parametrize("name", ["u8", "u7", "u4"])
def test_ops_pass_opcheck(name):
    q, k, v = tensors(1, 2, 5, 7, 16)
    storage = ops.capture(q, k, v, map_format=name, backend="triton")[1].storage
    mask = torch.ones(5, 7, dtype=torch.bool, device=DEVICE)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    given = (q, k, v, mask, 0.25, name, "triton", storage, torch.zeros_like(q))
    torch.library.opcheck(torch.ops.attnreuse.capture, given, test_utils=checks)
    torch.library.opcheck(
        torch.ops.attnreuse.reuse, (storage, 5, v, name, "triton", torch.zeros_like(q)), test_utils=checks
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_automatic_choice_compiles_without_graph_breaks(dynamic):
    q, k, v = tensors(1, 2, 33, 77, 40)
    into = AttentionMap.empty(FORMATS["u8"], (1, 2, 33, 77), DEVICE)

    def both(q, k, v, fresh):
        out, attn_map = ops.capture(q, k, v, into=into)
        return out, ops.reuse(attn_map, fresh)

    expected = both(q, k, v, 2 * v)
    actual = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=dynamic)(q, k, v, 2 * v)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
    assert ops.backend_for("u8", DEVICE, torch.float16, 40) == "triton"


@pytest.mark.parametrize(
    ("name", "dtype", "d", "said"),
    [
        ("fp32", torch.float16, 64, "no kernel for fp32 maps"),
        ("u8", torch.float32, 64, "no kernel for torch.float32 tensors"),
        ("u8", torch.float16, 192, r"no kernel for head dim 192 \(up to 160"),
    ],
)
def test_what_no_kernel_serves_is_refused_when_forced_and_warned_of_once_on_cuda(name, dtype, d, said, monkeypatch):
    q, k, v = tensors(1, 1, 2, 3, d, dtype)
    with pytest.raises(ValueError, match=f"backend 'triton' cannot serve this call: {said}"):
        ops.capture(q, k, v, map_format=name, backend="triton")
    ops._chosen.cache_clear()
    monkeypatch.setattr(backend, "arch_of", lambda device: 90)
    call = (ops.BEST, name, torch.device("cuda"), dtype, d)  # as the choice would be made there
    with pytest.warns(UserWarning, match=f"head dim {d} run through plain torch on cuda.*{said}"):
        ops._chosen(*call)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops._chosen(*call) is ops._BACKENDS["torch"]


def test_old_devices_and_foreign_ones_are_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "arch_of", lambda device: 75)
    u8 = FORMATS["u8"]
    assert "7.5 is below 8.0" in backend.unserved(u8, torch.device("cuda"), torch.float16, 64)
    assert "no kernel for mps devices" in backend.unserved(u8, torch.device("mps"), torch.float16, 64)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "NVIDIA" in backend.unserved(u8, torch.device("cuda"), torch.float16, 64)


def test_everything_works_without_triton():
    code = "import sys; sys.modules['triton'] = None; import importlib.util as u\n"
    code += (
        "u.find_spec = lambda name, package=None, find=u.find_spec: None if name == 'triton' else find(name, package)\n"
    )
    code += "from attnreuse import ops; import torch; q = torch.ones(1, 1, 2, 16).half()\n"
    code += "ops.capture(q, q, q); print(ops.unserved_reasons('u8', q.device, q.dtype, 16)['triton'])"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert made.stdout.strip() == "triton is not installed"


def halves(register):
    return register.view(np.float16).astype(np.float64).reshape(-1, 2)


def from_halves(low_high):
    """Two numbers to a register, each rounded to fp16, to nearest even."""
    return low_high.astype(np.float16).reshape(-1).view(np.uint32)


def permuted(a, b, selector):
    """prmt.b32: each nibble of the selector names one of the eight bytes of a and b."""
    both = np.concatenate([x.view(np.uint8).reshape(-1, 4) for x in (a, b)], axis=1)
    return np.ascontiguousarray(both[:, [int(selector) >> 4 * i & 7 for i in range(4)]]).view(np.uint32).reshape(-1)


def looked_up(a, b, c, table):
    """lop3.b32: bit by bit, what the table says of the three bits."""
    found = np.zeros_like(a)
    for row in range(8):
        if int(table) >> row & 1:
            found |= np.bitwise_and.reduce([x if row >> i & 1 else ~x for i, x in enumerate((c, b, a))])
    return found


INSTRUCTIONS = {  # as the PTX manual states them, on arrays of registers
    "mov.b32": lambda a: a,
    "cvt.rn.f16x2.f32": lambda high, low: from_halves(np.stack([low.view(np.float32), high.view(np.float32)], 1)),
    "fma.rn.f16x2": lambda a, b, c: from_halves(halves(a) * halves(b) + halves(c)),
    "sub.rn.f16x2": lambda a, b: from_halves(halves(a) - halves(b)),
    "mul.rn.f16x2": lambda a, b: from_halves(halves(a) * halves(b)),
    "prmt.b32": lambda a, b, selector: permuted(a, b, selector[0]),
    "lop3.b32": lambda a, b, c, table: looked_up(a, b, c, table[0]),
    "shl.b32": lambda a, by: a << by,
    "shr.b32": lambda a, by: a >> by,
}


def run_assembly(text, *inputs):
    """$0 of straight-line PTX, for arrays of 32-bit registers $1, $2, ..."""
    registers = {f"${i}": x for i, x in enumerate(inputs, 1)}
    for line in filter(None, (part.strip() for part in text.strip().strip("{}").split(";"))):
        if not line.startswith(".reg"):
            name, operands = line.split(" ", 1)
            to, *given = (operand.strip() for operand in operands.split(","))
            read = [registers[x] if x in registers else np.full_like(inputs[0], int(x, 0)) for x in given]
            registers[to] = INSTRUCTIONS[name](*read)
    return registers["$0"]


@pytest.mark.parametrize(
    ("assembly", "levels", "fields"),
    [(tiles._pack_bytes_asm(255), 255, 2), (tiles._pack_bytes_asm(127), 127, 2), (tiles._PACK_U4.value, 15, 4)],
    ids=["u8", "u7", "u4"],
)
def test_packing_assembly_writes_rounded_codes_side_by_side(assembly, levels, fields):
    """What the interpreter cannot run: two words, of so many key ranges, from numbers in [0, 1]."""
    roots = np.random.default_rng(0).permutation(np.tile(np.arange(0x3C01, dtype=np.uint16).view(np.float16), 8))
    roots = roots[: roots.size // (2 * fields) * 2 * fields].reshape(-1, fields, 2)
    if fields == 2:  # two fp16 numbers to a register
        inputs = [np.ascontiguousarray(roots[:, i]).view(np.uint32).reshape(-1) for i in range(fields)]
    else:
        wide = roots.astype(np.float32)
        inputs = [np.ascontiguousarray(wide[:, i, j]).view(np.uint32) for i in range(fields) for j in range(2)]
    words = run_assembly(assembly, *inputs).view(np.uint16).reshape(-1, 2)
    codes = np.floor(roots.astype(np.float32) * levels + 0.5).astype(np.uint16)  # as the twin that is interpreted
    expected = sum(codes[:, i] << np.uint16(16 // fields * i) for i in range(fields))
    np.testing.assert_array_equal(words, expected)


@pytest.mark.parametrize(("bits", "part"), [(8, 0), (8, 1), *((4, part) for part in range(4))])
def test_unpacking_assembly_squares_the_codes_of_its_field(bits, part):
    words = np.random.default_rng(0).permutation(np.arange(1 << 16, dtype=np.uint16))
    found = run_assembly(tiles._square_asm(part, bits), words.view(np.uint32)).view(np.float16)
    codes = (words >> bits * part & (1 << bits) - 1).astype(np.float32)
    np.testing.assert_array_equal(found, (codes * codes).astype(np.float16))
