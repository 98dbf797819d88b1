"""Rules: policies made at the start of each run, from the noise levels of its steps."""

import copy
import itertools
import json
import math
import warnings
from inspect import signature

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from hypothesis import given
from hypothesis import strategies as st
from tiny_random import WIDTH, prompt, random_unet, sample

import attnreuse
from attnreuse import Policy, hurry, periodic
from attnreuse.planning.levels import influences, noise_levels, resolved
from attnreuse.planning.rows import best_row, level_error, schedule_error, stretched, strip
from attnreuse.planning.samplers import make_scheduler
from attnreuse.policy import load_policy

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SAMPLERS = [
    "DDIM", "DDPM", "Euler", "Euler a", "Euler Karras", "Heun", "DPM2", "DPM2 a", "DPM++ 2M", "DPM++ 2M SDE Karras",
    "DPM++ 2S", "UniPC", "LMS", "PNDM", "LCM", "TCD",
]  # fmt: skip


def scheduler(name, steps=8):
    made = make_scheduler(DDIMScheduler(**SD).config, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.set_timesteps(steps)
    return made


rows = st.lists(st.booleans(), min_size=1, max_size=24).map(lambda row: (False, *row[1:]))
levels_of = st.lists(st.floats(-10, 10), min_size=2, max_size=9).map(sorted)


# -- rows


@given(levels_of, st.data())
def test_the_best_row_is_the_best_of_all(levels, data):
    steps, error = len(levels), level_error(levels)
    reuse = data.draw(st.integers(0, steps - 1))
    found = best_row(steps, reuse, error)
    every = [
        tuple(step in chosen for step in range(steps)) for chosen in itertools.combinations(range(1, steps), reuse)
    ]
    assert found in every
    assert schedule_error(found, error) == pytest.approx(min(schedule_error(row, error) for row in every), abs=1e-9)


def test_a_thousand_steps_are_resolved_too():
    row = best_row(1000, 500, level_error([i / 50 - 10 for i in range(1000)]))
    assert (len(row), sum(row), row[0]) == (1000, 500, False)


@given(rows)
def test_a_row_stretched_to_its_own_steps_is_itself(row):
    assert stretched(row, len(row)) == row
    levels = [i / 3 for i in range(len(row))]
    assert stretched(row, len(row), levels, levels) == row
    pairs = [(i + 1) // 2 for i in range(len(row))]  # two calls of each level, as Heun makes them
    assert stretched(row, len(row), pairs, pairs) == row


@given(rows, st.integers(1, 60))
def test_a_stretched_row_never_ages_a_map_by_more_calls(row, steps):
    def ages(found):
        return max(map(len, strip(found).split(".")))

    out = stretched(row, steps)
    assert len(out) == steps
    assert not out[0]
    assert ages(out) <= ages(row)


def test_stretching_keeps_the_share_and_its_place_by_noise_level():
    early = [i / 2 for i in range(10)] + [5 + 2 * i for i in range(10)]  # many steps at low levels, few at high ones
    late = [2 * i for i in range(10)] + [18 + i / 2 for i in range(10)]
    row = (False,) * 10 + (False, True) * 5  # reuses from level 5 on
    out = stretched(row, 20, early, late)
    assert min(level for level, on in zip(late, out, strict=True) if on) in (6, 8)
    assert stretched((False, True) * 10, 31) == (*(False, True) * 15, False)


# -- noise levels


@pytest.mark.parametrize("name", SAMPLERS)
def test_levels_are_those_that_the_denoiser_is_called_at(name):
    """Against the scaling that the scheduler itself gives its samples at each call."""
    made = scheduler(name)
    levels, table = noise_levels(made), DDIMScheduler(**SD).alphas_cumprod
    assert len(levels) == len(made.timesteps)
    for t, level in zip(made.timesteps.tolist(), levels, strict=True):
        if t == int(t):
            alpha = table[int(t)].item()
            assert level == pytest.approx(math.log(alpha / (1 - alpha)), abs=1e-4)
        else:
            near = sorted(math.log(table[i].item() / (1 - table[i].item())) for i in (int(t), min(999, int(t) + 1)))
            assert near[0] - 1e-4 <= level <= near[1] + 1e-4
    if name != "PNDM":
        assert levels == sorted(levels)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("LCM", "TCD")])
def test_no_device_is_waited_for(name):
    """Tensors on the meta device have no values to read: timesteps on a GPU are not read either."""
    made = scheduler(name)
    expected, away = noise_levels(made), copy.deepcopy(made)
    away.timesteps = made.timesteps.to("meta")
    away.alphas_cumprod = made.alphas_cumprod.to("meta")
    assert noise_levels(away) == pytest.approx(expected, abs=1e-6)


def test_sigmas_of_ones_own_are_understood_on_a_device():
    made = diffusers.EulerDiscreteScheduler(**SD)
    made.set_timesteps(sigmas=[10.0, 4.0, 1.0, 0.5, 0.0])
    expected = noise_levels(made)
    made.timesteps = made.timesteps.to("meta")
    assert expected == pytest.approx([-2 * math.log(s) for s in (10, 4, 1, 0.5)], abs=1e-2)
    assert noise_levels(made) == pytest.approx(expected, abs=1e-2)


def test_timesteps_that_are_a_fourth_of_log_sigma_are_understood():
    """As Stable Video Diffusion's are."""
    made = diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction", timestep_type="continuous", sigma_max=700.0, sigma_min=0.002,
        use_karras_sigmas=True,
    )  # fmt: skip
    made.set_timesteps(6)
    expected = [-2 * math.log(sigma) for sigma in made.sigmas[:6].tolist()]
    assert noise_levels(made) == pytest.approx(expected, abs=1e-4)
    assert noise_levels(made, made.timesteps.clone()) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("timesteps", [None, [900, 600, 300, 100]])
def test_what_cannot_be_read_is_a_clear_error(timesteps):
    made = diffusers.DDPMScheduler(**SD)
    made.set_timesteps(4) if timesteps is None else made.set_timesteps(timesteps=timesteps)
    made.timesteps, made.custom_timesteps = made.timesteps.to("meta"), True
    with pytest.raises(ValueError, match=r"noise levels of DDPMScheduler cannot be read.*periodic\(interval=2\)"):
        noise_levels(made)


def test_flow_matching_and_zero_terminal_snr_have_finite_levels():
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(4)
    assert noise_levels(flow)[1:] == pytest.approx(
        [2 * math.log((1 - s) / s) for s in flow.sigmas[1:4].tolist()], abs=1e-4
    )
    zero = DDIMScheduler(**SD, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    zero.set_timesteps(4)
    for made in (flow, zero):
        assert all(map(math.isfinite, noise_levels(made)))


@pytest.mark.parametrize("name", ["Heun", "PNDM"])
def test_a_second_call_at_one_level_finds_its_partner(name):
    made = scheduler(name, 10)
    levels = noise_levels(made)
    pairs = [i for i in range(1, len(levels)) if abs(levels[i] - levels[i - 1]) < 1e-3]
    row = hurry(reuse=len(pairs) / len(levels)).resolve(len(levels), levels).reuse
    assert [i for i, on in enumerate(row) if on] == pairs
    assert pairs


@pytest.mark.parametrize("name", SAMPLERS)
def test_influences_are_those_of_the_sampler_itself(name):
    """Against a run whose denoiser is exact for unit Gaussian noise, and errs in one call."""
    made = scheduler(name, 6)
    found = influences(made)
    if name == "DPM++ SDE":  # its noise is no generator's
        assert found is None
        return
    made.register_to_config(prediction_type="v_prediction", clip_sample=False)

    def ends(erring, size=0.02):
        run = copy.deepcopy(made)
        g = {"generator": torch.Generator().manual_seed(3)} if "generator" in signature(run.step).parameters else {}
        x = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * run.init_noise_sigma
        for i, t in enumerate(run.timesteps):
            run.scale_model_input(x, t)
            x = run.step(torch.full_like(x, size * (i == erring)), t, x, **g).prev_sample
        return x

    right = ends(-1)
    assert len(found) == len(made.timesteps)
    for i, influence in enumerate(found):
        assert influence == pytest.approx(float((ends(i) - right).mean().abs()) / 0.02, rel=0.02, abs=2e-4)


def test_the_first_call_of_a_two_call_sampler_matters_less():
    for name in ("DPM2", "DPM2 a", "Heun"):
        found = influences(scheduler(name, 10))
        less = [a < b for a, b in list(itertools.pairwise(found))[::2]]
        assert sum(less) > 0.8 * len(less), name


def test_what_cannot_be_told_is_none_and_levels_alone_decide():
    long = scheduler("DDPM", 300)
    assert influences(long) is None
    levels = noise_levels(long)
    assert resolved(hurry(reuse=0.5), long, 300) == hurry(reuse=0.5).resolve(300, levels)
    with pytest.raises(ValueError, match="influence must be 3 numbers like steps, got 2"):
        hurry(reuse=0.5).resolve(3, [0.0, 1.0, 2.0], [1.0, 1.0])


def test_influences_do_not_touch_the_scheduler():
    for name in ("Heun", "PNDM", "Euler a"):
        made = scheduler(name, 6)
        before = str(vars(made))
        influences(made)
        assert str(vars(made)) == before


# -- rules as data


@pytest.mark.parametrize("rule", [hurry(reuse=0.3), periodic(interval=4)])
def test_a_rule_travels_as_a_file(rule, tmp_path):
    path = tmp_path / "policy.json"
    rule.save(path)
    assert load_policy(path) == rule
    assert type(rule).load(path) == rule
    with pytest.raises(ValueError, match=r"is not a policy file: .*rule: Extra inputs are not permitted"):
        Policy.load(path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"rule": "hurry", "reuse": 1.5}, "reuse: Input should be less than or equal to 1"),
        ({"rule": "hurry"}, "reuse: Field required"),
        ({"rule": "hasty", "reuse": 0.5}, "rule must be one of hurry, periodic, stretch, got 'hasty'"),
        ({"rule": "periodic", "interval": 0}, "interval: Input should be greater than or equal to 1"),
        ([1, 2], "file: Input should be"),
    ],
)
def test_a_broken_rule_file_says_what_is_wrong(data, said, tmp_path):
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=said):
        load_policy(path)


@pytest.mark.parametrize("share", [-0.1, 1.1, 10])
def test_a_share_is_a_share(share):
    with pytest.raises(ValueError, match=r"reuse must be a share in \[0, 1\] without steps"):
        hurry(reuse=share)


def test_counts_and_shares_are_not_mixed_up():
    with pytest.raises(ValueError, match=r"reuse must be a number of steps beside steps, got 0\.5"):
        hurry(20, 0.5)
    with pytest.raises(ValueError, match="max_age counts steps"):
        hurry(reuse=0.5, max_age=1)


@given(st.floats(0, 1), levels_of)
def test_a_share_is_kept_as_far_as_whole_steps_allow(share, levels):
    policy = hurry(reuse=share).resolve(len(levels), levels)
    wanted = share * len(levels)
    assert abs(policy.reuse_steps - wanted) <= 0.5 + 1e-6 or policy.reuse_steps == len(levels) - 1 < wanted
    assert policy.levels == tuple(levels)


# -- runs


def made_for(pipe, name):
    pipe.scheduler = make_scheduler(pipe.scheduler.config, name)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_rule_fits_any_run_and_equals_the_policy_it_makes(pipe, name):
    made_for(pipe, name)
    for steps in (5, 6):
        with attnreuse.enable(pipe, hurry(reuse=0.5), strict=True) as session:
            by_rule, ran = sample(pipe, steps), session.report()
        executed = len(pipe.scheduler.timesteps)
        policy = resolved(hurry(reuse=0.5), pipe.scheduler, executed)
        assert ran.policy == str(policy)
        assert ran.layers[0].reused == policy.reuse_steps == executed // 2
        with attnreuse.enable(pipe, policy, strict=True):
            assert torch.equal(sample(pipe, steps), by_rule)


def test_without_a_policy_the_default_rule_runs(pipe):
    with attnreuse.enable(pipe) as session:
        for steps in (4, 7):
            sample(pipe, steps)
            assert session.report().layers[0].reused == steps // 2
            assert session.report().policy.startswith("hurry(reuse=0.5) .")


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_a_rule_fits_a_run_that_begins_late(pipe, strength):
    again = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    again.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 16, 16)
    with attnreuse.enable(again, periodic(interval=2), strict=True) as session:
        again(image=image, strength=strength, num_inference_steps=10, output_type="latent", **prompt())
    executed = int(10 * strength)
    assert (session.report().steps, session.report().layers[0].reused) == (executed, executed // 2)


def test_timesteps_and_sigmas_of_ones_own_are_resolved_for(pipe):
    made_for(pipe, "Euler")
    for own in ({"timesteps": [900, 600, 300, 200, 100]}, {"sigmas": [9.0, 3.0, 1.0, 0.5, 0.1, 0.0]}):
        with attnreuse.enable(pipe, hurry(reuse=0.4), strict=True) as session:
            sample(pipe, None, **own)
        steps = len(pipe.scheduler.timesteps)
        expected = resolved(hurry(reuse=0.4), pipe.scheduler, steps)
        assert session.report().policy == str(expected)


def test_a_fixed_policy_is_stretched_where_that_is_wanted(pipe):
    policy = hurry(6, 3)
    with attnreuse.enable(pipe, policy, fit="stretch", strict=True) as session:
        for steps in (4, 6, 9):
            sample(pipe, steps)
            report = session.report()
            assert report.layers[0].reused == policy.stretch(steps).reuse_steps
            assert ("stretched from 6 steps" in report.policy) == (steps != 6)
    with pytest.raises(ValueError, match="fit must be 'exact' or 'stretch', got 'any'"):
        attnreuse.enable(pipe, policy, fit="any")


def test_a_policy_by_layers_is_stretched_row_by_row(pipe):
    policy = Policy(steps=4, reuse={"mid*": [0, 1, 1, 1], "*": [0, 1, 0, 1]})
    with attnreuse.enable(pipe, policy, fit="stretch", strict=True) as session:
        sample(pipe, 8)
    reused = {layer.name.split("_")[0]: layer.reused for layer in session.report().layers}
    assert reused == {"mid": 6, "down": 4, "up": 4}


def test_a_scheduler_without_noise_levels_is_refused_with_what_to_do(pipe):
    pipe.scheduler = diffusers.IPNDMScheduler()
    with pytest.raises(ValueError, match=r"IPNDMScheduler has no noise levels.*periodic\(interval=2\)"):
        attnreuse.enable(pipe, hurry(reuse=0.5))
    attnreuse.enable(pipe, periodic(interval=2)).disable()


@torch.no_grad()
def looped(unet, timesteps, session, told=False):
    """What the first layer does at each step of a loop of one's own, in letters."""
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 7, WIDTH)
    for i, t in enumerate(timesteps):
        if told:
            session.step(i, len(timesteps))
        x = x - 0.05 * unet(x, t, context).sample
    return session.report().policy.split()[-1]


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("loop", ["whole", "late", "inverted", "copy", "reversed copy", "own"])
def test_loops_of_ones_own_are_resolved_by_the_levels_they_go_through(loop, told):
    unet, made = random_unet(), scheduler("Euler Karras", 12)
    levels, timesteps = noise_levels(made), made.timesteps
    timesteps, levels = {
        "whole": (timesteps, levels),
        "late": (timesteps[5:], levels[5:]),
        "inverted": ([timesteps[i] for i in range(11, -1, -1)], levels[::-1]),
        "copy": (timesteps.clone(), levels),
        "reversed copy": (timesteps.flip(0), levels[::-1]),
        "own": (torch.tensor([900.0, 400.0, 200.0, 100.0]), None),
    }[loop]
    levels = noise_levels(made, timesteps) if levels is None else levels
    influence = {"whole": influences(made), "late": influences(made)[5:]}.get(loop)  # of other walks it is not known
    expected = strip(hurry(reuse=0.4).resolve(len(levels), levels, influence).reuse)
    with attnreuse.enable(unet, hurry(reuse=0.4), scheduler=made) as session:
        assert looped(unet, timesteps, session, told) == expected
        assert session.report().layers[0].reused == expected.count("R")


def test_told_steps_that_are_not_the_schedulers_compute_and_say_so():
    unet, made = random_unet(), scheduler("Heun", 5)  # 9 calls, told as 5 steps
    with (
        attnreuse.enable(unet, hurry(reuse=0.4), scheduler=made) as session,
        pytest.warns(UserWarning, match="number 0 of 9, so the noise levels of the others cannot be told"),
    ):
        looped(unet, made.timesteps[:5], session, told=True)
    assert session.report().layers[0].reused == 0


def test_every_second_timestep_of_a_scheduler_is_a_step(pipe):
    pipe.scheduler.set_timesteps(12)
    pipe.scheduler.timesteps = pipe.scheduler.timesteps[::2]
    with attnreuse.enable(pipe.unet, periodic(interval=2), scheduler=pipe.scheduler) as session:
        assert looped(pipe.unet, pipe.scheduler.timesteps, session) == ".R.R.R"
        assert (session.report().steps, session.report().layers[0].reused) == (6, 3)


def test_a_scheduler_that_cannot_be_read_does_not_matter_to_a_rule_without_levels():
    class Own:
        timesteps, sigmas = torch.tensor([900, 700, 300, 100]), torch.tensor([10.0, 5.0, 2.0, float("nan")])

    unet = random_unet()
    with attnreuse.enable(unet, periodic(interval=2), scheduler=Own()) as session:
        looped(unet, Own.timesteps, session)
        assert session.report().layers[0].reused == 2
    with (
        attnreuse.enable(unet, hurry(reuse=0.5), scheduler=Own()) as session,
        pytest.warns(UserWarning, match="Own has noise levels that are no numbers.*every layer computes"),
    ):
        looped(unet, Own.timesteps, session)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: load_policy("hurry"), "policy must be a Policy, a rule such as"),
        (lambda: load_policy(0.5), "policy must be a Policy, a rule such as"),
        (lambda: hurry(reuse="0.5"), "reuse must be a number, got '0.5'"),
        (lambda: hurry(20, math.inf), "reuse must be a number, got inf"),
        (lambda: periodic(3), "interval must be a whole number"),
        (lambda: periodic(interval=2.5), "interval must be a whole number"),
        (lambda: hurry(4, 2).stretch(0), "steps must be at least 1, got 0"),
        (lambda: hurry(4, 2).stretch(3, [1.0, 2.0]), "levels must be 3 finite numbers"),
        (lambda: hurry(reuse=0.5).resolve(2, [1.0, math.nan]), "levels must be 2 finite numbers"),
    ],
)
def test_bad_input_is_one_clear_error(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_told_steps_need_a_scheduler_for_a_rule_that_goes_by_levels():
    unet, made = random_unet(), scheduler("DDIM", 4)
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 7, WIDTH)

    def run(session):
        for step in range(4):
            session.step(step, 4)
            unet(x, int(made.timesteps[step]), context)
        return session.report()

    said = "told steps have noise levels where.*every layer computes"
    with torch.no_grad():
        with attnreuse.enable(unet, hurry(reuse=0.5)) as session, pytest.warns(UserWarning, match=said):
            assert run(session).layers[0].reused == 0
        with (
            attnreuse.enable(unet, hurry(reuse=0.5), strict=True) as session,
            pytest.raises(attnreuse.PolicyMismatchError, match="pass scheduler= to"),
        ):
            run(session)
        with attnreuse.enable(unet, hurry(reuse=0.5), scheduler=made, strict=True) as session:
            assert run(session).layers[0].reused == 2
        with attnreuse.enable(unet, periodic(interval=2), strict=True) as session:
            assert run(session).layers[0].reused == 2


class OwnEuler(diffusers.FlowMatchEulerDiscreteScheduler):
    """Flow matching under a name that does not say so."""


@pytest.mark.parametrize("cls", [diffusers.FlowMatchEulerDiscreteScheduler, OwnEuler])
@pytest.mark.parametrize("set_by", [{"num_inference_steps": 20}, {"sigmas": np.linspace(1, 0.05, 20), "mu": 1.15}])
def test_flow_matching_keeps_maps_fresh(set_by, cls):
    """Measured on a small FLUX.1: alternating reuse is 6 dB above the rule of other samplers (docs/results.md)."""
    flow = cls(shift=3.0, use_dynamic_shifting="mu" in set_by)
    flow.set_timesteps(**set_by)
    assert strip(resolved(hurry(reuse=0.5), flow, 20).reuse) == ".R" * 10
    quarter = resolved(hurry(reuse=0.25), flow, 20).reuse
    assert "RR" not in strip(quarter)
    heun = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    heun.set_timesteps(8)
    levels = noise_levels(heun)
    for reuses, before, level in zip(resolved(hurry(reuse=0.4), heun, 15).reuse[1:], levels, levels[1:], strict=False):
        assert not reuses or before == level
