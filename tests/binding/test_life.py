"""No map reaches another run: whatever was done to a pipeline before, a run gives the bits of a fresh process.

`helpers/life.py` draws the acts; it also lives long lives by command.
"""

import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from life import FreshProcesses, live


@pytest.fixture(scope="module")
def alone():
    """With one thread here as there: others give other bits."""
    threads, processes = torch.get_num_threads(), FreshProcesses()
    torch.set_num_threads(1)
    yield processes
    processes.close()
    torch.set_num_threads(threads)


@pytest.mark.skipif(sys.platform == "win32", reason="fresh processes are forked")
@given(st.integers(0, 2**32), st.integers(20, 60))
@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_life_gives_the_bits_of_fresh_processes_and_keeps_no_map(alone, seed, acts):
    live(acts, seed, alone)


@pytest.mark.skipif(sys.platform == "win32", reason="fresh processes are forked")
def test_a_long_life_reuses_and_does_everything(alone):
    counts = live(150, 1, alone)
    assert counts["reused"] > 15
    assert {"run", "run in a thread", "run within a run", "enable", "disable", "lora", "stopped: denoiser"} <= set(
        counts
    )
