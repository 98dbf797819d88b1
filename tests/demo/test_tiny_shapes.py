"""The shipped pipeline: small, complete, Stable-Diffusion-shaped, and it obeys held-out captions."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

import attnreuse
from attnreuse.binding.shapes import map_shapes
from attnreuse.demo.caption_oracle import judge
from attnreuse.demo.tiny_shapes import draw, held_out_prompts, load_clip, parse, sample_scenes
from attnreuse.policy import shipped_policies
from attnreuse.study.blueprint import Blueprint
from attnreuse.study.evaluate import Evaluator
from attnreuse.study.setting import Setting

FOLDER = attnreuse.tiny_shapes_path()


@pytest.fixture(scope="module")
def shipped():
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_small_and_half_precision():
    assert sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()) <= 12e6
    weights = list(FOLDER.rglob("*.safetensors"))
    assert {path.parent.name for path in weights} == {"unet", "vae", "text_encoder", "clip"}
    for path in weights:
        with safe_open(path, "pt") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} <= {"F16", "I64"}  # noqa: SIM118
    assert not list(FOLDER.rglob("*.bin"))


def test_self_attention_matters_as_in_stable_diffusion():
    blueprint = Blueprint.load(str(FOLDER))
    found = map_shapes(blueprint.denoiser, blueprint.inputs((128, 128), batch=2))
    shapes = {name: layer.map for name, layer in found.items()}
    tokens = {name: m for name, (_, _, m, _) in shapes.items()}
    assert sorted(set(tokens.values())) == [64, 256, 1024]
    for level in (64, 256, 1024):
        kinds = {name[-1] for name, count in tokens.items() if count == level}
        assert kinds == {"1", "2"}  # attn1 (self) and attn2 (cross)
    assert all(heads >= 4 for _, heads, _, _ in shapes.values())


def test_how_it_was_trained_is_recorded():
    training = json.loads((FOLDER / "training.json").read_text())
    assert {"clip", "vae", "unet-8", "unet-16", "unet-32"} <= set(training["stages"])


def test_its_clip_tells_captions_apart():
    """The contrastive pair that conditions the UNet ranks the true caption first."""
    clip, tokenizer = load_clip(FOLDER)
    scenes = list({str(s.caption): s for s in sample_scenes(80, seed=9)}.values())[:64]
    tokens = tokenizer([str(s.caption) for s in scenes], padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        out = clip(input_ids=tokens.input_ids, pixel_values=draw(scenes, 64))
    right = out.logits_per_image.argmax(1) == torch.arange(len(scenes))
    assert right.float().mean() >= 0.9


@pytest.fixture(scope="module")
def obedience(shipped):
    """Shares of 16 held-out prompts, never trained on, that 20 DDIM steps with guidance get right."""
    prompts = held_out_prompts(16)
    verdicts = []
    for start in range(0, len(prompts), 4):
        batch = prompts[start : start + 4]
        generators = [torch.Generator().manual_seed(start + i) for i in range(4)]
        given = {"num_inference_steps": 20, "guidance_scale": attnreuse.TINY_SHAPES_GUIDANCE}
        images = shipped(batch, generator=generators, **given).images
        verdicts += [judge(np.array(image), parse(prompt)) for image, prompt in zip(images, batch, strict=True)]
    share = {key: np.mean([getattr(v, key) for v in verdicts]) for key in ("background", "color", "shape", "relation")}
    print({key: round(float(value), 3) for key, value in share.items()})
    return share


def test_it_obeys_held_out_captions(obedience):
    """As accepted; far above chance (1/4, 1/3, 1/3, 1/8)."""
    accepted = {"background": 0.9, "color": 0.9, "shape": 0.7, "relation": 0.8}
    assert {key for key, least in accepted.items() if obedience[key] < least} == set()


@pytest.mark.parametrize("reuse", [5, 10])
def test_reuse_stays_close_and_the_late_block_least(shipped, reuse):
    """On captions and seeds that neither training nor search have seen."""
    evaluator = Evaluator(shipped, Setting(tuple(held_out_prompts(2)), 20, guidance=attnreuse.TINY_SHAPES_GUIDANCE))
    late = evaluator.scores(attnreuse.hurry(20, reuse, max_age=None))["psnr"]
    fresh = evaluator.scores(attnreuse.hurry(20, reuse))["psnr"]
    found = next(p for p in shipped_policies("DDIMScheduler", 20) if p.reuse_steps == reuse)
    assert 25 < late < min(fresh, evaluator.scores(found)["psnr"])
