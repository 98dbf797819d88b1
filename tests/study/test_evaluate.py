"""Judging schedules: what is replayed equals what would have been computed, to the bit."""

import os
import random
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny_random
import torch
from tiny_random import captioned_pipeline

import attnreuse
from attnreuse import Policy, PolicyMismatchError, hurry
from attnreuse.binding.processors import attention_layers
from attnreuse.planning.samplers import make_scheduler
from attnreuse.study.evaluate import Evaluator
from attnreuse.study.setting import Setting, not_of_prompts

PROMPTS = ("a red circle on gray", "a blue square on white", "a cyan triangle on black")


def setting(**changes):
    return Setting(**{"prompts": PROMPTS, "steps": 6, "map_format": "fp32", "batch": 2, **changes})


def policies(steps, layers):
    """Schedules with much in common, repeated, and some that differ between layers."""
    rng = random.Random(0)
    rows = [
        hurry(steps, 2, None).reuse,
        hurry(steps, 3, None).reuse,
        hurry(steps, 2, 1).reuse,
        hurry(steps, 2, None).reuse,
    ]
    rows += [tuple([False] + [rng.random() < 0.5 for _ in range(steps - 1)]) for _ in range(4)]
    mixed = {layers[0]: rows[1], layers[-1]: rows[4]}
    held = [(False, "H", True, *rows[1][3:]), (False, True, "H", *rows[1][3:])]
    return [Policy(steps=steps, reuse=row) for row in [*rows, mixed, *held, rows[1]]]


@pytest.mark.filterwarnings("error:.*was not called")
@pytest.mark.parametrize("layers", [None, "all"])
@pytest.mark.parametrize("scheduler", ["DDIM", "DPM", "PNDM", "Heun"])
def test_replayed_beginnings_change_no_bit(scheduler, layers):
    pipe = captioned_pipeline()
    pipe.scheduler = make_scheduler(pipe.scheduler.config, scheduler)
    sharing, plain = (Evaluator(pipe, setting(layers=layers), n) for n in (1 << 30, 0))
    for policy in policies(sharing.executed_steps, list(attention_layers(pipe.unet))):
        ours, theirs = sharing.sample(policy), plain.sample(policy)
        assert torch.equal(ours.latents, theirs.latents), policy
        assert np.array_equal(ours.pictures, theirs.pictures), policy
    assert plain.calls.made == plain.calls.asked == sharing.calls.asked
    assert sharing.calls.made < 0.8 * sharing.calls.asked


def test_a_memo_too_small_for_all_still_answers_rightly():
    pipe = captioned_pipeline()
    one = 2 * 2 * 4 * 8 * 8 * 4  # bytes of one output: guidance, batch, channels, size, fp32
    sharing, plain = Evaluator(pipe, setting(), memo_bytes=7 * one), Evaluator(pipe, setting(), memo_bytes=0)
    for policy in policies(6, list(attention_layers(pipe.unet))):
        assert torch.equal(sharing.sample(policy).latents, plain.sample(policy).latents)


def test_full_is_the_stock_pipeline_and_nothing_stays_behind():
    pipe = captioned_pipeline()
    evaluator = Evaluator(pipe, setting())
    full = evaluator.full.pictures
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    stock = pipe(list(PROMPTS[:2]), num_inference_steps=6, generator=generators, output_type="np").images
    assert np.array_equal(full[:2], stock)
    assert "forward" not in vars(pipe.unet)
    assert not hasattr(pipe.unet, "_attnreuse_session")


def test_a_forward_that_someone_else_bound_stays_bound():
    pipe = captioned_pipeline()
    calls, stock = [], pipe.unet.forward
    pipe.unet.forward = lambda *args, **kwargs: calls.append(1) or stock(*args, **kwargs)
    bound = pipe.unet.forward
    Evaluator(pipe, setting()).full  # noqa: B018
    assert len(calls) == 12
    assert pipe.unet.forward is bound


def test_scores_are_means_over_pictures():
    evaluator = Evaluator(captioned_pipeline(), setting())
    policy = hurry(6, 3, None)
    sampled, full = evaluator.sample(policy), evaluator.full
    each = [
        -10 * np.log10(np.mean((a.astype(float) - b) ** 2))
        for a, b in zip(sampled.pictures, full.pictures, strict=True)
    ]
    assert evaluator.scores(policy)["psnr"] == pytest.approx(np.mean(each))
    assert evaluator.scores(hurry(6, 0, None))["psnr"] == 120  # equal


def test_map_bytes_are_what_a_run_allocates():
    pipe = captioned_pipeline()
    evaluator = Evaluator(pipe, setting(prompts=PROMPTS[:2], layers="all", map_format="u8"))
    policy = hurry(6, 2, None)
    with attnreuse.enable(pipe, policy, map_format="u8", layers="all") as session:
        pipe(list(PROMPTS[:2]), num_inference_steps=6, output_type="latent")
    assert evaluator.map_bytes(policy) == session.report().allocated_bytes > 0


def test_what_decides_a_score_decides_the_key():
    pipe = captioned_pipeline()
    keys = [Evaluator(pipe, setting(**c)).key() for c in ({}, {"seed": 1}, {"steps": 7}, {"guidance": 2.0}, {})]
    pipe.scheduler = make_scheduler(pipe.scheduler.config, "DPM")
    keys.append(Evaluator(pipe, setting()).key())
    assert keys[0] == keys[4]
    assert len(set(keys)) == 5
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight.mul_(1.01)
    keys.append(Evaluator(pipe, setting()).key())
    assert len(set(keys)) == 6


def test_the_key_is_the_same_in_every_process():
    """diffusers keeps the names of defaults of a config in the order of a set of strings."""
    code = (
        "from tiny_random import captioned_pipeline; from attnreuse.study.evaluate import Evaluator;"
        "from attnreuse.study.setting import Setting;"
        "from attnreuse.planning.samplers import make_scheduler; pipe = captioned_pipeline();"
        "pipe.scheduler = make_scheduler(pipe.scheduler.config, 'Heun'); print(Evaluator(pipe, Setting(('p',))).key())"
    )
    keys = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=Path(tiny_random.__file__).parent, capture_output=True, text=True,
            env=os.environ | {"PYTHONHASHSEED": seed}, check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(keys) == 1
    assert keys.pop()


def test_others_of_others_are_those_of_the_first():
    evaluator = Evaluator(captioned_pipeline(), setting())
    assert evaluator.at(3).at(4) is evaluator.at(4)
    assert evaluator.at(3).at(6) is evaluator
    assert evaluator.at(4).scores(hurry(4, 0, None)) == evaluator.at(3).at(4).scores(hurry(4, 0, None))
    assert evaluator.at(4).shapes() == evaluator.shapes()


def test_layers_that_a_policy_names_are_served_besides():
    evaluator = Evaluator(captioned_pipeline(), setting())
    cross = "mid_block.attentions.0.transformer_blocks.0.attn2"
    policy = Policy(steps=6, reuse={cross: ".HHHHH"})
    assert set(evaluator.schedule(policy).actions) == {*evaluator.served(), cross}
    assert cross in evaluator.map_sizes(policy)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="prompts"):
        Setting(())
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        setting(steps=0)
    with pytest.raises(PolicyMismatchError, match="for 5 executed steps"):
        Evaluator(captioned_pipeline(), setting()).sample(hurry(5, 2, None))


class OwnPipeline:
    def __call__(self, prompt, image=None, **options): ...


class Wrapper:
    def __call__(self, *args, **kwargs): ...


@pytest.mark.parametrize(
    ("pipeline", "reason"),
    [
        (diffusers.StableDiffusionPipeline, None),
        (diffusers.StableDiffusionPAGPipeline, None),
        (diffusers.FluxKontextPipeline, None),  # its picture may be left out
        (OwnPipeline, None),
        (Wrapper, None),
        (diffusers.DDPMPipeline, "takes no prompt"),
        (diffusers.StableDiffusionImg2ImgPipeline, "is given image beside a prompt"),
        (diffusers.StableDiffusionInpaintPipeline, "is given image and mask_image beside a prompt"),
        (diffusers.KandinskyPipeline, "is given image_embeds and negative_image_embeds beside a prompt"),
    ],
)
def test_pipelines_that_need_more_than_prompts_are_known_by_their_call(pipeline, reason):
    assert not_of_prompts(pipeline) == (reason and f"{pipeline.__name__} {reason}")
