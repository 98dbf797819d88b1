"""enable / disable on a Stable-Diffusion-shaped pipeline: exactness, schedulers, shapes, errors, restoration."""

import copy
import itertools
import re
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from life import maps_alive
from tiny_random import compile_denoiser, from_another_thread, prompt, random_pipeline, random_unet, sample

import attnreuse
from attnreuse import Policy, hurry, periodic
from attnreuse.binding.session import ATTRIBUTE


class TheirAttnProcessor(AttnProcessor2_0):
    """Another tool's."""


SCHEDULERS = [
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
    "HeunDiscreteScheduler",
]


def with_scheduler(pipe, name, steps, **changes):
    """Set the scheduler; the number of steps it executes."""
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **changes)
    pipe.scheduler.set_timesteps(steps)
    return len(pipe.scheduler.timesteps)


def processors(unet):
    return {name: id(processor) for name, processor in unet.attn_processors.items()}


# -- exactness


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_never_reusing_equals_the_stock_pipeline(pipe, scheduler):
    executed = with_scheduler(pipe, scheduler, 5)
    expected = sample(pipe, 5)
    with attnreuse.enable(pipe, hurry(executed, 0, None), layers="all") as session:
        actual = sample(pipe, 5)
    assert (actual - expected).abs().max() == 0  # measured; the promise is 1e-4
    assert session.report().steps == executed
    assert session.report().allocated_bytes == 0


@pytest.mark.parametrize("stock", [AttnProcessor, AttnProcessor2_0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_reuse_runs_with_every_scheduler(pipe, scheduler, stock):
    executed = with_scheduler(pipe, scheduler, 5)
    pipe.unet.set_attn_processor(stock())
    expected = sample(pipe, 5)
    with attnreuse.enable(pipe, hurry(executed, executed // 2, None), layers="all", strict=True) as session:
        actual = sample(pipe, 5)
    report = session.report()
    assert report.steps == executed
    for layer in report.layers:
        reused = executed // 2
        if layer.kind == "self":
            assert (layer.computed, layer.captured, layer.reused) == (executed - reused - 1, 1, reused)
        else:  # its values depend on the prompt alone
            assert (layer.computed, layer.captured, layer.held) == (executed - reused, 0, reused)
    assert 0 < (actual - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("stock", [AttnProcessor, AttnProcessor2_0])
@pytest.mark.parametrize("changes", [{}, {"upcast_attention": True}, {"only_cross_attention": False}])
def test_capture_and_same_step_reuse_equal_the_stock_processor(stock, changes):
    """One denoiser input, twice: step 1 reuses the map of step 0 on the same values."""
    unet = random_unet(**changes)
    unet.set_attn_processor(stock())
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32)
    with torch.no_grad():
        expected = unet(x, 10, context).sample
        with attnreuse.enable(unet, hurry(2, 1, None), map_format="fp32", layers="all") as session:
            for step in range(2):
                session.step(step, 2)
                actual = unet(x, 10, context).sample
                torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_masks_take_part_in_capture():
    unet = random_unet()
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32)
    given = {"encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1] * 7])}
    with torch.no_grad():
        expected = unet(x, 10, context, **given).sample
        assert (expected - unet(x, 10, context).sample).abs().max() > 1e-4
        with attnreuse.enable(unet, hurry(2, 1, None), map_format="fp32", layers="all") as session:
            for step in range(2):
                session.step(step, 2)
                torch.testing.assert_close(unet(x, 10, context, **given).sample, expected, rtol=0, atol=1e-5)


def test_reuse_does_not_project_queries_and_keys(pipe):
    calls = {"to_q": 0, "to_k": 0, "to_v": 0}
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    for projection in calls:
        module = pipe.unet.get_submodule(f"{name}.{projection}")
        module.register_forward_hook(lambda *a, p=projection: calls.__setitem__(p, calls[p] + 1))
    with attnreuse.enable(pipe, hurry(6, 4, None)):
        sample(pipe, 6)
    assert calls == {"to_q": 2, "to_k": 2, "to_v": 6}


def test_reused_maps_are_the_captured_ones_and_values_are_fresh(pipe):
    """A LoRA-like change of to_v in mid-run shows; one of to_q does not."""
    name = "mid_block.attentions.0.transformer_blocks.0.attn1"
    attn = pipe.unet.get_submodule(name)

    def run(projection):
        def change(pipe, step, t, kwargs):
            if step == 3 and projection:
                getattr(attn, projection).weight.data.mul_(3)
            return kwargs

        saved = copy.deepcopy(attn.state_dict())
        with attnreuse.enable(pipe, hurry(6, 2, None), layers=[name]):
            out = sample(pipe, 6, callback_on_step_end=change)
        attn.load_state_dict(saved)
        return out

    plain = run(None)
    assert torch.equal(run("to_q"), plain)
    assert not torch.equal(run("to_v"), plain)


# -- shapes of runs


@pytest.mark.parametrize(
    "call",
    [
        {"batch": 3},
        {"num_images_per_prompt": 2},
        {"guidance_scale": 1.0},
        {"height": 24, "width": 40},
        {"latents": torch.ones(1, 4, 9, 7)},  # odd at every level
        {"eta": 0.5},
    ],
    ids=str,
)
def test_batches_guidance_and_resolutions(pipe, call):
    expected = sample(pipe, 4, **call)
    with attnreuse.enable(pipe, hurry(4, 0, None)):
        assert torch.equal(sample(pipe, 4, **call), expected)
    with attnreuse.enable(pipe, hurry(4, 2, None)) as session:
        actual = sample(pipe, 4, **call)
    assert actual.shape == expected.shape
    assert (actual - expected).norm() / expected.norm() < 0.05
    report = session.report()
    assert report.predicted_bytes == report.allocated_bytes > 0
    assert all(layer.reused == 2 for layer in report.layers)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("strength", [0.45, 0.6, 0.9])
def test_image_to_image_counts_executed_steps(pipe, scheduler, strength):
    with_scheduler(pipe, scheduler, 10)
    pipe = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    calls = []
    pipe.unet.register_forward_pre_hook(lambda *a: calls.append(1))
    given = {"image": image, "strength": strength, "output_type": "latent", "num_inference_steps": 10, **prompt()}
    expected = pipe(generator=torch.Generator().manual_seed(0), **given).images
    executed = len(calls)
    with attnreuse.enable(pipe, hurry(executed, executed // 2, None)) as session:
        actual = pipe(generator=torch.Generator().manual_seed(0), **given).images
    assert session.report().steps == executed
    assert session.report().layers[0].reused == executed // 2
    assert (actual - expected).norm() / expected.norm() < 0.05


def test_a_sibling_pipeline_may_use_the_enabled_denoiser(pipe):
    sibling = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    image = torch.rand(1, 3, 16, 16)
    with attnreuse.enable(pipe, hurry(6, 2, None)) as session:
        sample(pipe, 6)
        sibling(image=image, strength=0.6, num_inference_steps=10, output_type="latent", **prompt())
    assert session.report().layers[0].reused == 2


def test_a_custom_loop_with_a_scheduler(pipe):
    unet, scheduler = pipe.unet, pipe.scheduler
    with torch.no_grad(), attnreuse.enable(unet, periodic(4, 2), scheduler=scheduler) as session:
        scheduler.set_timesteps(4)
        x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 32)
        for t in scheduler.timesteps.tolist():  # plain numbers, not views
            for _ in range(2):  # conditional and unconditional calls apart
                noise = unet(x, t, context).sample
            x = scheduler.step(noise, t, x).prev_sample
    report = session.report()
    assert (report.layers[0].captured, report.layers[0].reused) == (4, 4)
    assert report.allocated_bytes == report.predicted_bytes == 2 * sum(layer.map_bytes // 2 for layer in report.layers)


def test_a_set_step_does_not_outlive_its_run(pipe):
    with attnreuse.enable(pipe, hurry(4, 2, None)) as session:
        expected = sample(pipe, 4)
        with torch.no_grad():
            for step in range(4):
                session.step(step, 4)
                pipe.unet(torch.randn(1, 4, 8, 8), 10, torch.randn(1, 7, 32))
        assert torch.equal(sample(pipe, 4), expected)


def test_sdxl_conditioning_and_controlnet_residuals():
    unet = random_unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64
    )
    given = {
        "encoder_hidden_states": torch.randn(1, 7, 32),
        "added_cond_kwargs": {"text_embeds": torch.randn(1, 16), "time_ids": torch.ones(1, 6)},
        "mid_block_additional_residual": torch.ones(1, 32, 4, 4),
        "down_block_additional_residuals": (torch.ones(1, 16, 8, 8),) * 2
        + (torch.ones(1, 16, 4, 4), torch.ones(1, 32, 4, 4)),
    }
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected = unet(x, 10, **given).sample
        with attnreuse.enable(unet, hurry(2, 1, None), map_format="fp32") as session:
            for step in range(2):
                session.step(step, 2)
                torch.testing.assert_close(unet(x, 10, **given).sample, expected, rtol=0, atol=1e-5)
            assert session.report().layers[0].reused == 1


def test_two_calls_of_a_step_keep_their_maps_apart():
    """Unbatched guidance: the second call must not read the first one's maps."""
    unet = random_unet()
    x, contexts = torch.randn(1, 4, 8, 8), torch.randn(2, 1, 7, 32)
    with torch.no_grad(), attnreuse.enable(unet, hurry(2, 1, None), map_format="fp32", layers="all") as session:
        for step in range(2):
            session.step(step, 2)
            outs = [unet(x, 10, context).sample for context in contexts]
    with torch.no_grad():
        for out, context in zip(outs, contexts, strict=True):
            torch.testing.assert_close(out, unet(x, 10, context).sample, rtol=0, atol=1e-5)


# -- memory


def test_one_buffer_is_allocated_before_the_first_step_and_none_later(pipe, monkeypatch):
    from attnreuse.binding import run as module

    made, addresses = [], set()
    ring = module.MapRing
    monkeypatch.setattr(module, "MapRing", lambda *a: made.append(ring(*a)) or made[-1])
    with attnreuse.enable(pipe, periodic(6, 2), layers="all") as session:

        def watch(pipe, step, t, kwargs):
            for ring in made:
                addresses.update(slot.storage.data_ptr() for slot in ring.slots.values())
                addresses.update(ring.outputs[name].storage.data_ptr() for name in ring.kept_at)
            return kwargs

        sample(pipe, 6, callback_on_step_end=watch)
        made[:] = [ring for ring in made if ring.nbytes]
        assert len(made) == 1
        assert len(addresses) == len(made[0].plan.requests)
        assert made[0].nbytes == made[0].plan.nbytes == session.report().predicted_bytes
        made.clear()
        assert maps_alive() == 0  # released at the end


def test_layers_that_do_not_fit_the_budget_only_compute_and_are_told(pipe):
    with attnreuse.enable(pipe, hurry(4, 2, None)) as session:
        sample(pipe, 4)
    whole = session.report().allocated_bytes
    with (
        pytest.warns(UserWarning, match="does not fit the memory budget"),
        attnreuse.enable(pipe, hurry(4, 2, None), memory_budget=whole // 2) as session,
    ):
        sample(pipe, 4)
    report = session.report()
    assert 0 < report.allocated_bytes == report.predicted_bytes <= whole // 2
    assert report.skipped
    for layer in report.layers:
        assert (layer.reused == 0) == (layer.name in report.skipped)


def test_maps_shrink_with_the_format(pipe):
    size = {}
    for name in ("fp32", "fp16", "u8", "u4"):
        with attnreuse.enable(pipe, hurry(4, 2, None), map_format=name) as session:
            sample(pipe, 4, height=64, width=64)
        size[name] = session.report().allocated_bytes
    assert size["fp32"] > 1.9 * size["fp16"] > 3.4 * size["u8"] > 5 * size["u4"]


def test_layer_wise_policies_share_the_buffer(pipe):
    policy = Policy(steps=6, reuse={"down_blocks.0.*": [0, 1, 1, 0, 0, 0], "up_blocks.1.*": [0, 0, 0, 0, 1, 1]})
    with attnreuse.enable(pipe, policy) as session:
        sample(pipe, 6)
    report = session.report()
    by_name = {layer.name.split(".attentions")[0]: layer for layer in report.layers}
    assert by_name["down_blocks.0"].reused == by_name["up_blocks.1"].reused == 2
    assert by_name["mid_block"].reused == 0
    total = sum(layer.map_bytes for layer in report.layers)
    assert report.allocated_bytes < total


# -- selection


def test_layers_self_cross_all_and_patterns(pipe):
    count = {
        key: len(attnreuse.enable(pipe, hurry(4, 2, None), layers=key).report().layers)
        for key in ("self", "cross", "all", "mid_block.*")
    }
    attnreuse.disable(pipe)
    assert count == {"self": 7, "cross": 7, "all": 14, "mid_block.*": 2}
    with pytest.raises(ValueError, match=r"'middle\.\*' matches none of the 14 layers"):
        attnreuse.enable(pipe, hurry(4, 2, None), layers=["middle.*"])


def test_unsupported_processors_are_left_alone_and_told(pipe):
    theirs = TheirAttnProcessor()
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(theirs)
    with pytest.warns(UserWarning, match="leaves 1 of the chosen layers alone.*TheirAttnProcessor"):
        session = attnreuse.enable(pipe, hurry(4, 2, None))
    with session:
        sample(pipe, 4)
        assert pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor is theirs
    assert list(session.report().skipped) == ["mid_block.attentions.0.transformer_blocks.0.attn1"]
    assert "TheirAttnProcessor" in str(session.report())
    with pytest.raises(attnreuse.UnsupportedLayerError, match="TheirAttnProcessor"):
        attnreuse.enable(pipe, hurry(4, 2, None), strict=True)


def test_nothing_to_serve_is_an_error(pipe):
    pipe.unet.set_attn_processor(TheirAttnProcessor())
    with pytest.raises(attnreuse.UnsupportedLayerError, match="7 of 7 layers cannot be served"):
        attnreuse.enable(pipe, hurry(4, 2, None))
    with pytest.raises(attnreuse.UnsupportedLayerError, match=r"Linear is not served.*attnreuse\.adapters\.register"):
        attnreuse.enable(torch.nn.Linear(2, 2), hurry(4, 2, None))
    with pytest.raises(attnreuse.UnsupportedLayerError, match=r"expected a pipeline with a unet.*, got str"):
        attnreuse.enable("stabilityai/sdxl-turbo", hurry(4, 2, None))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"map_format": "u2"}, "map_format must be one of"),
        ({"memory_budget": "lots"}, "memory_budget must be bytes or like '4GiB', '500MB' or '2G'"),
    ],
)
def test_bad_arguments(pipe, given, said):
    with pytest.raises(ValueError, match=said):
        attnreuse.enable(pipe, hurry(4, 2, None), **given)
    assert not hasattr(pipe.unet, ATTRIBUTE)


# -- restoration


def test_disable_restores_bit_exactly(pipe):
    before, expected = processors(pipe.unet), sample(pipe, 4)
    keys = set(pipe.unet.__dict__)
    attnreuse.enable(pipe, hurry(4, 2, None))
    assert not torch.equal(sample(pipe, 4), expected)
    attnreuse.disable(pipe)
    assert processors(pipe.unet) == before
    assert torch.equal(sample(pipe, 4), expected)
    assert set(pipe.unet.__dict__) == keys
    assert not pipe.unet._forward_pre_hooks
    assert not pipe.unet._forward_hooks
    attnreuse.disable(pipe)  # nothing to undo: nothing happens


def test_disable_after_an_exception_in_mid_run(pipe):
    before, expected = processors(pipe.unet), sample(pipe, 4)

    def stop(pipe, step, t, kwargs):
        if step == 2:
            raise KeyboardInterrupt
        return kwargs

    with pytest.raises(KeyboardInterrupt), attnreuse.enable(pipe, hurry(4, 2, None)):
        sample(pipe, 4, callback_on_step_end=stop)
    assert processors(pipe.unet) == before
    assert torch.equal(sample(pipe, 4), expected)


def test_an_exception_inside_the_denoiser_ends_the_run(pipe):
    expected = sample(pipe, 4)
    session = attnreuse.enable(pipe, hurry(4, 2, None))
    reused = sample(pipe, 4)
    armed = [True]

    def fail(*args):
        if armed and session.report().steps == 3:
            armed.clear()
            raise RuntimeError("out of memory, say")

    hook = pipe.unet.mid_block.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        sample(pipe, 4)
    assert maps_alive() == 0
    assert torch.equal(sample(pipe, 4), reused)
    hook.remove()
    session.disable()
    assert torch.equal(sample(pipe, 4), expected)


def test_lora_loaded_while_enabled(pipe, tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    donor = random_unet()
    donor.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(donor))

    before, plain = processors(pipe.unet), sample(pipe, 4)
    session = attnreuse.enable(pipe, hurry(4, 2, None))
    pipe.load_lora_weights(tmp_path)
    with_lora = sample(pipe, 4)
    assert session.report().layers[0].reused == 2
    session.disable()
    assert processors(pipe.unet) == before
    exact = sample(pipe, 4)
    assert not torch.equal(exact, plain)
    assert (with_lora - exact).norm() / exact.norm() < 0.05  # the adapter is in force on reuse, too
    pipe.unload_lora_weights()
    assert torch.equal(sample(pipe, 4), plain)


def test_processors_that_others_set_stay_theirs(pipe):
    session = attnreuse.enable(pipe, hurry(4, 2, None))
    pipe.unet.set_attn_processor(TheirAttnProcessor())
    theirs = processors(pipe.unet)
    with pytest.warns(UserWarning, match="7 layers only compute.*its processor is TheirAttnProcessor"):
        sample(pipe, 4)
    assert session.report().allocated_bytes == 0
    assert len(session.report().skipped) == 7
    session.disable()
    assert processors(pipe.unet) == theirs


def test_only_layers_that_would_have_reused_are_warned_of(pipe):
    before = dict(pipe.unet.attn_processors)
    name = next(iter(before)).removesuffix(".processor")
    with attnreuse.enable(pipe, Policy(steps=4, reuse="....")) as session, warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.unet.set_attn_processor(TheirAttnProcessor())
        sample(pipe, 4)
    assert len(session.report().skipped) == 7
    pipe.unet.set_attn_processor(before)
    with attnreuse.enable(pipe, Policy(steps=4, reuse={name: "..RR", "*": "...."})):
        pipe.unet.set_attn_processor(TheirAttnProcessor())
        with pytest.warns(
            UserWarning, match=f"1 layers only compute, such as {re.escape(name)}: its processor is Their"
        ):
            sample(pipe, 4)


def test_layers_reuse_again_once_others_take_their_processors_off(pipe):
    with attnreuse.enable(pipe, hurry(4, 2, None)) as session:
        expected = sample(pipe, 4)
        before = dict(pipe.unet.attn_processors)
        pipe.unet.set_attn_processor(TheirAttnProcessor())
        with pytest.warns(UserWarning, match="TheirAttnProcessor"):
            sample(pipe, 4)
        assert session.report().layers[0].reused == 0
        pipe.unet.set_attn_processor(before)
        assert torch.equal(sample(pipe, 4), expected)
        assert not session.report().skipped


def test_a_copied_denoiser_has_no_session(pipe):
    expected = sample(pipe, 4)
    session = attnreuse.enable(pipe, hurry(4, 2, None))
    twin = random_pipeline()
    twin.unet = copy.deepcopy(pipe.unet)
    assert {type(p) for p in twin.unet.attn_processors.values()} == {AttnProcessor2_0}
    assert torch.equal(sample(twin, 4), expected)
    assert session.report().steps == 0
    attnreuse.disable(twin)
    assert not torch.equal(sample(pipe, 4), expected)


def test_enabling_again_replaces_the_session(pipe):
    before = processors(pipe.unet)
    first = attnreuse.enable(pipe, hurry(4, 2, None))
    second = attnreuse.enable(pipe, hurry(4, 1, None))
    first.disable()  # no longer in force: nothing happens
    sample(pipe, 4)
    assert second.report().layers[0].reused == 1
    second.disable()
    assert processors(pipe.unet) == before


def test_state_dict_is_untouched(pipe):
    keys = set(pipe.unet.state_dict())
    with attnreuse.enable(pipe, hurry(4, 2, None)):
        assert set(pipe.unet.state_dict()) == keys


# -- errors that name what was expected and what came


def test_a_run_of_another_length_computes_and_says_so(pipe):
    expected = sample(pipe, 4)
    said = "is for 5 executed steps, this run executes 4.*make the policy for 4; every layer computes"
    with attnreuse.enable(pipe, hurry(5, 2, None)) as session, pytest.warns(UserWarning, match=said):
        assert torch.equal(sample(pipe, 4), expected)
    report = session.report()
    assert report.allocated_bytes == 0
    assert report.layers[0].reasons == {"the policy is for 5 executed steps, this run executes 4": 2}
    with (
        attnreuse.enable(pipe, hurry(5, 2, None), strict=True),
        pytest.raises(attnreuse.PolicyMismatchError, match="is for 5 executed steps, this run executes 4"),
    ):
        sample(pipe, 4)


@pytest.mark.parametrize(("scheduler", "executed"), [("HeunDiscreteScheduler", 7), ("PNDMScheduler", 13)])
def test_a_policy_for_the_steps_asked_for_instead_of_those_executed_is_an_error(pipe, scheduler, executed):
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    with attnreuse.enable(pipe, hurry(4, 2, None)), pytest.raises(attnreuse.PolicyMismatchError) as raised:
        sample(pipe, 4)
    assert f"this run executes {executed} ({scheduler}" in str(raised.value)
    assert str(raised.value).endswith(f"make the policy for {executed}")
    assert "session.step(i, n)" in str(raised.value)
    with attnreuse.enable(pipe, hurry(executed, 2)) as session:
        sample(pipe, 4)
    assert session.report().layers[0].reused == 2


def test_a_policy_made_for_something_else(pipe):
    policy = hurry(4, 2, None).model_copy(update={"scheduler": "PNDMScheduler"})
    said = "scheduler: policy 'PNDMScheduler', run 'DDIMScheduler'"
    with attnreuse.enable(pipe, policy), pytest.warns(UserWarning, match=said):
        sample(pipe, 4)
    with (
        attnreuse.enable(pipe, policy, strict=True),
        pytest.raises(attnreuse.PolicyMismatchError, match=said),
    ):
        sample(pipe, 4)


def test_a_policy_that_names_layers_not_served(pipe):
    policy = Policy(steps=4, reuse={"transformer.*": [0, 0, 1, 1], "*": [0, 0, 0, 1]})
    with pytest.warns(UserWarning, match=r"names layers that are not served here: transformer\.\*"):
        attnreuse.enable(pipe, policy)
    with pytest.raises(attnreuse.PolicyMismatchError, match="not served"):
        attnreuse.enable(pipe, policy, strict=True)


def test_a_second_thread_inside_the_denoiser(pipe):
    inside, leave, raised = threading.Event(), threading.Event(), []

    def wait(*args):
        if threading.current_thread().name == "first":
            inside.set()
            leave.wait(30)

    def run():
        try:
            sample(pipe, 2)
        except Exception as error:
            raised.append(error)

    expected = None
    with attnreuse.enable(pipe, hurry(2, 1, None)):
        expected = sample(pipe, 2)
        hook = pipe.unet.mid_block.register_forward_pre_hook(wait)
        first = threading.Thread(target=run, name="first")
        first.start()
        assert inside.wait(30)
        run()
        leave.set()
        first.join()
        hook.remove()
        assert isinstance(raised[0], attnreuse.AttnReuseError)
        assert "calls the UNet2DConditionModel that thread" in str(raised[0])
        assert "must take turns (a lock around their calls), or have a copy each" in str(raised[0])
        assert torch.equal(sample(pipe, 2), expected)


@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_call_from_another_thread_between_the_steps_harms_nobody(pipe, at):
    outs = []
    given = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32)

    @torch.no_grad()
    def call():
        outs.append(pipe.unet(given[0], pipe.scheduler.timesteps[at], given[1]).sample)

    with attnreuse.enable(pipe, hurry(4, 2, None)) as session, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = sample(pipe, 4)
        assert torch.equal(sample(pipe, 4, callback_on_step_end=from_another_thread(call)), expected)
        assert session.report().layers[0].reused == 2
    call()
    assert torch.equal(outs[0], outs[1])


def test_steps_of_one_run_may_take_turns_between_threads(pipe):
    unet, scheduler = pipe.unet, pipe.scheduler

    def loop(call):
        scheduler.set_timesteps(4)
        g = torch.Generator().manual_seed(0)
        x, context = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 7, 32, generator=g)
        for t in scheduler.timesteps:
            x = scheduler.step(call(x, t, context), t, x).prev_sample
        return x

    @torch.no_grad()
    def call(*given):
        return unet(*given).sample

    with (
        attnreuse.enable(unet, hurry(4, 2, None)) as session,
        ThreadPoolExecutor(1) as one,
        ThreadPoolExecutor(1) as two,
    ):
        expected = loop(call)
        turns = itertools.cycle([one, two])
        assert torch.equal(loop(lambda *given: next(turns).submit(call, *given).result()), expected)
        assert session.report().layers[0].reused == 2


def test_another_thread_may_begin_a_run_of_its_own_afterwards(pipe):
    results = []
    with attnreuse.enable(pipe, hurry(4, 2, None)):
        expected = sample(pipe, 4)
        thread = threading.Thread(target=lambda: results.append(sample(pipe, 4)))
        thread.start()
        thread.join()
    assert torch.equal(results[0], expected)


# -- other ways to call


def test_torch_compile_keeps_one_graph_per_action_pattern(pipe):
    expected = {}
    with attnreuse.enable(pipe, hurry(4, 2, None)):
        expected["reuse"] = sample(pipe, 4)
    torch._dynamo.reset()
    unet = pipe.unet
    pipe.unet = torch.compile(unet, backend="eager", fullgraph=True)
    with attnreuse.enable(pipe, hurry(4, 2, None)) as session, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = sample(pipe, 4)
    assert session.report().layers[0].reused == 2
    torch.testing.assert_close(actual, expected["reuse"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("whole", [True, False])
def test_a_compiler_is_told_that_maps_stay_where_they_are(pipe, whole):
    """Else CUDA graphs copy each map to an input of their own in every call, and leave captures out."""
    told = []

    def backend(module, inputs):
        places = [node for node in module.graph.find_nodes(op="placeholder") if is_storage(node.meta["example_value"])]
        told.extend(node.meta["tensor_dict"].get("_dynamo_static_input_type") for node in places)
        return module.forward

    def is_storage(given):
        return isinstance(given, torch.Tensor) and given.dtype == torch.uint8 and given.ndim == 1

    compile_denoiser(pipe, whole, backend, fullgraph=False)
    with attnreuse.enable(pipe, hurry(4, 2, None), layers="all"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sample(pipe, 4)
    assert set(told) == {"unguarded"}


def test_a_cpu_offloaded_pipeline(pipe):
    """accelerate replaces `forward`; hooks and shapes must survive it."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    with attnreuse.enable(pipe, hurry(4, 2, None)):
        expected = sample(pipe, 4)
    for order in ("hook first", "enable first"):
        if order == "hook first":
            add_hook_to_module(pipe.unet, ModelHook())
        with attnreuse.enable(pipe, hurry(4, 2, None)) as session:
            if order == "enable first":
                add_hook_to_module(pipe.unet, ModelHook())
            assert torch.equal(sample(pipe, 4), expected)
            assert session.report().layers[0].reused == 2
        remove_hook_from_module(pipe.unet)


def test_interrupted_runs_leave_nothing_behind(pipe):
    def interrupt(pipe, step, t, kwargs):
        pipe._interrupt = step >= 2
        return kwargs

    with attnreuse.enable(pipe, hurry(6, 4, None)) as session:
        expected = sample(pipe, 6)
        sample(pipe, 6, callback_on_step_end=interrupt)
        assert session.report().steps == 3
        assert maps_alive() == 0
        assert torch.equal(sample(pipe, 6), expected)


def test_report_prints_and_serialises(pipe):
    with attnreuse.enable(pipe, hurry(4, 2, None)) as session:
        sample(pipe, 4)
    data = session.report().to_dict()
    assert data["layers"][0] == {
        "name": "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
        "kind": "self",
        "computed": 1,
        "captured": 1,
        "reused": 2,
        "held": 0,
        "planned": {"computed": 1, "captured": 1, "reused": 2, "held": 0},
        "reasons": {},
        "map_bytes": session.report().layers[0].map_bytes,
        "shape": (2, 2, 64, 64),
        "head_dim": 8,
    }
    printed = str(session.report())
    assert "2: down_blocks.1.*attn1, up_blocks.0.*attn1 (2), mid_block.*attn1" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_warnings_stand_at_the_users_line(pipe):
    with attnreuse.enable(pipe, hurry(3, 1)), pytest.warns(UserWarning, match=r"this run executes 4") as said:
        sample(pipe, 4)
    assert [Path(one.filename).name for one in said] == ["tiny_random.py"]  # where `sample` calls the pipeline


def test_a_layer_that_no_kernel_serves_is_an_error_under_strict(pipe, monkeypatch):
    monkeypatch.setattr(attnreuse.ops, "fallback_reason", lambda *call: "no kernel for this" if call[3] == 8 else None)
    with (
        attnreuse.enable(pipe, hurry(3, 1, None), strict=True),
        pytest.raises(
            attnreuse.UnsupportedLayerError, match=r"layer .*attn1 would run through plain torch: no kernel for this"
        ),
    ):
        sample(pipe, 3)


def test_a_pipeline_given_another_denoiser_has_one_session_at_most(pipe):
    old, new, expected = pipe.unet, random_unet(), sample(pipe, 4)
    attnreuse.enable(pipe, hurry(4, 2))
    pipe.unet = new
    attnreuse.disable(pipe)
    assert not hasattr(old, ATTRIBUTE)
    stock = sample(pipe, 4)

    pipe.unet = old
    attnreuse.enable(pipe, hurry(4, 2))
    pipe.unet = new
    with attnreuse.enable(pipe, hurry(4, 0)) as session:
        assert torch.equal(sample(pipe, 4), stock)
        assert session.report().steps == 4
    assert not hasattr(old, ATTRIBUTE)

    pipe.unet = old
    first = attnreuse.enable(pipe, hurry(4, 2))
    with attnreuse.enable(new, hurry(4, 0)) as second:
        pipe.unet = new
        with pytest.warns(UserWarning, match="another session serves: this session ends"):
            assert torch.equal(sample(pipe, 4), stock)
        assert second.report().steps == 4
    assert not hasattr(old, ATTRIBUTE)
    first.disable()
    pipe.unet = old
    assert torch.equal(sample(pipe, 4), expected)


def test_a_bar_over_an_iterator_is_heard_and_stays_what_it_is(pipe):
    context, x = torch.randn(1, 7, pipe.unet.config.cross_attention_dim), torch.randn(1, 4, 8, 8)
    pipe.scheduler.set_timesteps(4)
    with torch.no_grad(), attnreuse.enable(pipe, hurry(4, 2)) as session:
        for _, t in pipe.progress_bar(enumerate(pipe.scheduler.timesteps)):
            pipe.unet(x, t, context)
    assert session.report().layers[0].reused == 2


def test_a_budget_that_holds_no_map_computes_and_says_so(pipe):
    expected = sample(pipe, 4)
    with attnreuse.enable(pipe, hurry(4, 2), memory_budget=100) as session:
        with pytest.warns(UserWarning, match="7 layers only compute.*memory_budget of 100 bytes holds no map"):
            assert torch.equal(sample(pipe, 4), expected)
        assert session.report().allocated_bytes == 0


def test_a_thread_that_died_inside_the_denoiser_shuts_nobody_out():
    """What is no Exception, such as a cancelled task, is heard by no hook of torch."""
    unet = random_unet()
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 7, unet.config.cross_attention_dim)

    def die(*args):
        raise SystemExit

    with torch.no_grad(), attnreuse.enable(unet, hurry(4, 2)) as session:
        session.step(0, 4)
        hook = unet.mid_block.register_forward_pre_hook(die)
        thread = threading.Thread(target=unet, args=(x, 10, context))
        thread.start()
        thread.join()
        hook.remove()
        session.step(0, 4)
        assert torch.isfinite(unet(x, 10, context).sample).all()
