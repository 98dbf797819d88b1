"""The training script of the shipped pipeline: resumes as if never stopped, teaches what it says."""

import dataclasses
from types import SimpleNamespace

import distill_tiny_shapes as distilling
import pytest
import torch
import train_tiny_flux as flux_training
import train_tiny_shapes as training
import transformer

from attnreuse.demo.tiny_shapes import Caption
from attnreuse.study.evaluate import Evaluator
from attnreuse.study.setting import Setting


@pytest.fixture
def short(monkeypatch):
    """Stages of a few small steps."""
    few = {name: dataclasses.replace(s, steps=6, batch=4, pictures=16) for name, s in training.STAGES.items()}
    monkeypatch.setattr(training, "STAGES", few)
    return few


def train(stage, work):
    torch.manual_seed(training.SEED)
    if stage == "clip":
        training.train_clip(work)
    elif stage == "vae":
        training.train_vae(work)
    else:
        training.train_unet(work, training.STAGES[stage], None)
    return torch.load(work / f"{stage}.pt", weights_only=True)


def test_a_stage_stopped_half_way_goes_on_to_the_same_weights(short, tmp_path, monkeypatch):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for work in (whole, halves):
        work.mkdir()
    for stage in ("clip", "vae", "unet-8"):
        expected = train(stage, whole)
        update, stopped = training.Run.update, []

        def stop(run, loss, update=update, stopped=stopped):
            update(run, loss)
            if run.step == 3 and not stopped:
                stopped.append(True)
                run.save()
                raise KeyboardInterrupt

        monkeypatch.setattr(training.Run, "update", stop)
        with pytest.raises(KeyboardInterrupt):
            train(stage, halves)
        actual = train(stage, halves)
        monkeypatch.setattr(training.Run, "update", update)
        assert actual["step"] == expected["step"] == 6
        for name, weight in expected["model"].items():
            assert torch.equal(actual["model"][name], weight), name


def test_latents_are_standardised(short, tmp_path):
    train("vae", tmp_path)
    vae = training.standardise(training.averaged(tmp_path, short["vae"], training.build_vae()))
    scenes = training.sample_scenes(64, seed=3)
    latents = vae.encode(training.draw(scenes, 128)).latent_dist.mean
    assert latents.shape == (64, 4, 32, 32)
    assert latents.mean((0, 2, 3)).abs().max() < 0.1
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.1


def test_layout_says_what_is_where():
    first, second = ("red", "circle"), ("blue", "square")
    left = Caption((first, second), "left of", "gray")
    right = Caption((second, first), "right of", "gray")
    assert training.layout(left) == training.layout(right) == [1, 0, 0, 2, 1]
    assert training.layout(Caption((first, second), "below", "gray")) == [0, 2, 1, 0, 0]
    assert training.layout(Caption((first,), None, "gray")) == [2, 0, 0, 0, 0]


def test_every_word_of_the_grammar_is_one_token():
    tokenizer = training.build_tokenizer()
    text = "a red circle left of a blue square on gray"
    ids = training.tokenize(tokenizer, [text])
    assert ids.shape == (1, training.MAX_TOKENS)
    assert (ids[0] != tokenizer.eos_token_id).sum() == 1 + len(text.split())


@pytest.mark.parametrize("begin", [999, 99])
def test_a_student_is_taught_where_two_guided_steps_lead(begin):
    teacher = distilling.Teacher(20)
    unet, scheduler = teacher.pipe.unet, teacher.pipe.scheduler
    context, empty = teacher.context(["a red circle on gray"]), teacher.context([""])
    start = led = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(20)
    with torch.no_grad():
        for time in (begin, begin - 50):
            without, with_caption = unet(led.expand(2, -1, -1, -1), time, torch.cat([empty, context])).sample
            led = scheduler.step((without + 2.5 * (with_caption - without))[None], time, led).prev_sample
    taught = teacher.target(start, torch.tensor([begin]), context, empty, 2.5)
    scheduler.set_timesteps(10)
    assert begin in scheduler.timesteps
    torch.testing.assert_close(scheduler.step(taught, begin, start).prev_sample, led, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sampler", transformer.SAMPLERS)
def test_flow_matching_is_taught_where_its_samplers_lead(sampler):
    """What the loss wants, the velocity away from the picture, leads noise to the picture."""
    latents, g = torch.randn(4, 16, 16), torch.Generator().manual_seed(0)

    def exact(noised, timestep, **_):
        return SimpleNamespace(sample=(noised - latents) / timestep.view(-1, 1, 1))

    text = torch.zeros(4, 24, 128), torch.zeros(4, 128)
    assert flux_training.flow_loss(exact, 8, latents, text, g) < 1e-8
    scheduler = transformer.SAMPLERS[sampler](shift=flux_training.SHIFT)
    scheduler.set_timesteps(10, mu=1.0, sigmas=None)
    x = torch.randn(latents.shape, generator=g)
    for t in scheduler.timesteps:
        x = scheduler.step(exact(x, t / 1000).sample, t, x).prev_sample
    torch.testing.assert_close(x, latents, atol=1e-3, rtol=1e-3)


def test_the_small_flux_samples_what_a_prompt_says_and_reuses():
    torch.manual_seed(0)
    pipe = flux_training.pipeline(flux_training.Shipped(), flux_training.build())
    setting = Setting(("a red circle on gray", "a cyan square on white"), 4, guidance=2.5, size=(64, 64))
    for made_by in transformer.SAMPLERS.values():
        pipe.scheduler = made_by(shift=flux_training.SHIFT)
        sampled = Evaluator(pipe, setting)
        assert sampled.full.pictures.shape == (2, 64, 64, 3)
        assert not (sampled.full.pictures[0] == sampled.full.pictures[1]).all()
        reusing = sampled.policy([i % 2 > 0 for i in range(sampled.executed_steps)], "every other")
        assert 20 < sampled.scores(reusing)["psnr"] < 90
