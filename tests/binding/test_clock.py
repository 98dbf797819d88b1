"""The step clock follows the calls: duplicates, late starts, other schedulers, put-back states, plain numbers."""

import copy

import diffusers
import pytest
import torch

from attnreuse.adapters import Adapter
from attnreuse.binding.clock import StepClock
from attnreuse.errors import UnknownStepError

EXECUTED = {  # of 5 inference steps
    "DDIMScheduler": 5,
    "DPMSolverMultistepScheduler": 5,
    "EulerDiscreteScheduler": 5,
    "PNDMScheduler": 6,
    "UniPCMultistepScheduler": 5,
    "HeunDiscreteScheduler": 9,
}


def scheduler(name, steps=5):
    extra = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    made = getattr(diffusers, name)(**extra)
    made.set_timesteps(steps)
    return made


def places(timesteps, *schedulers):
    clock = StepClock()
    found = [clock.place(t, lambda: schedulers) for t in timesteps]
    assert len({place.walk for place in found}) == 1
    return [(place.position, place.length) for place in found]


@pytest.mark.parametrize("name", EXECUTED)
@pytest.mark.parametrize("known", [True, False])
def test_every_element_of_timesteps_has_its_place(name, known):
    made, n = scheduler(name), EXECUTED[name]
    assert places(made.timesteps, *([made] if known else [])) == [(i, n) for i in range(n)]


@pytest.mark.parametrize("name", EXECUTED)
def test_a_walk_may_begin_late_end_early_and_take_expanded_timesteps(name):
    made, n = scheduler(name), EXECUTED[name]
    part = [t.expand(4) for t in made.timesteps[2:-1]]
    assert places(part, made) == [(i, n) for i in range(2, n - 1)]


def test_timesteps_are_another_walk_than_those_of_another_scheduler_or_time():
    made, clock = scheduler("DDIMScheduler"), StepClock()
    first = clock.place(made.timesteps[0], lambda: [made])
    made.set_timesteps(5)
    second = clock.place(made.timesteps[0], lambda: [made])
    other = clock.place(scheduler("EulerDiscreteScheduler").timesteps[0], lambda: [made])
    assert len({first.walk, second.walk, other.walk}) == 3


def test_a_state_put_back_between_calls_does_not_matter():
    """Panorama copies the scheduler's state for every view; the loop goes on over the first timesteps."""
    made, clock = scheduler("PNDMScheduler"), StepClock()
    found = []
    for t in made.timesteps:
        for _ in range(2):
            made.__dict__.update(copy.deepcopy(made.__dict__))
            found.append(clock.place(t, lambda: [made]))
    assert [place.position for place in found] == [i for i in range(6) for _ in range(2)]
    assert len({place.walk for place in found}) == 1


def test_reversed_timesteps_walk_on():
    made = scheduler("DDIMScheduler")
    assert places(reversed(made.timesteps), made) == [(i, 5) for i in range(5)]
    assert places([made.timesteps[4 - i] for i in range(5)], made) == [(4 - i, 5) for i in range(5)]


def test_the_scheduler_in_force_is_the_one_whose_timestep_it_is():
    first, second = scheduler("DDIMScheduler"), scheduler("EulerDiscreteScheduler", 7)
    place = StepClock().place(second.timesteps[3], lambda: [first, second])
    assert (place.scheduler, place.position, place.length) == (second, 3, 7)


def test_plain_numbers_are_looked_up():
    made = scheduler("DDIMScheduler")
    assert places(made.timesteps.tolist(), made) == [(i, 5) for i in range(5)]
    assert places([t.clone() for t in made.timesteps], made) == [(i, 5) for i in range(5)]


def test_numbers_that_repeat_take_the_schedulers_own_count():
    made = scheduler("HeunDiscreteScheduler")
    x, found = torch.randn(1, 4, 8, 8), []
    for t in made.timesteps.tolist():
        if found:  # before its first step the scheduler has no count
            found.append(StepClock().place(t, lambda: [made]).position)
        else:
            found.append(0)
        x = made.step(torch.zeros_like(x), torch.tensor(t), x).prev_sample
    assert found == list(range(9))


def test_what_cannot_be_told_is_refused_and_says_how_to_help():
    made, clock = scheduler("PNDMScheduler"), StepClock()
    with pytest.raises(UnknownStepError, match=r"600 is 2 times among the scheduler's 6 timesteps; call session\.step"):
        clock.place(torch.tensor(600), lambda: [made])
    with pytest.raises(UnknownStepError, match=r"3 is not among the scheduler's 6 timesteps; call session\.step"):
        clock.place(3, lambda: [made])
    with pytest.raises(UnknownStepError, match=r"pass scheduler= .* or call session\.step"):
        clock.place(3, list)
    with pytest.raises(UnknownStepError, match="differ within the batch"):
        clock.place(torch.tensor([800, 600]), lambda: [made])


def test_steps_that_are_told_override_the_scheduler():
    made, clock, seen = scheduler("DDIMScheduler"), StepClock(), []
    for step in (0, 0, 1, 2, 0, 1):
        clock.set(step, 3)
        seen.append(clock.place(made.timesteps[4], lambda: [made]))
    assert [(place.position, place.length) for place in seen] == [(s, 3) for s in (0, 0, 1, 2, 0, 1)]
    assert [place.walk == seen[0].walk for place in seen] == [True] * 4 + [False] * 2  # back to the start: another walk
    clock.reset()
    assert clock.place(made.timesteps[4], lambda: [made]).position == 4
    with pytest.raises(ValueError, match=r"step must be in \[0, 3\), got 3"):
        clock.set(3, 3)


def test_timesteps_in_the_dtype_of_the_model_are_looked_up():
    """Half precision rounds them, as pipelines that cast them do."""
    made, clock = scheduler("DDIMScheduler", 20), StepClock()
    clock.as_given = Adapter().as_given
    for dtype in (torch.bfloat16, torch.float32, torch.int64):
        found = [clock.place(t.to(dtype).clone(), lambda: [made]) for t in made.timesteps]
        assert [place.position for place in found] == list(range(20))


def test_a_told_step_is_given_up_where_more_timesteps_come_than_a_step_has():
    made, clock = scheduler("DDIMScheduler", 10), StepClock()
    clock.set(4, 10)
    seen = [clock.place(t, lambda: [made]) for t in made.timesteps]
    assert [place.position for place in seen] == [4] * 4 + list(range(4, 10))
    clock.set(4, 10)
    assert {clock.place(torch.tensor(500), lambda: [made]).position for _ in range(20)} == {4}
