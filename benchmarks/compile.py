"""Compile gate: builds every shipped kernel configuration offline, for each architecture; needs no GPU.

    python -m benchmarks.compile                     compare with benchmarks/results/compile.csv
    python -m benchmarks.compile --record            write the rows of this Triton
    python -m benchmarks.compile --triton 3.6.0      with another Triton (pip installs it into a cache)
    python -m benchmarks.compile --sample            one configuration in 13, while the kernels are those recorded

A configuration fails where registers spill, shared memory passes the
architecture's limit, the tensor cores' instruction is missing, ptxas serialises wgmma, the loop waits for copies that
it has just issued (on sm_80 and sm_90), or a figure is worse than the recorded one. Exit code 1 on a failure.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "compile.csv"
KERNELS = Path(__file__).parent.parent / "kernels" / "triton"
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}  # CUDA programming guide, per thread block
TENSOR_CORE = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
ARCHS = (80, 89, 90, 100)
PREFETCHING = (80, 90)  # whose shared memory has room for a stage that is on its way
TOO_LARGE = {("capture", 160, 80), ("capture", 160, 90), ("reuse", 160, 80)}  # op, D, arch: three stages do not fit
TOO_LARGE_OTHERS = TOO_LARGE | {("capture", 128, 80)}  # of all but u8 and u4 codes
HEAD_DIMS = (40, 64, 72, 80, 96, 128, 160)
NOT_FETCHED = 3  # exit code where pip cannot fetch the wanted Triton
SLACK = 1.05  # of instructions, against the recorded figure
SAMPLED = 13  # one in so many: prime, so that all ops, formats and architectures take part


@dataclass(frozen=True)
class Case:
    """A kernel as shipped, specialised as a call would."""

    op: str  # "capture" or "reuse"
    format: str
    dtype: str  # of q, k, v
    head_dim: int
    arch: int  # compute capability, 90 for 9.0
    mask: str = ""  # "bool" or "additive"; capture only
    ragged: bool = False  # N is no multiple of the key block


@dataclass(frozen=True)
class Figures:
    """What the compiler made of it.

    Attributes:
        in_flight: fewest groups of copies that are under way where the loop waits; -1 where it copies nothing.
        instructions: of the inner loop, per map element.
    """

    block_m: int
    warps: int
    stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_core: bool
    serialised: bool
    in_flight: int
    instructions: float


def cases() -> list[Case]:
    """Every format, head dim and architecture; masks, ragged edges and bf16 where they cost most."""
    kept = [
        Case(op, name, "bf16" if name == "bf16" else "fp16", d, arch)
        for op in ("capture", "reuse")
        for name in ("fp16", "bf16", "u8", "u7", "u4")
        for d in (HEAD_DIMS if name != "bf16" else (64, 160))  # to the compiler nearly fp16
        for arch in ARCHS
    ]
    for arch in ARCHS:
        for d in (64, 160):
            kept += [Case("capture", "u8", "fp16", d, arch, mask, True) for mask in ("", "bool", "additive")]
            kept += [Case("reuse", "u8", "fp16", d, arch, "", True)]
        kept += [Case(op, "u8", "bf16", d, arch) for op in ("capture", "reuse") for d in (64, 160)]
    return kept


class _Offline:
    """A driver of a device that is not there: Triton specialises and compiles, and launches nothing."""

    arch = 80

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0


def launch_of(op: str, shape: tuple[int, ...], map_format: str, dtype: Any, arch: int, mask: str = "") -> Any:
    """The launch of an op at (B, H, M, N, D), of tensors as diffusers hands them over, without their memory."""
    import torch

    from attnreuse.kernels import capture, direct, reuse
    from attnreuse.maps.formats import AttentionMap, format_named

    b, h, m, n, d = shape
    with torch.device("meta"):
        query, key = (torch.empty(b, length, h, d, dtype=dtype).transpose(1, 2) for length in (m, n))
        attn_map = AttentionMap.empty(format_named(map_format), (b, h, m, n), torch.device("meta"))
        if op == "capture":
            masked = torch.empty(b, 1, 1, n, dtype=torch.bool if mask == "bool" else dtype) if mask else None
            return capture.launch(query, key, key, masked, d**-0.5, attn_map, query, arch)
        if not direct.serves(attn_map.format):
            return reuse.launch(attn_map, key, query, arch)
        workspace = torch.empty(direct.workspace_bytes(attn_map.shape, d), dtype=torch.uint8)
        return direct.launches(attn_map, key, query, workspace, arch)[1]


def build(case: Case) -> Figures:
    """Compile a case exactly as its launch would be compiled on the device."""
    import torch
    import triton

    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[case.dtype]
    shape = (2, 8, 1024, 1000 if case.ragged else 1024, case.head_dim)
    launch = launch_of(case.op, shape, case.format, dtype, case.arch, case.mask)
    driver = _Offline()
    driver.arch = case.arch
    triton.runtime.driver.set_active(driver)
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled = launch.compile()
    return _figures(case, launch, compiled, log.getvalue())


def _figures(case: Case, launch: Any, compiled: Any, log: str) -> Figures:
    config = launch.config
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    if not spills or not registers:
        raise RuntimeError(f"no resource report from ptxas for {case}: {log}")
    elements = config.block_m * launch.arguments["BLOCK_N"] / (32 * config.warps)  # per thread
    return Figures(
        config.block_m,
        config.warps,
        config.stages,
        int(registers[1]),
        max(map(int, spills.groups())),
        compiled.metadata.shared,
        any(name in compiled.asm["ptx"] for name in tensor_core(case)),
        "C7515" in log or "serializ" in log.lower(),
        in_flight(compiled.asm["ttgir"]),
        round(loop_instructions(compiled.asm["cubin"]) / elements, 2),
    )


def tensor_core(case: Case) -> tuple[str, ...]:
    """Instructions of which one must be there; Triton 3.6 makes no integer product of sm_100's own."""
    own = TENSOR_CORE[case.arch]
    return (own, "mma.sync") if case.format == "u7" and case.op == "reuse" else (own,)


def in_flight(ttgir: str) -> int:
    """See :class:`Figures`; of Triton's IR, whose loops are indented."""
    found, loop = [], None
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        if loop is None:
            loop = indent if "scf.for" in line else None
        elif line.lstrip().startswith("}") and indent == loop:
            loop = None
        else:
            found += map(int, re.findall(r"async_wait.*num = (\d+)", line))
    return min(found, default=-1)


def loop_instructions(cubin: bytes) -> int:
    """SASS instructions of the kernel's innermost largest loop: from a backward branch's target to it."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    labels: dict[str, int] = {}
    count, longest = 0, 0
    for line in text.splitlines():
        label = re.match(r"\s*(\.L_x?_?\w+):", line)
        if label:
            labels[label[1]] = count
        elif re.search(r"/\*[0-9a-f]{4,}\*/", line):
            count += 1
            branch = re.search(r"\bBRA\b.*`\((\.L\w+)\)", line)
            if branch and branch[1] in labels and labels[branch[1]] < count - 1:
                longest = max(longest, count - labels[branch[1]])
    return longest


def problems(case: Case, now: Figures, recorded: Figures | None) -> list[str]:
    """What is wrong with a configuration, in words."""
    limit = SHARED_KB[case.arch] * 1024
    exempt = TOO_LARGE if case.format in ("u8", "u4") else TOO_LARGE_OTHERS
    prefetches = case.arch in PREFETCHING and (case.op, case.head_dim, case.arch) not in exempt
    found = [
        (now.spill_bytes > 0, f"{now.spill_bytes} bytes spill"),
        (now.shared_bytes > limit, f"{now.shared_bytes} bytes of shared memory, the limit is {limit}"),
        (not now.tensor_core, f"no {TENSOR_CORE[case.arch]} in the PTX"),
        (now.serialised, "ptxas serialises wgmma (C7515)"),
        (prefetches and now.in_flight < 1, "its loop waits for copies that it has just issued"),
    ]
    if recorded:
        found += [
            (now.registers > recorded.registers + 8, f"{now.registers} registers, {recorded.registers} recorded"),
            (now.shared_bytes > recorded.shared_bytes, f"{now.shared_bytes} bytes shared, {recorded.shared_bytes}"),
            (
                now.instructions > SLACK * recorded.instructions,
                f"{now.instructions} instructions per element, {recorded.instructions} recorded",
            ),
        ]
    return [text for wrong, text in found if wrong]


def build_all(wanted: Iterable[Case]) -> Iterator[tuple[Case, Figures]]:
    """Figures of each case, in order; as many compilers at once as there are cores."""
    wanted = list(wanted)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context) as pool:
        yield from zip(wanted, pool.map(build, wanted), strict=True)


def read(path: Path, version: str) -> dict[Case, Figures]:
    """Recorded rows of a Triton version."""
    return {_parsed(Case, row): _parsed(Figures, row) for row in _rows(path) if row["triton"] == version}


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _parsed(kind: Any, row: dict[str, str]) -> Any:
    read_as = {bool: "True".__eq__, int: int, float: float, str: str}
    return kind(**{f.name: read_as[f.type](row[f.name]) for f in fields(kind)})


def sources() -> str:
    """Fingerprint of the kernels' sources: a Triton version makes the same of the same sources."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(KERNELS.glob("*.py")))).hexdigest()[:12]


def unchanged(path: Path, version: str, wanted: Iterable[Case]) -> bool:
    """Whether the rows of all these cases were made from the present sources."""
    now = (version, sources())
    return set(wanted) <= {_parsed(Case, row) for row in _rows(path) if (row["triton"], row["sources"]) == now}


def record(path: Path, version: str, figures: dict[Case, Figures]) -> None:
    """Replace the rows of these cases with a Triton version."""
    kept = [row for row in _rows(path) if row["triton"] != version or _parsed(Case, row) not in figures]
    made = {"triton": version, "sources": sources()}
    new = [made | asdict(case) | asdict(now) for case, now in figures.items()]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(new[0]))
        writer.writeheader()
        writer.writerows(kept + new)


def with_triton(version: str) -> None:
    """Start this program again with another Triton first on the path; pip fetches it once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "attnreuse" / f"triton-{version}"
    if not (cache / "triton").exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(cache)]
        if subprocess.run([*pip, f"triton=={version}"]).returncode:
            raise SystemExit(NOT_FETCHED)
    at = sys.argv.index("--triton")
    rest = sys.argv[1:at] + sys.argv[at + 2 :]
    path = os.pathsep.join(filter(None, [str(cache), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, __file__, *rest]
    raise SystemExit(subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write the figures instead of comparing them")
    parser.add_argument("--triton", metavar="VERSION", help="use this Triton")
    parser.add_argument("--sample", action="store_true", help="one case in 13, where no kernel has changed")
    parser.add_argument("--only", default="", metavar="OP,FORMAT,D,ARCH", help="cases that hold all of these words")
    args = parser.parse_args()
    if args.triton:
        with_triton(args.triton)
    import triton

    words = set(filter(None, args.only.split(",")))
    wanted = [c for c in cases() if words <= {c.op, c.format, str(c.head_dim), str(c.arch)}]
    recorded = {} if args.record else read(RESULTS, triton.__version__)
    if args.sample and unchanged(RESULTS, triton.__version__, wanted):
        wanted = wanted[::SAMPLED]
    figures, failed = {}, 0
    for case, now in build_all(wanted):
        figures[case] = now
        wrong = problems(case, now, recorded.get(case))
        failed += bool(wrong)
        print(*asdict(case).values(), "|", *asdict(now).values(), "; ".join(wrong), flush=True)
    if args.record:
        record(RESULTS, triton.__version__, figures)
    print(f"triton {triton.__version__}: {len(figures)} configurations, {failed} failed")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
