"""The CUDA kernels without a GPU: their values on an emulated thread block, their resources as recorded."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import compile_cuda
import pytest

TESTS = Path(__file__).parent


def gcc_version():
    if shutil.which("g++") is None:
        return 0
    made = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True)
    return int(re.match(r"\d+", made.stdout)[0])


@pytest.mark.skipif(gcc_version() < 12, reason="needs GCC 12 or later, for _Float16")
def test_values_of_the_kernels_on_an_emulated_thread_block(tmp_path):
    program = tmp_path / "emulate"
    flags = ["-std=c++20", "-O1", "-Wno-unknown-pragmas"]
    subprocess.run(["g++", TESTS / "emulate_cuda.cpp", "-o", program, *flags], check=True)
    ran = subprocess.run([program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_no_kernel_spills_or_needs_more_registers_than_recorded():
    made = subprocess.run([sys.executable, compile_cuda.__file__], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    assert compile_cuda.version() in {nvcc for nvcc, *_ in compile_cuda.recorded()}, "run compile_cuda --record"
