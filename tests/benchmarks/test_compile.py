"""The compile gate: every shipped kernel configuration builds for every architecture, as recorded; no GPU needed.

While the kernels' sources are those that were recorded, one configuration in 13 is built again.
"""

import os
import subprocess
import sys
from pathlib import Path

import compile as compile_gate
import pytest

from attnreuse.kernels import configs

pytest.importorskip("triton", reason="triton is not installed")
OLDEST = "3.6.0"


def gate(*args):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, compile_gate.__file__, *args]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=Path(compile_gate.__file__).parent)


def test_every_configuration_as_recorded():
    made = gate("--sample")
    assert made.returncode == 0, made.stdout + made.stderr


def test_every_configuration_with_the_oldest_triton_served():
    made = gate("--sample", "--triton", OLDEST)
    if made.returncode == compile_gate.NOT_FETCHED:
        pytest.skip(f"pip could not fetch triton {OLDEST}")
    assert made.returncode == 0, made.stdout + made.stderr


def test_every_configuration_is_recorded():
    newest = compile_gate.read(compile_gate.RESULTS, "3.9.0")
    assert set(newest) == set(compile_gate.cases())
    oldest = compile_gate.read(compile_gate.RESULTS, OLDEST)
    assert set(oldest) == set(newest)
    assert not any(now.spill_bytes for now in [*newest.values(), *oldest.values()])


@pytest.mark.parametrize("arch", [80, 86, 87, 89, 90, 100, 103, 110, 120])
@pytest.mark.parametrize(("op", "name"), [("capture", "u8"), ("capture", "u7"), ("reuse", "u8"), ("direct", "u7")])
def test_the_table_has_a_rule_for_every_architecture(op, name, arch):
    for d in (1, 40, 64, 72, 80, 96, 128, 160):
        for plain in (True, False):
            assert isinstance(configs.choose(op, name, d, arch, plain), configs.Config)
