"""A policy is advice, a map is evidence: layers reuse what they wrote for this run, branch and shape, or compute."""

import asyncio
import contextlib
import copy
import random
import threading
import warnings
from concurrent.futures import CancelledError, ThreadPoolExecutor

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.callbacks import SDCFGCutoffCallback
from life import maps_alive
from reference_run import reference
from tiny_random import TOKENS, WIDTH, from_another_thread, random_pipeline, random_unet, sample

import attnreuse
from attnreuse import Policy, hurry, periodic
from attnreuse.binding.conditions import Conditions

LATE = Policy(steps=4, reuse=[0, 1, 1, 1])


def latents(step, batch=1):
    """The sample at `step` of one path."""
    start, change = (torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    return start + 0.1 * step * change


def call(unet, step=0, batch=1, context=None, **given):
    """The denoiser's output for the sample at `step`."""
    x = latents(step, batch)
    context = conditions(0, batch) if context is None else context
    with torch.no_grad():
        return unet(x, 10, context, **given).sample


def conditions(seed, batch=1, tokens=TOKENS):
    return torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(100 + seed))


@pytest.fixture
def unet():
    return random_unet()


def kinds(session):
    """What the first layer did: computed, captured, reused."""
    layer = session.report().layers[0]
    return layer.computed, layer.captured, layer.reused


class Owners:
    """Notes whose map every reuse applies; `now` is set to whose call it is."""

    def __init__(self, monkeypatch):
        from attnreuse import ops

        self.now, self.foreign, self.own, wrote = None, 0, 0, {}
        capture, reuse = ops.capture_into, ops.reuse_into

        def capture_into(storage, *args, **kwargs):
            wrote[storage.data_ptr()] = self.now
            return capture(storage, *args, **kwargs)

        def reuse_into(storage, *args, **kwargs):
            mine = wrote[storage.data_ptr()] == self.now
            self.own, self.foreign = self.own + mine, self.foreign + (not mine)
            return reuse(storage, *args, **kwargs)

        monkeypatch.setattr(ops, "capture_into", capture_into)
        monkeypatch.setattr(ops, "reuse_into", reuse_into)


@pytest.fixture
def owners(monkeypatch):
    return Owners(monkeypatch)


# -- a capture counts only once the layer has written


def test_a_layer_that_was_not_called_has_captured_nothing(unet):
    """As under DeepCache or PAB, which skip blocks: what was to be captured is not there."""
    skipped = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    context = conditions(0)
    policy = Policy(steps=3, reuse=[0, 1, 0])
    with attnreuse.enable(unet, policy) as session:
        skipped.forward = lambda hidden_states, *a, **k: hidden_states
        session.step(0, 3)
        call(unet, 0, context=context)
        del skipped.forward
        session.step(1, 3)
        with pytest.warns(
            UserWarning, match="mid_block.*computes at step 1.*wrote no map at step 0: it was not called"
        ):
            call(unet, 1, context=context)
        layers = {layer.name: layer for layer in session.report().layers}
    mid = layers["mid_block.attentions.0.transformer_blocks.0.attn1"]
    assert (mid.computed, mid.captured, mid.reused) == (1, 0, 0)
    assert mid.planned == {"computed": 0, "captured": 1, "reused": 1, "held": 0}
    assert sum(mid.reasons.values()) == 2
    assert all(layer.reused == 1 for name, layer in layers.items() if name != mid.name)


def test_strict_raises_every_time(unet):
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(4)
    with torch.no_grad(), attnreuse.enable(unet, Policy(steps=4, reuse=[0, 1, 1, 1]), strict=True):
        unet(latents(0), scheduler.timesteps[0], conditions(0))
        for _ in range(3):
            with pytest.raises(attnreuse.StaleMapError):
                unet(latents(1), scheduler.timesteps[1], conditions(1))


def test_strict_raises_where_a_map_is_missing(unet):
    with attnreuse.enable(unet, Policy(steps=4, reuse=[0, 0, 1, 1]), strict=True) as session:
        session.step(0, 4)
        call(unet)
        session.step(2, 4)  # step 1, which was to capture, was left out
        with pytest.raises(attnreuse.StaleMapError, match="computes at step 2 instead of reusing: its map of step 1"):
            call(unet)


def test_a_missing_map_is_captured_where_the_policy_goes_on_reusing(unet):
    context = conditions(0)
    with attnreuse.enable(unet, Policy(steps=4, reuse=[0, 0, 1, 1])) as session, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in (0, 2, 3):
            session.step(step, 4)
            out = call(unet, step, context=context)
            if step < 3:
                torch.testing.assert_close(out, call(copy.deepcopy(unet), step, context=context), rtol=0, atol=1e-5)
        assert kinds(session) == (1, 1, 1)


# -- a branch is known by what it attends over


def test_branches_may_stop_start_and_change_places(unet):
    """Guidance call by call: maps follow the conditions, whatever the order of the calls."""
    p, n = conditions(1), conditions(2)
    order = [(n, p), (p, n), (p,), (p,)]
    alone = {}
    for name, context in (("p", p), ("n", n)):
        with attnreuse.enable(unet, LATE, map_format="fp32") as session:
            outs = []
            for step in range(4):
                session.step(step, 4)
                outs.append(call(unet, step, context=context))
            alone[name] = outs
    with attnreuse.enable(unet, LATE, map_format="fp32") as session:
        for step, contexts in enumerate(order):
            session.step(step, 4)
            for context in contexts:
                assert torch.equal(call(unet, step, context=context), alone["p" if context is p else "n"][step])


def test_requests_of_one_prompt_are_told_apart_by_their_samples(unet):
    """Two seeds interleaved, one given up: the other does not get its maps."""
    context, g = conditions(0), torch.Generator().manual_seed(0)
    starts = torch.randn(2, 1, 4, 8, 8, generator=g)
    paths = [[start + 0.1 * step for step in range(4)] for start in starts]

    def run(who):
        outs = {0: [], 1: []}
        with attnreuse.enable(unet, LATE, map_format="fp32") as session, torch.no_grad():
            for step, requests in enumerate(who):
                session.step(step, 4)
                for i in requests:
                    outs[i].append(unet(paths[i][step], 10, context).sample)
        return outs

    both, second = run([(0, 1), (0, 1), (1,), (1,)]), run([(1,)] * 4)
    assert all(torch.equal(a, b) for a, b in zip(both[1], second[1], strict=True))


def test_equal_conditions_in_other_memory_are_the_same(unet):
    with attnreuse.enable(unet, LATE) as session:
        for step in range(4):
            session.step(step, 4)
            call(unet, step, context=conditions(0).clone())
        assert kinds(session) == (0, 1, 3)


def test_calls_of_one_sample_are_told_apart_by_what_else_they_are_given(unet, owners):
    """With and without a ControlNet's residuals: one of the two calls is left out, or both change places."""
    context = conditions(0)
    residuals = {"mid_block_additional_residual": torch.ones(1, 32, 4, 4)}
    for orders in ([[1, 0]] * 3 + [[0]] * 3, [[1, 0], [0, 1]] * 3, [[0, 1]] * 2 + [[1]] * 2 + [[1, 0]] * 2):
        with attnreuse.enable(unet, SIX) as session, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for step, order in enumerate(orders):
                for owners.now in order:
                    session.step(step, 6)
                    call(unet, step, context=context, **(residuals if owners.now else {}))
    assert owners.foreign == 0
    assert owners.own > 7 * 12


@pytest.mark.parametrize("separate", [True, False])
def test_values_are_compared_only_where_memory_differs(unet, monkeypatch, separate):
    """A look at values waits for the device: two prompts of a step cost none once they are known."""
    compared, same = [], Conditions._same_values
    monkeypatch.setattr(Conditions, "_same_values", lambda *a: compared.append(1) or same(*a))
    contexts = [conditions(0), conditions(1)]
    with attnreuse.enable(unet, SIX) as session:
        for step in range(6):
            for context in contexts:
                session.step(step, 6)
                call(unet, step, context=context.clone() if separate else context)
        assert kinds(session) == (0, 4, 8)
    assert bool(compared) == separate


SIX = Policy(steps=6, reuse=[0, 1, 1, 0, 1, 1])
ORDERS = {  # which of several images of one prompt each call is for, step by step
    "together": [[0, 1, 2]] * 6,
    "in any order": [random.Random(i).sample([0, 1, 2], 3) for i in range(6)],
    "one drops out": [[0, 1, 2]] * 2 + [[1, 2]] * 4,
    "one joins and is called first": [[0]] * 2 + [[1, 0]] * 4,
    "a dozen": [list(range(12))] * 6,
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("samples", ["new", "overwritten", "views of a canvas", "inference"])
def test_images_of_one_prompt_never_get_each_others_maps(unet, owners, order, samples):
    scheduler, context = DDIMScheduler(clip_sample=False, steps_offset=1), conditions(9)
    scheduler.set_timesteps(6)
    with (
        torch.inference_mode() if samples == "inference" else torch.no_grad(),
        attnreuse.enable(unet, SIX) as session,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        canvas = torch.randn(1, 4, 8, 8 * 12, generator=torch.Generator().manual_seed(0))
        images = list(canvas.split(8, dim=-1)) if samples == "views of a canvas" else list(canvas.clone().split(8, -1))
        images = images if samples == "views of a canvas" else [image.clone() for image in images]
        for t, who in zip(scheduler.timesteps, ORDERS[order], strict=True):
            for i in who:
                owners.now = i
                after = scheduler.step(unet(images[i], t, context).sample, t, images[i]).prev_sample
                if samples in ("overwritten", "views of a canvas"):
                    images[i].copy_(after)
                else:
                    images[i] = after
    assert owners.foreign == 0
    assert owners.own > 7 * len(ORDERS[order][-1])
    assert session.report().steps == 6


def test_an_image_that_joins_a_pipelines_loop_ends_the_others_maps(pipe, owners):
    """The sample of a step's only call is not looked at in a pipeline's loop, until a second one shows the doubt."""
    scheduler, context = pipe.scheduler, conditions(9)
    scheduler.set_timesteps(6)
    images = list(torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    foreign = []
    with torch.no_grad(), attnreuse.enable(pipe, Policy(steps=6, reuse=[0, 1, 1, 1, 1, 1])), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pipe.progress_bar(total=6):
            for i, t in enumerate(scheduler.timesteps):
                for owners.now in [0] if i < 2 else [1, 0]:
                    image = images[owners.now]
                    images[owners.now] = scheduler.step(pipe.unet(image, t, context).sample, t, image).prev_sample
                foreign.append(owners.foreign)
    assert foreign[-1] == foreign[2]  # not once it is known that there are two
    assert owners.own > 7 * 4


@pytest.mark.parametrize("order", ["001010101011", "001100001111", "000110001111"])
def test_requests_that_begin_at_other_times_never_get_each_others_maps(unet, owners, order):
    """Loops of one's own over one scheduler's timesteps, with one prompt, a call of each in turn."""
    scheduler, context = DDIMScheduler(clip_sample=False, steps_offset=1), conditions(9)
    scheduler.set_timesteps(6)

    @torch.no_grad()
    def image(seed):
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        for t in scheduler.timesteps:
            owners.now = seed
            x = scheduler.step(unet(x, t, context).sample, t, x).prev_sample
            yield x

    with attnreuse.enable(unet, LONG_BLOCK), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images = [image(0), image(1)]
        for i in order:
            next(images[int(i)])
    assert owners.foreign == 0
    assert owners.own > 0


LONG_BLOCK = Policy(steps=6, reuse=[0, 1, 1, 1, 1, 1])


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "LCMScheduler"])
@pytest.mark.parametrize("seed", range(3))
def test_a_warm_up_call_lends_no_map_to_a_sampler_that_forgets_its_samples(owners, scheduler, seed):
    unet, scheduler, context = random_unet(), getattr(diffusers, scheduler)(), conditions(9)
    scheduler.set_timesteps(6)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad(), attnreuse.enable(unet, Policy(steps=6, reuse=[0, 1, 0, 1, 0, 1])), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.randn(1, 4, 8, 8, generator=g)
        owners.now = "warm-up"
        unet(torch.zeros_like(x), scheduler.timesteps[0], context)
        owners.now = "run"
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t, context).sample, t, x, generator=g).prev_sample
    assert owners.foreign == 0


def test_a_layer_called_twice_in_a_denoiser_call_keeps_no_map(unet, owners):
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    forward, context = attn.forward, conditions(0)

    def twice(hidden_states, *args, **kwargs):
        return 0.5 * (forward(hidden_states, *args, **kwargs) + forward(2 * hidden_states, *args, **kwargs))

    attn.forward = twice
    expected = call(unet, 1, context=context)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    with attnreuse.enable(unet, Policy(steps=2, reuse=[0, 1]), layers=[name]) as session, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(2):
            session.step(step, 2)
            out = call(unet, step, context=context)
    assert torch.equal(out, expected)
    assert any("called several times in one denoiser call" in reason for reason in session.report().layers[0].reasons)


@pytest.mark.parametrize("layers", ["self", "cross", "all"])
@pytest.mark.parametrize("change", ["another tensor", "in place", "other data", "another length", "inference mode"])
def test_a_changed_prompt_computes(unet, layers, change):
    first, then = conditions(0), conditions(1, tokens=9 if change == "another length" else TOKENS)
    with torch.inference_mode(change == "inference mode"):
        first, then = first.clone(), then.clone()
        expected = call(copy.deepcopy(unet), 1, context=then)
        with attnreuse.enable(unet, Policy(steps=3, reuse=[0, 1, 0]), layers=layers) as session:
            session.step(0, 3)
            call(unet, 0, context=first)
            session.step(1, 3)
            if change in ("in place", "inference mode"):
                first.copy_(then)
            if change == "other data":
                first.data = then
            with pytest.warns(UserWarning, match="computes at step 1 instead of (reusing|holding): "):
                out = call(unet, 1, context=then if change in ("another tensor", "another length") else first)
            assert torch.equal(out, expected)
            assert kinds(session) == ((2, 0, 0) if layers == "cross" else (1, 1, 0))


@pytest.mark.parametrize("change", ["gone", "other", "in place"])
def test_a_changed_mask_computes(unet, change):
    context, mask = conditions(0), torch.tensor([[1, 1, 1, 0, 0, 0, 0]])
    with attnreuse.enable(unet, Policy(steps=3, reuse=[0, 1, 0]), layers="all") as session:
        session.step(0, 3)
        call(unet, 0, context=context, encoder_attention_mask=mask)
        session.step(1, 3)
        if change == "in place":
            mask[0, 2] = 0
        late = {"gone": None, "other": torch.ones_like(mask), "in place": mask}[change]
        with pytest.warns(UserWarning, match="encoder_attention_mask|the prompt has changed"):
            out = call(unet, 1, context=context, encoder_attention_mask=late)
    assert torch.equal(out, call(unet, 1, context=context, encoder_attention_mask=late))


@pytest.mark.parametrize("across", [True, False])
def test_the_official_cutoff_of_guidance_keeps_the_conditional_half(pipe, across):
    row = [0, 0, 0, 0, 0, 1, 1, 1] if across else [0, 1, 0, 1, 0, 0, 1, 1]
    policy = Policy(steps=8, reuse=row)
    cutoff = {
        "callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=0.5),  # steps 0 to 4 are guided
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    expected = reference(pipe.unet, policy, lambda: sample(pipe, 8, **cutoff), keep_last_rows=True)
    with attnreuse.enable(pipe, policy, map_format="fp32") as session:
        actual = sample(pipe, 8, **cutoff)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    assert not session.report().layers[0].reasons
    assert session.report().layers[0].reused == sum(row)


def test_a_batch_that_grows_computes_and_captures_anew(unet):
    with attnreuse.enable(unet, Policy(steps=5, reuse=[0, 1, 1, 0, 1])) as session, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(5):
            session.step(step, 5)
            batch = 1 if step < 2 else 2
            call(unet, step, batch, context=conditions(0, 2)[:batch])
        assert kinds(session) == (1, 2, 2)
        assert list(session.report().layers[0].reasons.values()) == [1]


# -- runs do not reach into each other


@pytest.mark.parametrize("given_up", [[], [1], [2], [3], [4], [1, 1], [1] * 12, [2, 1]])
@pytest.mark.parametrize("same_prompt", [True, False])
def test_runs_given_up_before_do_not_matter(given_up, same_prompt):
    """A loop of one's own whose scheduler is set once, as on a server: warm-up calls, dropped requests."""
    contexts = [conditions(0), conditions(0 if same_prompt else 5)]
    contexts[1] = contexts[0] if same_prompt else contexts[1]

    def loop(unet, scheduler, seed, context, steps=None):
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            for t in scheduler.timesteps[:steps]:
                x = scheduler.step(unet(x, t, context).sample, t, x).prev_sample
        return x

    outs, size = [], 0
    for before in ([], given_up):  # size: of one run
        unet, scheduler = random_unet(), DDIMScheduler(clip_sample=False)
        scheduler.set_timesteps(4)
        with attnreuse.enable(unet, LATE, scheduler=scheduler) as session:
            for i, steps in enumerate(before):
                loop(unet, scheduler, 7 + i, contexts[1], steps)
                assert maps_alive() <= min(i + 1, 8) * size  # each may be another image of one run
            outs.append(loop(unet, scheduler, 0, contexts[0]))
            size = session.report().allocated_bytes
            assert maps_alive() == 0
    assert torch.equal(*outs)


def test_a_run_within_a_run_and_the_outer_one_goes_on(pipe):
    outs = []

    def nested(pipe, step, t, kwargs):
        if step == 1:
            scheduler = copy.deepcopy(pipe.scheduler)
            outs.append(sample(pipe, 4, seed=3))
            pipe.scheduler = scheduler
        return kwargs

    with attnreuse.enable(pipe, LATE) as session:
        alone = sample(pipe, 4), sample(pipe, 4, seed=3)
        outs.insert(0, sample(pipe, 4, callback_on_step_end=nested))
        assert kinds(session) == (0, 1, 3)
        assert maps_alive() == 0
    assert torch.equal(outs[0], alone[0])
    assert torch.equal(outs[1], alone[1])


def test_a_loop_that_goes_back_in_time_forgets_its_maps(unet):
    """Resampling, as in RePaint: the map of a later step is not of an earlier one's past."""
    scheduler, context = DDIMScheduler(clip_sample=False), conditions(0)
    scheduler.set_timesteps(5)
    with attnreuse.enable(unet, Policy(steps=5, reuse=[0, 0, 1, 1, 1])) as session, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in (0, 1, 2, 3, 2, 3, 4):
            with torch.no_grad():
                out = unet(latents(i), scheduler.timesteps[i], context).sample
        assert torch.isfinite(out).all()
        layer = session.report().layers[0]
        assert (layer.computed, layer.captured, layer.reused) == (1, 2, 4)
        assert list(layer.reasons) == ["the run went back from step 3 to step 2"]


def test_a_loop_of_two_prompts_that_goes_back_keeps_its_branches_and_their_memory(unet, owners):
    scheduler, contexts = DDIMScheduler(clip_sample=False), [conditions(0), conditions(1)]
    scheduler.set_timesteps(6)
    with attnreuse.enable(unet, Policy(steps=6, reuse=[0, 0, 1, 1, 1, 1])) as session, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sizes = []
        for i in (0, 1, 2, 3, 2, 3, 4, 3, 4, 5):
            for owners.now, context in enumerate(contexts):
                with torch.no_grad():
                    unet(latents(i), scheduler.timesteps[i], context)
            sizes.append(maps_alive())
        assert owners.foreign == 0
        assert kinds(session) == (2, 6, 12)  # each captures at step 1, and again at 2 and at 3 when it goes back
        assert session.report().allocated_bytes == max(sizes)
        assert sizes[1:-1] == [sizes[1]] * 8
        assert sizes[-1] == 0


def test_told_steps_hold_whatever_comes_in_between(unet):
    """A call that fails and is repeated, another pipeline's run, resampling: steps are what they are said to be."""
    policy, context = Policy(steps=6, reuse=[0, 1, 0, 1, 0, 1]), conditions(0)
    preview = StableDiffusionPipeline.from_pipe(random_pipeline(), unet=unet)
    preview.set_progress_bar_config(disable=True)

    def fail(*args):
        raise RuntimeError("out of memory, say")

    for between, order in (("failure", range(6)), ("preview", range(6)), ("nothing", [0, 1, 2, 3, 2, 3, 4, 5])):
        with attnreuse.enable(unet, policy) as session, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for i in order:
                session.step(i, 6)
                call(unet, i, context=context)
                if i == 2 and between == "failure":
                    hook = unet.mid_block.register_forward_pre_hook(fail)
                    with pytest.raises(RuntimeError, match="out of memory, say"):
                        call(unet, i, context=context)
                    hook.remove()
                    session.step(i, 6)
                    call(unet, i, context=context)
                if i == 2 and between == "preview":
                    sample(preview, 2)
            report = session.report()
            assert "executes" not in str(report), between
            assert report.layers[0].reused >= 1, between


# -- nothing is refused where no map is at stake


def test_gradients_compute_and_say_so(unet):
    x, context = torch.randn(1, 4, 8, 8), conditions(0)
    expected = unet(x, 10, context).sample
    with attnreuse.enable(unet, Policy(steps=2, reuse=[0, 1])) as session:
        for step in range(2):
            session.step(step, 2)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                out = unet(x, 10, context).sample
        assert torch.equal(out, expected)
        out.sum().backward()
        assert "a gradient is wanted, and reuse has none" in str(said[0].message)
        assert kinds(session) == (2, 0, 0)


def test_gradients_of_residuals_are_noticed(unet):
    unet.requires_grad_(False)
    residual = torch.zeros(1, 32, 4, 4, requires_grad=True)
    grads, context = [], conditions(0)
    for enabled in (False, True):
        with contextlib.ExitStack() as stack:
            session = stack.enter_context(attnreuse.enable(unet, LATE)) if enabled else None
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            for step in range(4):
                if enabled:
                    session.step(step, 4)
                given = {"mid_block_additional_residual": residual, "down_block_additional_residuals": downs()}
                out = unet(latents(step), 10, context, **given).sample
            grads.append(torch.autograd.grad(out.square().sum(), residual)[0])
    assert torch.equal(*grads)


def downs():
    return tuple(torch.zeros(1, c, s, s) for c, s in ((16, 8), (16, 8), (16, 4), (32, 4)))


def test_arguments_that_another_tools_forward_takes_are_let_through(unet):
    original, context = unet.forward, conditions(0)
    unet.forward = lambda sample, timestep, encoder_hidden_states, theirs=None: original(
        sample, timestep, encoder_hidden_states
    )
    with attnreuse.enable(unet, LATE) as session:
        for step in range(4):
            session.step(step, 4)
            call(unet, step, context=context, theirs=True)
        assert kinds(session) == (0, 1, 3)
        with pytest.raises(TypeError, match="missing"):
            unet(latents(0))


def test_a_step_told_for_a_loop_given_up_is_not_taken_for_a_pipelines(pipe):
    with attnreuse.enable(pipe, LATE) as session:
        expected = sample(pipe, 4)
        for step in range(3):
            session.step(step, 4)
            call(pipe.unet, step)
        assert torch.equal(sample(pipe, 4), expected)


def test_reuse_may_be_switched_off_and_on_in_mid_run(pipe):
    sessions = [attnreuse.enable(pipe, LATE)]

    def toggle(pipe, step, t, kwargs):
        if step == 0:
            sessions[0].disable()
        if step == 2:
            sessions.append(attnreuse.enable(pipe, LATE))
        return kwargs

    expected = sample(random_pipeline(), 4)
    with pytest.warns(UserWarning, match=r"this run executes 1.*every layer computes"):
        torch.testing.assert_close(sample(pipe, 4, callback_on_step_end=toggle), expected, rtol=1e-3, atol=1e-3)
    attnreuse.disable(pipe)


def test_a_call_of_enable_that_fails_leaves_the_session_before_in_force(pipe):
    with attnreuse.enable(pipe, LATE) as session:
        with pytest.raises(ValueError, match="matches none"):
            attnreuse.enable(pipe, LATE, layers="nosuch*")
        sample(pipe, 4)
        assert kinds(session) == (0, 1, 3)


def test_a_step_that_cannot_be_told_computes_and_says_how_to_help(unet):
    expected = call(unet)
    with attnreuse.enable(unet, LATE) as session:
        with pytest.warns(UserWarning, match=r"pass scheduler= .* or call session\.step\(i, n\)"):
            assert torch.equal(call(unet), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # said once
            call(unet)
        assert kinds(session) == (2, 0, 0)
        assert "call session.step" in session.report().skipped[session.report().layers[0].name]
    with (
        attnreuse.enable(unet, LATE, strict=True),
        pytest.raises(attnreuse.AttnReuseError, match=r"call session\.step\(i, n\)"),
    ):
        call(unet)


def test_a_head_too_wide_is_left_alone_when_enabled():
    unet = random_unet(block_out_channels=(16, 576), attention_head_dim=2)  # two heads of 288 channels
    with pytest.warns(UserWarning, match="heads have 288 channels; at most 256 are served"):
        session = attnreuse.enable(unet, LATE)
    with session:
        for step in range(4):
            session.step(step, 4)
            call(unet, step, context=conditions(0))
    assert {layer.reused for layer in session.report().layers} == {3}
    assert sum("288 channels" in reason for reason in session.report().skipped.values()) == 4


def test_double_precision_computes_and_says_so(unet):
    unet.double()
    x, context = torch.randn(1, 4, 8, 8).double(), conditions(0).double()
    with torch.no_grad(), attnreuse.enable(unet, LATE) as session:
        session.step(0, 4)
        with pytest.warns(UserWarning, match="float64 tensors are not served"):
            out = unet(x, 10, context).sample
        session.step(1, 4)
        assert torch.equal(unet(x, 10, context).sample, out)
        assert kinds(session) == (2, 0, 0)


# -- shapes are the model's


def test_a_widened_first_layer_changes_no_map():
    unet = random_unet()
    unet.conv_in = torch.nn.Conv2d(9, 16, 3, padding=1)  # the config still says 4
    x, context = torch.randn(1, 9, 8, 8), conditions(0)
    with torch.no_grad(), attnreuse.enable(unet, LATE, map_format="fp32") as session:
        for step in range(4):
            session.step(step, 4)
            torch.testing.assert_close(unet(x, 10, context).sample, unet_alone(unet, x, context), rtol=0, atol=1e-5)
        assert kinds(session) == (0, 1, 3)


def unet_alone(unet, x, context):
    return copy.deepcopy(unet)(x, 10, context).sample


def test_blocks_taken_out_by_hand_are_planned_as_they_are():
    unet = random_unet(layers_per_block=2)
    unet.down_blocks[1].attentions = unet.down_blocks[1].attentions[:1]
    unet.down_blocks[1].resnets = unet.down_blocks[1].resnets[:1]
    unet.up_blocks[0].attentions = unet.up_blocks[0].attentions[1:]
    unet.up_blocks[0].resnets = unet.up_blocks[0].resnets[1:]
    with attnreuse.enable(unet, LATE) as session:
        for step in range(4):
            session.step(step, 4)
            call(unet, step, context=conditions(0))
    assert {(layer.captured, layer.reused) for layer in session.report().layers} == {(1, 3)}


def test_tokens_that_another_tool_takes_away_for_a_while_compute(unet):
    """As deep shrink does: a block sees fewer tokens at the first steps than later."""
    block = unet.mid_block.attentions[0]
    original = block.forward

    def shrunk(hidden_states, *args, **kwargs):
        small = torch.nn.functional.interpolate(hidden_states, scale_factor=0.5)
        out = original(small, *args, **kwargs)
        return (torch.nn.functional.interpolate(out[0], scale_factor=2.0),)

    context = conditions(0)
    with attnreuse.enable(unet, Policy(steps=4, reuse=[0, 1, 0, 1])) as session, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(4):
            block.__dict__["forward"] = shrunk if step < 2 else original
            session.step(step, 4)
            call(unet, step, context=context)
        layers = {layer.name: layer for layer in session.report().layers}
        del block.__dict__["forward"]
    mid = layers.pop("mid_block.attentions.0.transformer_blocks.0.attn1")
    assert (mid.computed, mid.captured, mid.reused) == (2, 1, 1)
    assert any("attends over other tokens" in reason for reason in mid.reasons)
    assert all((layer.captured, layer.reused) == (2, 2) for layer in layers.values())


# -- memory


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["callback", "scheduler", "denoiser"])
def test_no_map_outlives_a_run_that_fails(pipe, stop, where):
    def fail(*args, **kwargs):
        if session.report().steps >= 2:
            raise stop
        return args[-1] if where == "callback" else None

    call = {}
    with attnreuse.enable(pipe, hurry(4, 2, None)) as session:
        if where == "callback":
            call["callback_on_step_end"] = fail
        elif where == "scheduler":
            original, pipe.scheduler.step = pipe.scheduler.step, lambda *a, **k: fail() or original(*a, **k)
        else:
            pipe.unet.mid_block.register_forward_pre_hook(fail)
        with pytest.raises(stop):
            sample(pipe, 4, **call)
        assert maps_alive() == 0


def test_maps_are_gone_before_the_pictures_are_decoded(pipe):
    alive = []
    pipe.vae.decoder.register_forward_pre_hook(lambda *a: alive.append(maps_alive()))
    with attnreuse.enable(pipe, hurry(4, 2, None)) as session:
        sample(pipe, 4, output_type="np")
    assert alive == [0]
    assert session.report().allocated_bytes > 0


def test_memory_is_what_the_plan_says_when_prompts_change_at_every_step(unet):
    sizes = []
    with attnreuse.enable(unet, periodic(6, 2)) as session, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(6):
            session.step(step, 6)
            call(unet, step, context=conditions(step))
            sizes.append(maps_alive())
    with attnreuse.enable(unet, periodic(6, 2)) as session:
        for step in range(6):
            session.step(step, 6)
            call(unet, step, context=conditions(0))
    assert max(sizes) == session.report().allocated_bytes


def test_a_cancelled_call_does_not_shut_other_threads_out(pipe):
    def cancel(*args):
        raise asyncio.CancelledError

    hook = pipe.unet.mid_block.register_forward_pre_hook(cancel)
    with attnreuse.enable(pipe, LATE), ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        with pytest.raises((asyncio.CancelledError, CancelledError)):
            one.submit(sample, pipe, 4).result()
        hook.remove()
        assert two.submit(sample, pipe, 4).result().isfinite().all()


# -- the denoiser of a pipeline may be replaced


def test_reuse_goes_over_to_the_denoiser_that_the_pipeline_is_given(pipe):
    old, new = pipe.unet, copy.deepcopy(pipe.unet)
    before = {n: type(p) for n, p in old.attn_processors.items()}
    with attnreuse.enable(pipe, LATE) as session:
        expected = sample(pipe, 4)
        pipe.unet = new
        with pytest.warns(UserWarning, match="the pipeline has another denoiser now: reuse goes over to it"):
            assert torch.equal(sample(pipe, 4), expected)
        assert kinds(session) == (0, 1, 3)
        assert not old._forward_pre_hooks
    assert {n: type(p) for n, p in pipe.unet.attn_processors.items()} == before
    assert not new._forward_pre_hooks


def test_listening_to_pipelines_ends_with_the_last_session(pipe):
    from diffusers import DiffusionPipeline

    original = DiffusionPipeline.__dict__["progress_bar"]
    with attnreuse.enable(pipe, LATE), attnreuse.enable(random_pipeline(), LATE):
        assert DiffusionPipeline.__dict__["progress_bar"] is not original
    assert DiffusionPipeline.__dict__["progress_bar"] is original
    assert StableDiffusionPipeline.progress_bar is original


# -- what fails or stops in one place is not felt in another


def test_a_branch_that_gave_up_its_memory_captures_again(unet):
    """Guidance that starts late takes the other branch's memory for a moment, not for good."""
    p, n = conditions(1), conditions(2)
    policy = Policy(steps=6, reuse=[0, 1, 0, 1, 0, 1])
    with attnreuse.enable(unet, policy) as session, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(6):
            session.step(step, 6)
            for context in (p,) if step < 2 else (n, p):
                call(unet, step, context=context)
        layer = session.report().layers[0]
        assert (layer.computed, layer.captured, layer.reused) == (0, 5, 5)


def test_a_denoiser_call_that_failed_may_be_made_again(pipe):
    """As after an out-of-memory error that the caller handles: no refusal, and nothing of the failed call is used."""
    stock, armed = sample(pipe, 6), []
    forward = pipe.unet.mid_block.forward

    def fail_once(*args, **kwargs):
        if len(armed) == 3:
            armed.append(1)
            raise RuntimeError("out of memory, say")
        armed.append(1)
        return forward(*args, **kwargs)

    original = type(pipe.unet).__call__

    def persistent(*args, **kwargs):
        try:
            return original(pipe.unet, *args, **kwargs)
        except RuntimeError:
            return original(pipe.unet, *args, **kwargs)

    class Persistent:
        def __getattr__(self, name):
            return getattr(unet, name)

        def __call__(self, *args, **kwargs):
            return persistent(*args, **kwargs)

    unet = pipe.unet
    unet.mid_block.forward = fail_once
    with attnreuse.enable(pipe, periodic(6, 2)) as session, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.__dict__["unet"] = Persistent()
        out = sample(pipe, 6)
        del pipe.__dict__["unet"]
        layer = session.report().layers[0]
    assert len(armed) == 7
    assert (layer.computed, layer.captured, layer.reused) == (1, 3, 2)
    assert 0 < (out - stock).norm() / stock.norm() < 0.1


def test_a_run_that_fails_in_one_thread_leaves_another_threads_run_alone(pipe):
    parts = {**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)}
    other = type(pipe)(**parts, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)

    def broken(pipe, step, t, kwargs):
        raise RuntimeError("broken")

    def fail():
        with contextlib.suppress(RuntimeError):
            sample(other, 4, callback_on_step_end=broken)

    with attnreuse.enable(pipe, LATE) as session:
        expected = sample(pipe, 4)
        assert torch.equal(sample(pipe, 4, callback_on_step_end=from_another_thread(fail)), expected)
        assert kinds(session) == (0, 1, 3)


def test_a_loop_left_in_one_thread_leaves_a_call_in_another_alone(pipe):
    inside, left = threading.Event(), threading.Event()
    parts = {**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)}
    other = type(pipe)(**parts, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)

    def wait(*args):
        if threading.current_thread().name == "slow":
            inside.set()
            left.wait(30)

    with attnreuse.enable(pipe, LATE) as session:
        expected, outs = sample(pipe, 4), []
        hook = pipe.unet.down_blocks[0].register_forward_pre_hook(wait)
        slow = threading.Thread(target=lambda: outs.append(sample(other, 4)), name="slow")

        def start(pipe, step, t, kwargs):
            if step == 3:
                slow.start()
                assert inside.wait(30)
            return kwargs

        assert torch.equal(sample(pipe, 4, callback_on_step_end=start), expected)
        left.set()
        slow.join()
        hook.remove()
        assert torch.equal(outs[0], expected)
        assert kinds(session) == (0, 1, 3)
