"""Builds only the compiled extension: C++ always, CUDA where nvcc is found; no torch at build time.

Environment: ``ATTNREUSE_CUDA`` = 0, 1 or auto (default: with nvcc and its static runtime at hand);
``ATTNREUSE_CUDA_ARCHS`` = e.g. "80;90a" (default: 80, 86, 89, 90a, 100a as far as nvcc knows them).
Without a C++ compiler the package installs all the same and runs through torch.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

CPP = ["csrc/bindings.cpp", *(f"csrc/cpu/{name}.cpp" for name in ("paths", "portable", "avx2", "avx512", "avx512vnni"))]
CUDA = ["csrc/cuda/devices.cu", "csrc/cuda/kernels.cu"]
HOPPER = "csrc/cuda/hopper.cu"  # for 90a alone
NVCC_FLAGS = ("-O3", "-std=c++17", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0")
ARCHS = ("80", "86", "89", "90a", "100a")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=os.path.join(home, "bin") if home else None) or shutil.which("nvcc")


def cuda_library_dir(nvcc: str) -> Path | None:
    """Where libcudart_static lies; nvcc says its own root, also when the one on PATH is a wrapper."""
    said = subprocess.run([nvcc, "-dryrun", "-c", "none.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ _?TOP_?=(.+)$", said, flags=re.MULTILINE)
    root = Path(top[1].strip()) if top else Path(nvcc).resolve().parent.parent
    folders = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
    return next((root / f for f in folders if (root / f / "libcudart_static.a").exists()), None)


def wanted_archs(nvcc: str) -> list[str]:
    chosen = os.environ.get("ATTNREUSE_CUDA_ARCHS")
    if chosen:
        return chosen.replace(",", ";").split(";")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return [arch for arch in ARCHS if f"compute_{arch.rstrip('a')}" in known.split()]


class BuildExtension(build_ext):
    def build_extension(self, ext: Pybind11Extension) -> None:
        mode = os.environ.get("ATTNREUSE_CUDA", "auto")
        if mode not in ("0", "1", "auto"):
            raise SystemExit(f"ATTNREUSE_CUDA must be 0, 1 or auto, got {mode!r}")
        nvcc = find_nvcc() if mode != "0" else None
        library_dir = cuda_library_dir(nvcc) if nvcc else None
        if library_dir:
            self._add_cuda(ext, nvcc, library_dir)
        elif mode == "1":
            raise SystemExit("ATTNREUSE_CUDA=1, but no nvcc with libcudart_static.a was found (set CUDA_HOME)")
        self.force = True  # a stale object of another ATTNREUSE_CUDA would look up to date
        super().build_extension(ext)

    def _add_cuda(self, ext: Pybind11Extension, nvcc: str, library_dir: Path) -> None:
        archs = wanted_archs(nvcc)
        ext.define_macros.append(("ATTNREUSE_CUDA_ARCHS", f'"{";".join(archs)}"'))
        sources = dict.fromkeys(CUDA, archs)
        if "90a" in archs:
            ext.define_macros.append(("ATTNREUSE_HOPPER", "1"))
            sources[HOPPER] = ["90a"]
        with ThreadPoolExecutor() as pool:
            ext.extra_objects += pool.map(lambda source: self._compile_cuda(nvcc, source, sources[source]), sources)
        ext.library_dirs.append(str(library_dir))
        ext.libraries += ["cudart_static", "dl", "rt", "pthread"]

    def _compile_cuda(self, nvcc: str, source: str, archs: list[str]) -> str:
        target = Path(self.build_temp) / Path(source).with_suffix(".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        subprocess.run([nvcc, "-c", source, "-o", target, *NVCC_FLAGS, *flags], check=True)
        return str(target)


# torch's own libgomp serves where torch is imported first, as attnreuse does.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []

extension = Pybind11Extension(
    "attnreuse._native",
    CPP,
    cxx_std=17,
    optional=True,
    extra_compile_args=["-O3", "-Wno-psabi", *OPENMP] if os.name == "posix" else [],
    extra_link_args=OPENMP,
)
setup(
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension},
)
