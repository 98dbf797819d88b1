"""Resources of the CUDA kernels for every architecture, as ptxas reports them; needs nvcc and no GPU.

    python -m benchmarks.compile_cuda [--record]

Compares with `results/compile_cuda.csv` and fails where a kernel spills or needs more registers than recorded.
"""

import argparse
import csv
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from rows import RESULTS

SOURCES = Path(__file__).parent.parent / "csrc/cuda"
REPORT = RESULTS / "compile_cuda.csv"
ARCHS = ("80", "86", "89", "90a", "100a")


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel on one architecture."""

    nvcc: str
    kernel: str
    arch: str
    registers: int
    spill_bytes: int


def version() -> str:
    """Release of the nvcc on PATH, such as "13.0"."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", said)[1]


def build() -> list[Kernel]:
    """Compile for every architecture that this nvcc knows."""
    known = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    archs = [arch for arch in ARCHS if f"compute_{arch.rstrip('a')}" in known]
    found = compiled(SOURCES / "kernels.cu", archs)
    if "90a" in archs:
        found += compiled(SOURCES / "hopper.cu", ["90a"])
    return sorted(found, key=lambda kernel: (kernel.kernel, kernel.arch))


def compiled(source: Path, archs: list[str]) -> list[Kernel]:
    """The kernels of one file."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-c", source, "-o", Path(folder) / "made.o", "-O3", "-std=c++17", "-Xptxas=-v", *flags]
        log = subprocess.run([*command, "--threads=0"], capture_output=True, text=True, check=True).stderr
    if "wgmma.mma_async instructions are serialized" in log:
        raise SystemExit(f"ptxas serialises the products of {source.name}:\n{log}")
    nvcc = version()
    entry = (
        r"entry function '(\S+)' for '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    return [
        Kernel(nvcc, name_of(symbol), arch, int(registers), max(int(stores), int(loads)))
        for symbol, arch, stores, loads, registers in re.findall(entry, log, flags=re.DOTALL)
    ]


def name_of(symbol: str) -> str:
    """ "reuse u8 D=64" of a mangled name."""
    hopper = re.search(r"hopper_kernelILi(\d+)ELi(\d)ELi(\d)E", symbol)
    if hopper:
        return f"hopper reuse u{hopper[2]} D={hopper[1]} tiles={hopper[3]}"
    reuse = re.search(r"reuse_kernelILi(\d+)ELi(\d)E", symbol)
    return f"reuse u{reuse[2]} D={reuse[1]}"


def recorded() -> dict[tuple[str, ...], int]:
    """Registers by (nvcc, kernel, arch)."""
    with REPORT.open(newline="") as file:
        return {(row["nvcc"], row["kernel"], row["arch"]): int(row["registers"]) for row in csv.DictReader(file)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write the figures instead of comparing them")
    args = parser.parse_args()
    if shutil.which("nvcc") is None:
        raise SystemExit("nvcc is not on PATH")
    kernels = build()
    if args.record:
        with REPORT.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(kernels[0])))
            writer.writeheader()
            writer.writerows(map(asdict, kernels))
    limits = recorded()
    wrong = [
        k
        for k in kernels
        if k.spill_bytes or k.registers > limits.get((k.nvcc, k.kernel, k.arch), 255)
    ]  # fmt: skip
    for kernel in kernels:
        print(*asdict(kernel).values(), "WRONG" if kernel in wrong else "")
    print(f"nvcc {version()}: {len(kernels)} kernels, {len(wrong)} wrong")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
