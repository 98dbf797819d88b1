"""Pipelines of diffusers with denoisers of each family: one line puts reuse on, and what they do besides goes on."""

import warnings

import diffusers
import pytest
import torch
from tiny_random import TOKENS, WIDTH, random_pipeline
from zoo import ZOO, added

import attnreuse
from attnreuse import hurry

STEPS = 6


def embeds(seed, *shape):
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixart():
    pipe = diffusers.PixArtSigmaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=random_pipeline().vae,
        transformer=ZOO["PixArt"]().model,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )
    mask = torch.ones(1, TOKENS)
    given = dict(prompt_embeds=embeds(0, TOKENS, 24), prompt_attention_mask=mask, negative_prompt=None)
    given |= dict(negative_prompt_embeds=embeds(1, TOKENS, 24), negative_prompt_attention_mask=mask)
    return _quiet(pipe), {**given, "use_resolution_binning": False}


def sd3(name="SD3.5", **call):
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=ZOO[name]().model,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=random_pipeline().vae,
        **dict.fromkeys(
            ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
        ),
    )
    pipe.vae.register_to_config(shift_factor=0.0)
    given = dict(prompt_embeds=embeds(0, TOKENS, 24), pooled_prompt_embeds=embeds(2, 20))
    given |= dict(negative_prompt_embeds=embeds(1, TOKENS, 24), negative_pooled_prompt_embeds=embeds(3, 20))
    return _quiet(pipe), {**given, **call}


def sd3_heun():
    pipe, given = sd3("SD3")
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    return pipe, given


def flux(dtype=torch.float32, **call):
    model = ZOO["Flux"]().model
    model.register_to_config(in_channels=16)
    model.x_embedder = torch.nn.Linear(16, 32)  # of 2 x 2 latents of 4 channels
    model.proj_out = torch.nn.Linear(32, 16)
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=random_pipeline().vae,
        transformer=model,
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    )
    given = dict(prompt_embeds=embeds(0, TOKENS, 24), pooled_prompt_embeds=embeds(2, 20), **call)
    pipe.transformer.to(dtype)
    return _quiet(pipe), {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in given.items()}


def flux_with_true_guidance():
    return flux(
        true_cfg_scale=3.0,
        negative_prompt_embeds=embeds(1, TOKENS, 24),
        negative_pooled_prompt_embeds=embeds(3, 20),
    )


def animatediff():
    base, animal = random_pipeline(), ZOO["AnimateDiff"]()
    pipe = diffusers.AnimateDiffPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=None,
        unet=animal.model,
        motion_adapter=None,
        scheduler=base.scheduler,
    )
    given = dict(prompt_embeds=embeds(0, TOKENS, WIDTH), negative_prompt_embeds=embeds(1, TOKENS, WIDTH))
    return _quiet(pipe), {**given, "num_frames": 3}


def ddpm():
    return _quiet(diffusers.DDPMPipeline(ZOO["UNet2DModel"]().model, diffusers.DDPMScheduler())), {"output_type": "np"}


def deepfloyd():
    unet = added(out_channels=8).model
    pipe = diffusers.IFPipeline(
        tokenizer=None,
        text_encoder=None,
        unet=unet,
        scheduler=diffusers.DDPMScheduler(variance_type="learned_range"),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    given = dict(prompt_embeds=embeds(0, TOKENS, 24), negative_prompt_embeds=embeds(1, TOKENS, 24))
    return _quiet(pipe), {**given, "output_type": "pt"}


PIPELINES = {
    "PixArt-Sigma": pixart,
    "SD3": lambda: sd3("SD3"),
    "SD3.5": sd3,
    "SD3, Heun": sd3_heun,
    "SD3, skip-layer guidance": lambda: sd3(
        "SD3", skip_guidance_layers=[0], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0
    ),
    "Flux": flux,
    "Flux, bf16": lambda: flux(torch.bfloat16),
    "Flux, true guidance": flux_with_true_guidance,
    "AnimateDiff": animatediff,
    "DDPM": ddpm,
    "DeepFloyd": deepfloyd,
}


def sample(pipe, given, seed=0):
    g = torch.Generator().manual_seed(seed)
    call = {"output_type": "latent", "num_inference_steps": STEPS, "generator": g, **given}
    if not isinstance(pipe, diffusers.DDPMPipeline):
        call |= {"height": 16, "width": 16} if hasattr(pipe, "vae") else {"height": 8, "width": 8}
    made = pipe(**call)
    return torch.as_tensor(made.images if hasattr(made, "images") else made.frames)


@pytest.fixture(params=PIPELINES)
def made(request):
    return PIPELINES[request.param]()


def test_one_line_reuses(made):
    pipe, given = made
    stock = sample(pipe, given)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="attnreuse")
        if "skip_guidance_layers" in given:  # whose calls begin at the second step
            late = ".*at step 1 instead of reusing: its map of step 0 was not captured"
            warnings.filterwarnings("ignore", message=late)
        with attnreuse.enable(pipe) as session:
            first, second = sample(pipe, given), sample(pipe, given)
    assert torch.equal(first, second)
    change = (first - stock).norm() / stock.norm()
    assert 0 < change < 0.5
    for layer in session.report().layers:
        assert layer.reused > 0
        assert layer.shape is not None
        assert not layer.reasons or "skip_guidance_layers" in given
    assert torch.equal(sample(pipe, given), stock)


def test_never_reusing_equals_stock(made):
    pipe, given = made
    stock = sample(pipe, given)
    with attnreuse.enable(pipe, hurry(reuse=0.0)):
        torch.testing.assert_close(sample(pipe, given), stock, rtol=0, atol=1e-4)


def test_caches_of_diffusers_are_compared_and_leave_nothing_behind():
    from attnreuse.study.compare.other_caches import caches_for

    pipe, given = flux_with_true_guidance()
    given = {**given, "num_inference_steps": 8}
    stock = sample(pipe, given)
    caches = caches_for(pipe)
    assert {name.partition("(")[0] for name in caches} == {"FirstBlockCache", "TaylorSeer", "PAB"}
    for around in caches.values():
        with around(pipe):
            cached = sample(pipe, given)
        assert (cached - stock).norm() < 0.1 * stock.norm()
        assert torch.equal(sample(pipe, given), stock)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_guidance_that_ends_before_skip_layer_guidance_goes_on_with_its_own_maps(mode):
    """The call that is left has the prompt of the call that skips layers, and nothing of that one's maps."""

    def run(change, reuse):
        options = dict(skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0)
        pipe, given = sd3("SD3", skip_guidance_layers=[0], **options)
        names = ["prompt_embeds", "pooled_prompt_embeds"]

        def cut(pipe, step, t, kept):
            if step != 4:
                return {}
            pipe._guidance_scale = 0.0
            return {name: change(kept[name][-1:]) for name in names}

        policy = attnreuse.Policy(steps=8, reuse=".....R.." if reuse else "........")
        given |= dict(num_inference_steps=8, height=16, width=16, output_type="latent")
        given |= dict(callback_on_step_end=cut, callback_on_step_end_tensor_inputs=names)
        with attnreuse.enable(pipe, policy, map_format="fp32") as session, mode():
            out = pipe(**given, generator=torch.Generator().manual_seed(0)).images.clone()
        return out, {layer.reused for layer in session.report().layers}

    view, copied = run(lambda kept: kept, True), run(torch.clone, True)
    assert view[1] == copied[1] == {1}
    assert torch.equal(view[0], copied[0])
    assert not torch.equal(view[0], run(torch.clone, False)[0])
