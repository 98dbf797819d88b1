"""No map reaches another run: whatever ran before, a run gives the bits of a fresh process."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fresh_run import RUNS, digest, policy_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_random import random_pipeline, sample

import attnreuse


@pytest.fixture(scope="module")
def alone():
    """Digest of every run, each made in a process of its own."""
    here = Path(__file__).parent

    def run(name):
        made = subprocess.run([sys.executable, here / "fresh_run.py", name], capture_output=True, text=True, cwd=here)
        assert made.returncode == 0, made.stderr
        return made.stdout.split()[-1]

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(RUNS, pool.map(run, RUNS), strict=True))


@pytest.fixture(scope="module")
def worn():
    """A pipeline that every example goes on using."""
    return random_pipeline()


class StoppedError(Exception):
    pass


def stop_at(last):
    def callback(pipe, step, t, kwargs):
        if step == last:
            raise StoppedError
        return kwargs

    return callback


steps_of_a_life = st.lists(
    st.tuples(st.sampled_from(list(RUNS)), st.one_of(st.none(), st.none(), st.integers(0, 3))), min_size=2, max_size=5
)


@given(steps_of_a_life, st.booleans())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_sequence_of_runs_gives_the_bits_of_fresh_processes(alone, worn, life, one_session):
    """`life`: runs by name, each complete or stopped by an exception after the given step."""
    session = None
    for name, stopped in life:
        run = RUNS[name]
        if session is None or not one_session or session.policy.steps != run["steps"]:
            session = attnreuse.enable(worn, policy_for(run["steps"]), layers="all")
        if stopped is not None:
            with pytest.raises(StoppedError):
                sample(worn, callback_on_step_end=stop_at(stopped), **run)
        else:
            assert digest(sample(worn, **run)) == alone[name], f"{name} in {life}"
    attnreuse.disable(worn)


def test_the_runs_differ_so_that_a_mix_up_would_show(alone):
    assert len(set(alone.values())) == len(RUNS)
