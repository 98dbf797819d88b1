"""Builds only the compiled extension: C++ always, CUDA where nvcc is found; no torch at build time.

Environment: ``ATTNREUSE_CUDA`` = 0, 1 or auto (default: with nvcc and its static runtime at hand);
``ATTNREUSE_CUDA_ARCHS`` = e.g. "80;90a" (default: 80, 86, 89, 90a, 100a as far as nvcc knows them); PTX of the
newest comes along, which the driver compiles for devices that are newer still.
Without a C++ compiler the package installs all the same and runs through torch.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.errors import CompileError

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


def machine_code(arch: str) -> str:
    return f"-gencode=arch=compute_{arch},code=sm_{arch}"


class BuildExtension(build_ext):
    """One graph of C++ and CUDA for ninja, kept in ``build/``: only what changed is compiled again."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        mode = os.environ.get("ATTNREUSE_CUDA", "auto")
        if mode not in ("0", "1", "auto"):
            raise SystemExit(f"ATTNREUSE_CUDA must be 0, 1 or auto, got {mode!r}")
        nvcc = find_nvcc() if mode != "0" else None
        library_dir = cuda_library_dir(nvcc) if nvcc else None
        if mode == "1" and not library_dir:
            raise SystemExit("ATTNREUSE_CUDA=1, but no nvcc with libcudart_static.a was found (set CUDA_HOME)")
        if self.compiler.compiler_type != "unix":
            super().build_extension(ext)
            return
        cuda = self._cuda(ext, nvcc, library_dir) if library_dir else {}
        folder = Path("build", f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}").absolute()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self._graph(ext, nvcc, cuda, target))
        ninja = shutil.which("ninja")
        try:
            subprocess.run([*([ninja] if ninja else [sys.executable, "-m", "ninja"]), "-C", folder], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"the extension was not built: {error}") from error  # optional: setuptools goes on

    def _cuda(self, ext: Pybind11Extension, nvcc: str, library_dir: Path) -> dict[str, list[str]]:
        """The CUDA sources, and the options that say which architectures each is compiled for."""
        archs = wanted_archs(nvcc)
        ext.define_macros.append(("ATTNREUSE_CUDA_ARCHS", f'"{";".join(archs)}"'))
        ext.library_dirs.append(str(library_dir))
        ext.libraries += ["cudart_static", "dl", "rt", "pthread"]
        newest = max(archs, key=lambda arch: int(arch.rstrip("a"))).rstrip("a")
        every = [*map(machine_code, archs), f"-gencode=arch=compute_{newest},code=compute_{newest}"]
        sources = {source: every for source in CUDA}
        if "90a" in archs:
            ext.define_macros.append(("ATTNREUSE_HOPPER", "1"))
            sources[HOPPER] = [machine_code("90a")]
        return sources

    def _graph(self, ext: Pybind11Extension, nvcc: str | None, cuda: dict[str, list[str]], target: Path) -> str:
        compiler, linker = self.compiler.compiler_so_cxx, self.compiler.linker_so_cxx
        macros = [f"-D{name}" if value is None else f"-D{name}={value}" for name, value in ext.define_macros]
        include = [f"-I{folder}" for folder in [*ext.include_dirs, *self.include_dirs]]
        libraries = [*(f"-L{folder}" for folder in ext.library_dirs), *(f"-l{name}" for name in ext.libraries)]
        rules = {
            "cxx": _words(*compiler, *include, *macros, *ext.extra_compile_args) + " -MMD -MF $out.d -c $in -o $out",
            "cuda": _words(nvcc or "nvcc", *NVCC_FLAGS) + " $archs -MD -MF $out.d -c $in -o $out",
            "link": _words(*linker) + " $in " + _words(*libraries, *ext.extra_link_args) + " -o $out",
        }
        lines = ["ninja_required_version = 1.5"]
        for rule, command in rules.items():
            lines += [f"rule {rule}", f"  command = {command}", "  description = $out"]
            lines += [] if rule == "link" else ["  depfile = $out.d", "  deps = gcc"]
        objects = []
        for source in [*ext.sources, *cuda]:
            objects.append(f"{source}.o")
            lines.append(f"build {objects[-1]}: {'cuda' if source in cuda else 'cxx'} {_path(Path(source).absolute())}")
            if source in cuda:
                lines.append(f"  archs = {' '.join(cuda[source])}")
        return "\n".join([*lines, f"build {_path(target)}: link {' '.join(objects)}"]) + "\n"


def _words(*words: str) -> str:
    """Words of a shell command, as ninja reads them."""
    return shlex.join(words).replace("$", "$$")


def _path(path: Path) -> str:
    """A path as ninja reads it."""
    return re.sub(r"([$ :])", r"$\1", str(path))


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
    packages=sorted({*find_packages(include=["attnreuse", "attnreuse.*"]), "attnreuse.kernels"}),
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension},
)
