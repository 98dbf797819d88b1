"""The step clock reads executed steps off diffusers' schedulers, duplicates and late starts included."""

import diffusers
import pytest
import torch

from attnreuse import AttnReuseError
from attnreuse.clock import StepClock

EXECUTED = {  # of 5 inference steps
    "DDIMScheduler": 5,
    "DPMSolverMultistepScheduler": 5,
    "EulerDiscreteScheduler": 5,
    "PNDMScheduler": 6,
    "UniPCMultistepScheduler": 5,
    "HeunDiscreteScheduler": 9,
}


def scheduler(name):
    extra = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    return getattr(diffusers, name)(**extra)


def ticks(clock, timesteps, calls=1):
    seen = []
    for t in timesteps:
        for _ in range(calls):
            clock.last = clock.place(t)
            seen.append((clock.last.step, clock.last.steps, clock.last.call, clock.last.new_run))
    return seen


@pytest.mark.parametrize("name", EXECUTED)
@pytest.mark.parametrize("calls", [1, 3])
def test_every_executed_step_counts_once(name, calls):
    made, n = scheduler(name), EXECUTED[name]
    clock = StepClock(lambda: made)
    for _ in range(2):  # set_timesteps begins another run
        made.set_timesteps(5)
        expected = [(step, n, call, step == call == 0) for step in range(n) for call in range(calls)]
        assert ticks(clock, made.timesteps, calls) == expected


@pytest.mark.parametrize("name", EXECUTED)
def test_a_run_may_begin_late_and_take_an_expanded_timestep(name):
    made = scheduler(name)
    made.set_timesteps(5)
    clock = StepClock(lambda: made)
    late = made.timesteps[2:]
    assert [step for step, *_ in ticks(clock, (t.expand(4) for t in late))] == list(range(len(late)))
    assert clock.last.steps == len(late)


def test_an_aborted_run_is_followed_by_a_new_one():
    made = scheduler("DDIMScheduler")
    clock = StepClock(lambda: made)
    made.set_timesteps(5)
    ticks(clock, made.timesteps[:3])
    made.set_timesteps(5)
    assert clock.place(made.timesteps[0]).new_run
    ticks(clock, made.timesteps[:3])
    assert clock.place(made.timesteps[0]).new_run  # back to the start on the same timesteps


def test_plain_numbers_are_looked_up_and_ambiguous_ones_refused():
    made = scheduler("PNDMScheduler")
    made.set_timesteps(5)
    clock = StepClock(lambda: made)
    values = made.timesteps.tolist()
    assert clock.place(values[0]).step == 0
    with pytest.raises(AttnReuseError, match=r"timestep 600 is 2 times among the scheduler's 6 timesteps"):
        clock.place(torch.tensor(600))


def test_explicit_steps_override_the_scheduler():
    clock = StepClock(lambda: None)
    seen = []
    for step in (0, 1, 2, 0, 1):
        clock.set(step, 3)
        clock.last = clock.place(999)
        seen.append((clock.last.step, clock.last.new_run))
    assert seen == [(0, True), (1, False), (2, False), (0, True), (1, False)]
    with pytest.raises(ValueError, match=r"step must be in \[0, 3\), got 3"):
        clock.set(3, 3)


def test_sdxl_may_end_early():
    made = scheduler("DDIMScheduler")
    made.set_timesteps(5)
    pipe = type("Pipe", (), {"denoising_end": 0.6, "num_timesteps": 3})()
    assert ticks(StepClock(lambda: made, pipe), made.timesteps[:3])[-1][:2] == (2, 3)
