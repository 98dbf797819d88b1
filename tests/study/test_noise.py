"""The noise of a stochastic sampler held fixed: coarser runs follow the path of a finer one."""

import inspect
import itertools
import math

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline

from attnreuse import AttnReuseError
from attnreuse.demo import tiny_shapes
from attnreuse.planning.levels import noise_levels
from attnreuse.planning.samplers import make_scheduler
from attnreuse.study.compare.measure import measure
from attnreuse.study.compare.methods import SAME_NOISE, Method
from attnreuse.study.noise import NoisePath
from attnreuse.study.setting import Setting

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (1, 1, 64, 64)
ONE_CALL = {
    "EulerAncestralDiscreteScheduler": {},
    "DDPMScheduler": {},
    "DPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
}


def scheduler(name, **changes):
    return getattr(diffusers, name).from_config({**SD, **ONE_CALL.get(name, {}), **changes})


def walk(made, steps, until=None):
    """The sample before the call `until`, or the last, where the denoiser knows that pictures are all zero.

    All that moves the sample is noise.
    """
    made.set_timesteps(steps)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * made.init_noise_sigma
    given = {"generator": torch.Generator().manual_seed(1)}
    given = given if "generator" in inspect.signature(made.step).parameters else {}
    for t in made.timesteps[:until]:
        scaled = made.scale_model_input(x, t)
        level = noise_levels(made, t[None])[0]
        noise = scaled / math.sqrt(1 / (1 + math.exp(level)))  # eps, where the picture is zero
        x = made.step(noise, t, x, **given).prev_sample
    return x


@pytest.mark.parametrize("name", ONE_CALL)
def test_the_same_steps_get_the_same_noise(name):
    made = scheduler(name)
    path = NoisePath(made)
    with path.recorded(0, 20):
        first = walk(made, 20)
    assert path.is_noisy
    with path.followed(0, 20):
        again = walk(made, 20)
    torch.testing.assert_close(again, first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ONE_CALL)
@pytest.mark.parametrize("steps", [7, 13, 19, 40])
def test_other_steps_get_standard_normal_noise_along_the_path(name, steps):
    made = scheduler(name)
    path = NoisePath(made)
    with path.recorded(0, 20):
        walk(made, 20)
    given, module = [], __import__(type(made).__module__, fromlist=["x"])
    with path.followed(0, steps):
        draw = module.randn_tensor
        module.randn_tensor = lambda *a, **k: given.append(draw(*a, **k)) or given[-1]
        walk(made, steps)
        module.randn_tensor = draw
    assert steps - 1 <= len(given) <= steps
    for noise in given:
        assert abs(noise.mean()) < 5 / 64
        assert abs(noise.std() - 1) < 0.06
    for a, b in itertools.combinations([n.flatten() for n in given], 2):  # independent, as the sampler expects
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 6 / 64
    with path.followed(0, steps):
        repeated = walk(made, steps)
    with path.followed(0, steps):
        assert torch.equal(walk(made, steps), repeated)


@pytest.mark.parametrize("name", ONE_CALL)
def test_runs_of_any_steps_end_alike_where_only_noise_moves_the_sample(name):
    """From one start to one end, by grids that share nothing else: exact for such a denoiser, whatever the steps."""
    ends = {}
    for steps in (20, 10, 4):
        made = scheduler(name, timestep_spacing="linspace")
        if steps == 20:
            path = NoisePath(made)
        noise = path.recorded(0, steps) if steps == 20 else path.followed(0, steps)
        with noise:
            ends[steps] = walk(made, steps, until=-1)
    scale = ends[20].std()
    for steps in (10, 4):
        assert (ends[steps] - ends[20]).std() < (0.15 if "DPM" in name else 1e-3) * scale  # it is of second order
    assert (walk(made, 4, until=-1) - ends[20]).std() > scale


def test_coarse_noise_is_the_sum_of_the_fine_noise_it_covers():
    made = scheduler("EulerAncestralDiscreteScheduler")
    path = NoisePath(made)
    with path.recorded(0, 20):
        walk(made, 20)
    made.set_timesteps(20)
    ends = [math.exp(level) for level in noise_levels(made)]
    halves = path._increments(0, [ends[0], ends[4], ends[9]])
    for (low, high), noise in zip(((0, 4), (4, 9)), halves, strict=True):
        lengths = [math.sqrt(ends[i + 1] - ends[i]) for i in range(low, high)]
        total = sum(length * draw for length, draw in zip(lengths, path.draws[0][low:high], strict=True))
        torch.testing.assert_close(noise, total / math.sqrt(ends[high] - ends[low]), rtol=1e-4, atol=1e-4)


def test_the_scheduler_draws_for_itself_again():
    made = scheduler("EulerAncestralDiscreteScheduler")
    before, path = walk(made, 5), NoisePath(made)
    with path.recorded(0, 5):
        assert torch.equal(walk(made, 5), before)
    with pytest.raises(ZeroDivisionError), path.followed(0, 4):
        raise ZeroDivisionError
    assert torch.equal(walk(made, 5), before)


def test_a_sampler_without_noise_has_none_and_one_of_two_calls_says_so():
    for name in ("DDIMScheduler", "HeunDiscreteScheduler"):
        made = scheduler(name)
        path = NoisePath(made)
        with path.recorded(0, 5):
            walk(made, 5)
        assert not path.is_noisy
    made = scheduler("KDPM2AncestralDiscreteScheduler")
    path = NoisePath(made)
    with path.recorded(0, 5):
        walk(made, 5)
    with (
        pytest.raises(AttnReuseError, match="noise of KDPM2AncestralDiscreteScheduler cannot be held fixed"),
        path.followed(0, 4),
    ):
        pass


def test_fewer_steps_of_the_same_noise_end_nearer_to_the_full_run():
    pipe = StableDiffusionPipeline.from_pretrained(tiny_shapes.FOLDER)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_scheduler(pipe.scheduler.config, "Euler a")
    methods = [Method("full", "full", 12), Method("plain", "plain steps", 8), Method("same", SAME_NOISE, 8)]
    rows = measure(pipe, Setting(("a red circle on gray",), 12, guidance=2.5), methods, [], (), rounds=1)
    psnr = {row.method.name: row.scores.get("psnr") for row in rows}
    assert psnr["same"] > psnr["plain"] + 3
