"""The CPU kernels under the address and undefined-behaviour sanitizers: `sanitize.cpp`, built here and run."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-O1", "-g1", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SOURCES = [ROOT / "tests/native/sanitize.cpp", *sorted(ROOT.glob("csrc/cpu/*.cpp"))]
COMPILER = shutil.which("g++")


@pytest.mark.skipif(COMPILER is None, reason="no g++")
def test_no_access_out_of_bounds_and_no_undefined_behaviour(tmp_path):
    objects = [tmp_path / source.with_suffix(".o").name for source in SOURCES]
    compilers = [
        subprocess.Popen([COMPILER, "-c", source, "-o", target, "-Wno-psabi", *FLAGS])
        for source, target in zip(SOURCES, objects, strict=True)
    ]
    assert not any([compiler.wait() for compiler in compilers])
    program = tmp_path / "sanitize"
    subprocess.run([COMPILER, *objects, "-o", program, *FLAGS], check=True)
    ran = subprocess.run([program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
