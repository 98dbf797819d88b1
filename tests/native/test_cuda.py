"""The CUDA kernels without a GPU: their values on an emulated thread block, their resources as recorded."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import compile_cuda
import pytest
import torch

from attnreuse.backends.cuda import readable, writable

TESTS = Path(__file__).parent


def gcc_version():
    if shutil.which("g++") is None:
        return 0
    made = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True)
    return int(re.match(r"\d+", made.stdout)[0])


@pytest.mark.parametrize("offset", [0, 1, 4, 8])
def test_values_are_handed_over_where_16_bytes_can_be_read_at_once(offset):
    """A contiguous slice of a flat buffer may start anywhere; `.contiguous()` gives it back as it is."""
    flat = torch.randn(2 * 3 * 7 * 40 + 16).half()
    start = -flat.data_ptr() // 2 % 8
    value = flat[start + offset :][: 2 * 3 * 7 * 40].view(2, 3, 7, 40)
    read = readable(value)
    assert torch.equal(read, value)
    assert read.data_ptr() % 16 == 0
    assert (read is value) == (offset % 8 == 0)


def test_values_that_do_not_lie_in_rows_of_16_bytes_are_copied():
    value = torch.randn(2, 3, 40, 7).half().mT
    for given in (value, value.contiguous()[:, :1].expand(2, 3, 7, 40), value.contiguous()[..., 4:]):
        read = readable(given)
        assert torch.equal(read, given)
        assert read is not given
        assert read.is_contiguous()
    heads = torch.randn(2, 7, 3, 40).half().transpose(1, 2)  # as diffusers has them
    assert readable(heads) is heads


def test_an_output_of_odd_columns_is_written_by_way_of_another():
    out = torch.zeros(2, 3, 7, 44).half()
    even, odd = out[..., 2:42], out[..., 1:41]
    assert writable(even) is even
    assert writable(odd) is not odd
    assert writable(odd).shape == odd.shape


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
