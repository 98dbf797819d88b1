"""The benchmarks' own code, on small shapes: what is checked, what is timed, what is written."""

import csv
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import compile as compile_gate
import gpu
import gpu_check
import gpu_steps
import pytest
import rows
import torch
from typer.testing import CliRunner

from attnreuse import ops
from attnreuse.binding.denoiser import layer_kinds
from attnreuse.binding.shapes import map_shapes
from attnreuse.cli import app
from attnreuse.maps.formats import format_named
from attnreuse.measure.timing import Times, interleaved, paced, paced_runs
from attnreuse.study import bench

CPU = torch.device("cpu")
LIMITS = bench.Ceilings(bytes_per_s=1e10, read_bytes_per_s=1.2e10, flop_per_s=1e11)
SMALL = (1, 2, 128, 128, 16)
ROOT = Path(__file__).parent.parent.parent


def measured(formats=("u8", "u4")):
    return bench.measure("small", SMALL, list(formats), torch.float32, CPU, LIMITS, repeats=2)


def test_each_op_is_checked_and_timed_beside_exact_attention():
    found = {(r.op, r.kind): r for r in measured()}
    assert set(found) == {("exact", "sdpa"), *((op, f) for op in ("capture", "reuse") for f in ("u8", "u4"))}
    assert all(r.green and r.p20_s <= r.median_s <= r.p80_s for r in found.values())
    exact, reuse = found["exact", "sdpa"], found["reuse", "u4"]
    assert exact.of_exact == 1
    assert reuse.of_exact == pytest.approx(reuse.median_s / exact.median_s)
    assert reuse.flop == exact.flop / 2 == 2 * 1 * 2 * 128 * 128 * 16
    assert reuse.nbytes == reuse.map_bytes + 4 * 2 * 16 * (128 + 128)


def test_a_wrong_op_gets_no_speed(monkeypatch):
    right = ops.reuse
    monkeypatch.setattr(bench.ops, "reuse", lambda *args, **kwargs: right(*args, **kwargs).mul_(1.1))
    for row in measured():
        assert row.green == (row.op != "reuse")
        assert (row.median_s is None) == (row.op == "reuse")


def test_break_even_counts_the_reuses_that_pay_for_a_capture():
    taken = {
        bench.Call("exact", "sdpa"): 2.0,
        bench.Call("capture", "u8", "triton"): 3.0,
        bench.Call("capture", "u4", "triton"): 1.0,
        bench.Call("reuse", "u8", "triton"): 1.5,
        bench.Call("reuse", "u8", "cuda"): 1.0,
        bench.Call("reuse", "u4", "triton"): 2.5,
    }
    times = {call: Times(s, s, s) for call, s in taken.items()}
    pays = {call: bench._speeds(call, times, LIMITS, 10, 10).get("break_even") for call in taken}
    assert list(pays.values())[3:] == [2.0, 1.0, math.inf]


def test_calls_are_timed_in_turns():
    order = []
    times = interleaved([lambda: order.append("a"), lambda: order.append("b")], CPU, 3)
    assert order == ["a", "b"] * 4  # a warm-up first
    assert all(t.p20 <= t.median <= t.p80 for t in times)


def test_calls_are_told_at_the_pace_of_the_reference():
    """On a machine that becomes slower all the while, and is twice as slow from the third round on."""
    runs, order = itertools.count(), []

    def taking(name, seconds):
        def call():
            done = next(runs)
            order.append(name)
            return seconds * (1 + done / 100) * (2 if done >= 22 else 1)

        return call

    shares = {"a": 0.5, "b": 0.75, "c": 1.5, "d": 0.9, "e": 0.8, "f": 0.25, "g": 0.1}
    told = []
    found = paced(taking("full", 1.0), [taking(*pair) for pair in shares.items()], 4, lambda *at: told.append(at))
    assert len(order) == paced_runs(len(shares), 4) == 44
    assert [done for done, _ in told] == list(range(44))
    assert [("full", *shares)[call] for _, call in told] == order
    for own, share in zip(found[1:], shares.values(), strict=True):
        assert [seconds / full for seconds, full in zip(own, found[0], strict=True)] == pytest.approx([share] * 4)
    for at in range(0, 44, 11):
        assert [i for i, name in enumerate(order[at : at + 11]) if name == "full"] == [0, 4, 8, 10]
    assert order[:11] != order[11:22]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_that_is_kept_is_not_faulted_in_anew():
    """Pages faulted in by 20 tensors of 64 MiB, one after the other, in a process of its own."""
    script = """
import resource, sys, torch
from attnreuse.measure.timing import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
fill = lambda: torch.empty(1 << 24).fill_(1)
for _ in range(10):  # the heap settles: what is aligned first does not fit into what was freed
    fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    by_default, kept = (
        int(subprocess.run(command, check=True, capture_output=True, text=True, cwd="/").stdout)
        for command in ([sys.executable, "-c", script, how] for how in ("default", "keep"))
    )
    assert kept < by_default / 10


def test_result_files_only_grow(tmp_path):
    path = tmp_path / "rows.csv"
    about = rows.provenance(CPU)
    assert about["commit"] != ""
    for _ in range(2):
        rows.append(path, bench.to_dicts(measured(), LIMITS))
    with path.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 10
    with pytest.raises(ValueError, match="move it away"):
        rows.append(path, [{"other": 1}])


TINY = {
    "UNet2DConditionModel": dict(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
    ),
    "PixArtTransformer2DModel": dict(num_layers=1, num_attention_heads=2, cross_attention_dim=144),
    "SD3Transformer2DModel": dict(
        num_layers=2, num_attention_heads=2, caption_projection_dim=128, dual_attention_layers=(0,)
    ),
    "FluxTransformer2DModel": dict(num_layers=1, num_single_layers=1, num_attention_heads=2),
}


@pytest.mark.parametrize("cls", TINY)
def test_gpu_suite_measures_steps(cls):
    published = {of[0]: of[2] for of in gpu_steps.TRANSFORMERS.values()}
    made = gpu_steps.make_denoiser(cls, 8, published.get(cls, {}) | TINY[cls], CPU, torch.float32)
    found = gpu_steps.measure_steps("small", made, "fp32", CPU, "eager", repeats=2)
    assert [row.action for row in found] == ["compute", "capture", "reuse"]
    assert found[0].of_exact == 1
    assert all(row.error < 1e-5 for row in found)  # the same step's map: exact to rounding
    assert found[0].map_bytes == 0 < found[1].map_bytes == found[2].map_bytes


@pytest.mark.parametrize(
    ("model", "gib"), [("PixArt-Sigma 1024", 14.5), ("SD3.5-medium 1024", 32.0), ("FLUX.1-dev 768", 10.4)]
)
def test_gpu_suite_knows_the_published_models(model, gib):
    """Bytes of the u8 maps of a guided step; of the first two as in docs/adapters.md."""
    denoiser, given = gpu_steps.make_denoiser(*gpu_steps.TRANSFORMERS[model], torch.device("meta"), torch.bfloat16)
    shapes, kinds = map_shapes(denoiser, given), layer_kinds(denoiser)
    nbytes = sum(format_named("u8").nbytes(s.map) for name, s in shapes.items() if kinds[name] != "cross")
    assert nbytes / 2**30 == pytest.approx(gib, abs=0.1)


def test_microbenchmarks_run_and_are_drawn(tmp_path):
    """As a user types them; the smallest shape."""
    found = tmp_path / "ops.json"
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks", "-k", "256 and (exact or u8)", "--benchmark-only"]
    options = ["--benchmark-min-rounds=2", "--benchmark-max-time=0.01", f"--benchmark-json={found}", "-p", "no:xdist"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # it is nobody's worker
    made = subprocess.run([*command, *options], capture_output=True, text=True, cwd=ROOT, env=env)
    assert made.returncode == 0, made.stdout
    rows = json.loads(found.read_text())["benchmarks"]
    told = [row["extra_info"] for row in rows]
    assert {(row["op"], row["kind"]) for row in told} == {("exact", "sdpa"), ("capture", "u8"), ("reuse", "u8")}
    by_op = {row["op"]: row for row in told}
    assert by_op["exact"]["map_bytes"] == 0 < by_op["reuse"]["map_bytes"] < by_op["reuse"]["bytes_moved"]
    assert all(row["tflop_per_s"] > 0 and row["error"] < 1e-2 and row["n"] == 256 for row in told)
    plot = [sys.executable, "-m", "benchmarks.plot", str(found)]
    subprocess.run(plot, check=True, capture_output=True, cwd=ROOT)
    assert found.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_gpu_suite_says_that_it_needs_a_device(monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main()


def test_gpu_suite_refuses_stages_that_it_does_not_have(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu", "--only", "check,fast"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "--only must name stages of check, warm, speed" in capsys.readouterr().err


def test_gpu_suite_checks_values(monkeypatch):
    """Interpreted: captures and reuses of each format are green, and a wrong one is red in its own rows."""
    monkeypatch.setattr(gpu_check, "SIZES", ((63, 77, 1.0),))
    rows = list(gpu_check.check("triton", 40, CPU))
    assert [(row["format"], row["op"]) for row in rows] == [
        (name, op) for name in ("u8", "u7", "u4", "fp16") for op in ("capture", "reuse")
    ]
    assert all(row["green"] for row in rows)
    right = ops.reuse
    monkeypatch.setattr(gpu_check.ops, "reuse", lambda held, *args, **kw: right(held, *args, **kw).mul_(1.2))
    assert [row["green"] for row in gpu_check.check("triton", 40, CPU)] == [True, False] * 4

    def failing(*args, **kwargs):
        raise RuntimeError("out of resource")

    monkeypatch.setattr(gpu_check.ops, "reuse", failing)
    notes = [row["note"] for row in gpu_check.check("triton", 40, CPU) if not row["green"]]
    assert notes == ["RuntimeError: out of resource"] * 4
    refused = list(gpu_check.check("hopper", 40, CPU))
    assert all(row["green"] == "" and "needs a CUDA device" in row["note"] for row in refused)


def test_gpu_suite_keeps_to_its_time_and_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    parts = {"good": "print('measured')", "bad": "raise SystemExit('broken')", "hung": "import time; time.sleep(60)"}
    monkeypatch.setattr(gpu, "STAGES", {"check": gpu.Stage(tuple(parts), 12, at_once=True)})
    monkeypatch.setattr(gpu, "command", lambda stage, part, out: [sys.executable, "-c", parts[part]])
    begun = time.monotonic()
    gpu.run_all(["check"], tmp_path, 60)
    assert time.monotonic() - begun < 30
    said = capsys.readouterr().out
    for end in ("check good: exit code 0", "check bad: exit code 1", "check hung: stopped at its limit"):
        assert end in said
    assert "measured" in (tmp_path / "check.txt").read_text()
    gpu.run_all(["check"], tmp_path, 5)
    assert "check good, bad, hung: no time is left" in capsys.readouterr().out


def test_gpu_suite_sums_up_what_was_measured(tmp_path):
    measured_rows = bench.to_dicts(measured(), LIMITS)
    gpu._write(tmp_path / "gpu_kernels.csv", measured_rows * 60, CPU)
    red = {"family": "cuda", "format": "u8", "d": 64, "m": 1, "n": 1, "op": "reuse", "green": False, "note": "wrong"}
    gpu._write(tmp_path / "gpu_check.csv", [red], CPU)
    said = gpu.summary(tmp_path)
    assert said.startswith("RED family=cuda format=u8 d=64")
    assert "small exact sdpa : " in said
    assert len(said) <= gpu.LINES
    assert said.endswith("(the rest is in the files)")


def test_bench_command(monkeypatch):
    monkeypatch.setattr(bench, "ceilings", lambda device, dtype: LIMITS)
    made = CliRunner().invoke(app, ["bench", "--shape", "1,2,64,16", "--format", "u8", "--repeats", "1", "--json"])
    assert made.exit_code == 0, made.output
    data = json.loads(made.stdout)
    assert {(r["op"], r["n"]) for r in data["rows"]} == {("exact", 64), ("capture", 64), ("reuse", 64)}
    assert {r["shape"] for r in data["rows"]} == {"1,2,64,16"}
    shown = CliRunner().invoke(app, ["bench", "--shape", "1,2,64,16", "--format", "u8", "--repeats", "1"])
    assert "reuse u8" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "1,2"], "--shape must be B,H,N,D or B,H,M,N,D, got '1,2'"),
        (["--format", "u2"], "'u2' is not one of"),
        (["--tune"], "--tune measures the Triton kernels on a CUDA device"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="--tune would measure")
def test_bench_command_refuses_bad_input(arguments, said):
    made = CliRunner().invoke(app, ["bench", *arguments])
    assert made.exit_code == 2
    assert said in made.stderr


def test_the_compile_gate_names_what_is_wrong():
    case = compile_gate.Case("reuse", "u8", "fp16", 64, 90)
    good = compile_gate.Figures(128, 8, 3, 120, 0, 80 << 10, True, False, 1, 4.5)
    bad = compile_gate.Figures(128, 8, 3, 255, 8, 240 << 10, False, True, 0, 9.0)
    assert compile_gate.problems(case, good, good) == []
    assert len(compile_gate.problems(case, bad, good)) == 8
    assert len(compile_gate.problems(case, bad, None)) == 5


@pytest.mark.parametrize(("nums", "found"), [((1, 2), 1), ((0,), 0), ((), -1)])
def test_the_compile_gate_reads_what_a_loop_waits_for(nums, found):
    waits = "".join(f"      %w{i} = ttg.async_wait %t {{num = {num} : i32}}\n" for i, num in enumerate(nums))
    head, inner = "    %0 = scf.for %i = %a to %b step %c  : i32 {\n", "      scf.if %c {\n      }\n"
    behind = "    } {loop}\n    ttg.async_wait  {num = 0 : i32}\n"
    ttgir = head + inner + waits + behind
    assert compile_gate.in_flight(ttgir) == found
