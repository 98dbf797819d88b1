"""The GPU suite: what is right, what is fast, what a whole step gains; every stage within its time.

    python -m benchmarks.gpu                        all stages but "compiled", in under ten minutes
    python -m benchmarks.gpu --only check,speed     these alone, of check, speed, steps, tests, sanitizer, counters,
                                                    tune and compiled
    python -m benchmarks.gpu STAGE PART             one part in this process, such as `speed "SDXL 1024 self 4096"`

A stage runs its parts in processes of their own, each with a time limit: what hangs or loses the device ends its own
part. Rows are written when they are measured; an op whose check is red gets no speed. Appends to `gpu_*.csv` of `--out`
(default: `benchmarks/results/`), and says the most telling rows at the end. On a machine without a network, from an
uninstalled checkout: `benchmarks/gpu_bare.sh`.
"""

import argparse
import csv
import fcntl
import functools
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from compile import launch_of
from gpu_check import FAMILIES, HEAD_DIMS, check
from gpu_steps import measure_steps, models
from rows import RESULTS, append, provenance

from attnreuse import ops
from attnreuse.kernels.backend import arch_of
from attnreuse.maps.formats import AttentionMap, format_named
from attnreuse.study import bench, tuning

ROOT = Path(__file__).resolve().parent.parent
SHAPES = bench.SHAPES | {"SD1.5 1024 self 16384": (2, 8, 16384, 16384, 40)}
ORDER = (  # the most telling first
    "SDXL 1024 self 4096", "SD1.5 512 self 4096", "Flux-like 1024 joint", "SD1.5 1024 self 16384",
    "SDXL 1024 self 1024", "SD1.5 512 self 1024", "SD1.5 512 self 256", "SD1.5 512 cross 4096",
)  # fmt: skip
FORMATS = ["u8", "u7", "u4", "fp16"]
LARGE = 2 << 30  # elements of a map whose 16-bit codes are left out
TUNED, COUNTED = ORDER[:3], (ORDER[0], ORDER[2])
LINES = 9000  # characters of the summary, at most


@dataclass(frozen=True)
class Stage:
    """Parts of a stage, the seconds that each may take, and whether all run at once."""

    parts: tuple[str, ...]
    limit: float
    at_once: bool = False


STAGES = {
    "check": Stage(tuple(f"{family}:{d}" for family in FAMILIES for d in HEAD_DIMS), 100, at_once=True),
    "warm": Stage(ORDER, 60, at_once=True),
    "speed": Stage(ORDER, 40),
    "steps": Stage(tuple(models()), 70),
    "tests": Stage(("",), 120),
    "sanitizer": Stage(("memcheck", "racecheck"), 45),
    "counters": Stage(COUNTED, 30),
    "tune": Stage(TUNED, 40),
    "compiled": Stage(tuple(models())[:3], 400),
}
DEFAULT = [stage for stage in STAGES if stage != "compiled"]


# -- the parts, each in a process of its own


def run_check(part: str, out: Path, device: torch.device) -> None:
    family, _, d = part.partition(":")
    for row in check(family, int(d), device):
        _write(out / "gpu_check.csv", [row], device)


def formats_of(shape: bench.Shape) -> list[str]:
    b, h, m, n, _ = shape
    return FORMATS if b * h * m * n < LARGE else FORMATS[:3]


def run_warm(part: str, out: Path, device: torch.device) -> None:
    """Compile what `speed` will run: compilers want the CPU alone, so all shapes do at once."""
    for name in formats_of(SHAPES[part]):
        for op in ("capture", "reuse"):
            launch_of(op, SHAPES[part], name, torch.float16, arch_of(device)).compile()


def run_speed(part: str, out: Path, device: torch.device) -> None:
    shape = SHAPES[part]
    limits = bench.ceilings(device, torch.float16)
    rows = bench.measure(part, shape, formats_of(shape), torch.float16, device, limits, repeats=20)
    _write(out / "gpu_kernels.csv", bench.to_dicts(rows, limits), device)


def run_tune(part: str, out: Path, device: torch.device) -> None:
    for found in tuning.tune(device, SHAPES[part], FORMATS[:3], repeats=10):
        times = found.times
        row = {"shape": part, "op": found.op, "format": found.map_format, "d": found.head_dim, **vars(found.config)}
        row |= {"shipped": found.shipped, "median_s": times and times.median, "note": found.reason}
        _write(out / "gpu_tune.csv", [row], device)


def run_steps(part: str, out: Path, device: torch.device, modes: tuple[str, ...] = ("graph", "eager")) -> None:
    make, dtype = models()[part]
    made = make(device, dtype)
    for name in ("u8", "u7"):
        for mode in modes:
            rows = measure_steps(part, made, name, device, mode)
            _write(out / "gpu_steps.csv", [vars(row) for row in rows], device)


def run_compiled(part: str, out: Path, device: torch.device) -> None:
    run_steps(part, out, device, ("compiled",))


def run_counters(part: str, out: Path, device: torch.device) -> None:
    """One capture and one reuse per format, under the profiler that :func:`command` starts."""
    q, k, v = bench.inputs(SHAPES[part], torch.float16, device)
    for name in FORMATS[:3]:
        attn_map = AttentionMap.empty(format_named(name), SHAPES[part][:4], device)
        ops.capture(q, k, v, into=attn_map)
        for backend in [None, *ops.named_backends(name, v.device, v.dtype, v.shape[-1])]:
            ops.reuse(attn_map, v, backend=backend)
    torch.cuda.synchronize()


def run_sanitizer(part: str, out: Path, device: torch.device) -> None:
    """Small checks of each family, under the sanitizer that :func:`command` starts."""
    for family in FAMILIES:
        for row in check(family, 64, device):
            if row["green"] is False:
                print("RED", row, flush=True)


def _write(path: Path, rows: list[dict], device: torch.device) -> None:
    """Append rows; parts that run at once take turns."""
    about = _about(device)
    with (path.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        append(path, [row | about for row in rows])


_about = functools.cache(provenance)  # of one process, which asks git once
RUN = {
    "check": run_check, "warm": run_warm, "speed": run_speed, "steps": run_steps, "sanitizer": run_sanitizer,
    "counters": run_counters, "tune": run_tune, "compiled": run_compiled,
}  # fmt: skip


# -- the whole, in its time


def command(stage: str, part: str, out: Path) -> list[str] | None:
    """What starts a part; None where a program that it needs is not there."""
    own = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), stage, part, "--out", str(out)]
    if stage == "tests":
        limit = ["--timeout", "60"] if importlib.util.find_spec("pytest_timeout") else []
        files = ["tests/test_gpu.py", "tests/test_triton.py"]
        return [sys.executable, "-m", "pytest", "-q", "-n", "8", "--maxfail", "30", "--tb", "line", *limit, *files]
    if stage == "counters":
        sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats", "LaunchStats", "Occupancy")
        kernels = "regex:_capture_kernel|_reuse_kernel|_direct_kernel|reuse_kernel|hopper_kernel"
        options = ["--target-processes", "all", "-k", kernels, *(x for s in sections for x in ("--section", s))]
        return [shutil.which("ncu"), *options, *own] if shutil.which("ncu") else None
    if stage == "sanitizer":
        options = ["--tool", part, "--print-limit", "5"]
        found = shutil.which("compute-sanitizer")
        return [found, *options, *own] if found else None
    return own


def run_all(stages: Iterable[str], out: Path, seconds: float) -> None:
    """Run stages one after the other; what they print goes to a file each."""
    end = time.monotonic() + seconds
    for stage in stages:
        told = STAGES[stage]
        groups = [told.parts] if told.at_once else [(part,) for part in told.parts]
        for parts in groups:
            _run_parts(stage, parts, told.limit, out, end)
    print(summary(out))


def _run_parts(stage: str, parts: tuple[str, ...], limit: float, out: Path, end: float) -> None:
    """Start these parts at once, and stop them where they pass the limit or the end of all."""
    began, started = time.monotonic(), []
    until = min(began + limit, end)
    if until - began < 10:
        print(f"{stage} {', '.join(parts)}: no time is left", flush=True)
        return
    with (out / f"{stage}.txt").open("a") as log:
        for part in parts:
            words = command(stage, part, out)
            if words is None:
                print(f"{stage} {part}: its program is not on PATH", flush=True)
                continue
            started.append((part, subprocess.Popen(words, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)))
        for part, process in started:
            try:
                said = f"exit code {process.wait(timeout=max(1.0, until - time.monotonic()))}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # and what it started
                process.wait()
                said = "stopped at its limit"
            print(f"{stage} {part}: {said}, {time.monotonic() - began:.0f} s", flush=True)


def summary(out: Path) -> str:
    """What is red, then steps, then each shape's ops: at most ``LINES`` characters."""
    red = [r for r in _read(out / "gpu_check.csv") if r["green"] == "False"]
    lines = [f"RED {' '.join(f'{k}={r[k]}' for k in ('family', 'format', 'd', 'm', 'n', 'op', 'note'))}" for r in red]
    lines = lines[:12] + ([f"and {len(red) - 12} more red rows"] if len(red) > 12 else [])
    lines += [
        f"{r['model']} {r['mode']} {r['map_format']} {r['action']}: {1e3 * float(r['median_s']):.2f} ms, "
        f"{float(r['of_exact']):.3f} of stock, error {float(r['error']):.1e}"
        for r in _read(out / "gpu_steps.csv")
    ]
    lines.append("shape, op: us, of exact; sustained us; of roofline; error")
    for r in _read(out / "gpu_kernels.csv"):
        op = f"{r['shape']} {r['op']} {r['kind']} {r['backend']}"
        if not r["median_s"]:
            lines.append(f"{op}: no speed, error {r['error']}, {r['note']}")
            continue
        steady = f"{1e6 * float(r['sustained_s']):.1f}" if r["sustained_s"] else "-"
        lines.append(
            f"{op}: {1e6 * float(r['median_s']):.1f} {float(r['of_exact']):.2f}; {steady}; "
            f"{float(r['of_roofline']):.0%}; {float(r['error']):.0e}"
        )
    text = "\n".join(lines)
    return text if len(text) <= LINES else text[: LINES - 40] + "\n(the rest is in the files)"


def _read(path: Path) -> list[dict[str, str]]:
    """Rows of the latest commit in a file that may not be there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if row["commit"] == rows[-1]["commit"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", choices=list(STAGES), help="with PART: run it here")
    parser.add_argument("part", nargs="?", default="")
    parser.add_argument("--only", default="", metavar="STAGES", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--seconds", type=float, default=570, help="of all stages")
    args = parser.parse_args()
    wanted = [stage for stage in args.only.replace("speed", "warm,speed").split(",") if stage]
    if unknown := [stage for stage in wanted if stage not in STAGES]:
        parser.error(f"--only must name stages of {', '.join(STAGES)}, got {', '.join(unknown)}")
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: nothing to measure (python -m benchmarks.compile checks the kernels without)")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.stage is None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        run_all([s for s in STAGES if s in (wanted or DEFAULT)], args.out.resolve(), args.seconds)
        return
    with torch.no_grad():
        RUN[args.stage](args.part, args.out, torch.device("cuda"))


if __name__ == "__main__":
    main()
