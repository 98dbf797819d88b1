"""Pipelines and loops that step in ways of their own: the clock follows the calls, as an independent reference does."""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import diffusers
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from life import maps_alive
from reference_run import reference
from tiny_random import WIDTH, captioned_pipeline, guided, random_unet, sample

import attnreuse
from attnreuse import Policy, hurry

CAPTION = "a red circle left of a blue square"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def counted(unet, run):
    """What `run()` gives, and how often it calls `unet`."""
    calls = []
    hook = unet.register_forward_pre_hook(lambda *a: calls.append(1))
    try:
        return run(), len(calls)
    finally:
        hook.remove()


def check_against_reference(target, unet, run, steps, calls=1):
    """Never reusing equals stock, reusing the reference, a second run the first; every step counts once."""
    stock = run()
    with attnreuse.enable(target, hurry(steps, 0), map_format="fp32") as session:
        torch.testing.assert_close(run(), stock, rtol=0, atol=1e-4)
    policy = hurry(steps, steps // 2)
    expected = reference(unet, policy, run, calls)
    with attnreuse.enable(target, policy, map_format="fp32") as session:
        actual = run()
        report = session.report()
        assert torch.equal(run(), actual)
        assert maps_alive() == 0
    assert (actual - expected).norm() / expected.norm() < 2e-3
    assert report.steps == steps
    assert {layer.reused for layer in report.layers} == {calls * policy.reuse_steps}
    assert not any(layer.reasons for layer in report.layers)


# -- one denoiser, several pipelines


@pytest.mark.parametrize(
    "theirs", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"]
)
@pytest.mark.parametrize("ran_before", [True, False])
def test_a_sibling_with_a_scheduler_of_its_own(pipe, theirs, ran_before):
    parts = {**pipe.components, "scheduler": getattr(diffusers, theirs).from_config(pipe.scheduler.config)}
    sibling = type(pipe)(**parts, requires_safety_checker=False)
    sibling.set_progress_bar_config(disable=True)
    if ran_before:
        sample(pipe, 6)
    _, steps = counted(pipe.unet, lambda: sample(sibling, 6))
    check_against_reference(pipe, pipe.unet, lambda: sample(sibling, 6), steps)


def test_pipelines_that_share_a_denoiser_may_take_turns_in_threads(pipe):
    parts = dict(pipe.components)
    scheduler, lock = parts.pop("scheduler"), Lock()
    own = [copy.deepcopy(scheduler) for _ in range(3)]
    pipes = [type(pipe)(**parts, scheduler=s, requires_safety_checker=False) for s in own]
    for each in pipes:
        each.set_progress_bar_config(disable=True)
    with attnreuse.enable(pipe, hurry(6, 3)):
        expected = [sample(pipe, 6, seed=i) for i in range(3)]

        def request(i):
            with lock:
                return sample(pipes[i], 6, seed=i)

        with ThreadPoolExecutor(3) as pool:
            assert all(torch.equal(*pair) for pair in zip(pool.map(request, range(3)), expected, strict=True))


def test_one_enabled_pipeline_serves_requests_of_other_lengths(pipe):
    """Those that the policy is not for compute, and say so."""
    stock = {steps: sample(pipe, steps) for steps in (4, 6, 8)}
    with attnreuse.enable(pipe, hurry(6, 3)) as session, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for steps in (4, 6, 8):
            assert torch.equal(sample(pipe, steps), stock[steps]) == (steps != 6)
            assert session.report().layers[0].reused == (3 if steps == 6 else 0)


# -- several calls a step


@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "PNDMScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler"]
)
def test_panorama_calls_once_per_view_and_puts_the_scheduler_back(scheduler):
    pipe = guided(diffusers.StableDiffusionPanoramaPipeline)
    pipe.vae_scale_factor = 8
    pipe.get_views = lambda *size, **more: [(0, 8, start, start + 8) for start in (0, 4, 8, 12)]
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)

    def run():
        return sample(pipe, 5, height=64, width=160)

    _, calls = counted(pipe.unet, run)
    check_against_reference(pipe, pipe.unet, run, calls // 4, calls=4)


def test_guidance_that_calls_twice_with_other_batches():
    """Self-attention guidance: a guided batch of two, then the degraded sample alone, with a processor of its own."""
    pipe = guided(diffusers.StableDiffusionSAGPipeline)

    def run():
        return sample(pipe, 6, sag_scale=0.75)

    stock = run()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with attnreuse.enable(pipe, hurry(6, 0)):
            torch.testing.assert_close(run(), stock, rtol=0, atol=1e-4)
        with attnreuse.enable(pipe, hurry(6, 3)) as session:
            first = run()
            layers = {layer.name: layer for layer in session.report().layers}
            assert torch.equal(run(), first)
    assert 0 < (first - stock).norm() / stock.norm() < 0.5
    assert layers.pop("mid_block.attentions.0.transformer_blocks.0.attn1").reused == 0
    assert {layer.reused for layer in layers.values()} == {6}


def test_attend_and_excite_computes_with_its_own_processors():
    pipe = guided(diffusers.StableDiffusionAttendAndExcitePipeline)

    def run():
        return pipe(
            prompt=CAPTION, token_indices=[2, 3], max_iter_to_alter=2, thresholds={0: 0.2}, num_inference_steps=5,
            attn_res=(4, 4), height=16, width=16, generator=generator(), output_type="latent",
        ).images  # fmt: skip

    stock = run()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with attnreuse.enable(pipe, hurry(5, 2)) as session:
            assert torch.equal(run(), stock)
    assert "AttendExciteAttnProcessor" in next(iter(session.report().skipped.values()))


# -- runs that begin late or end early


def sdxl(cls, scheduler=None, **parts):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    unet = random_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=48 + WIDTH,
        cross_attention_dim=2 * WIDTH,
    )
    base = captioned_pipeline()
    config = base.text_encoder.config.to_dict() | {"projection_dim": WIDTH}
    torch.manual_seed(3)
    second = CLIPTextModelWithProjection(CLIPTextConfig(**config)).eval()
    pipe = cls(
        vae=base.vae, text_encoder=base.text_encoder, text_encoder_2=second, tokenizer=base.tokenizer,
        tokenizer_2=base.tokenizer, unet=unet, scheduler=scheduler or base.scheduler,
        **{name: make(unet) for name, make in parts.items()},
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.conv_out.weight.data.mul_(0.3)
    return pipe


def controlnet(unet):
    torch.manual_seed(4)
    return diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32)).eval()


def adapter(unet):
    torch.manual_seed(5)
    return diffusers.T2IAdapter(in_channels=3, channels=[16, 32], num_res_blocks=1, downscale_factor=2,
                                adapter_type="full_adapter").eval()  # fmt: skip


EARLY = {
    "StableDiffusionXLPipeline": {},
    "StableDiffusionXLControlNetPipeline": {"controlnet": controlnet},
    "StableDiffusionXLAdapterPipeline": {"adapter": adapter},
}


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
@pytest.mark.parametrize("name", EARLY)
def test_denoising_end_is_heard_whoever_has_it(name, scheduler):
    pipe = sdxl(getattr(diffusers, name), getattr(diffusers, scheduler)(steps_offset=1), **EARLY[name])
    image = {"image": torch.rand(1, 3, 16, 16, generator=generator())} if EARLY[name] else {}

    def run():
        return pipe(
            prompt=CAPTION, num_inference_steps=10, denoising_end=0.7, generator=generator(), output_type="latent",
            **image,
        ).images  # fmt: skip

    _, steps = counted(pipe.unet, run)
    assert steps < (19 if "Heun" in scheduler else 10)
    check_against_reference(pipe, pipe.unet, run, steps)
    with (
        attnreuse.enable(pipe, hurry(10, 5)),
        pytest.raises(attnreuse.PolicyMismatchError, match=f"make the policy for {steps}"),
    ):
        run()


def test_a_refiner_begins_where_the_base_ended_and_siblings_do_not_mix():
    base = sdxl(diffusers.StableDiffusionXLPipeline)
    given = {"prompt": CAPTION, "num_inference_steps": 10, "output_type": "latent"}
    latents = base(denoising_end=0.7, generator=generator(), **given).images
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(**base.components)
    refiner.set_progress_bar_config(disable=True)
    for part in ({"denoising_start": 0.7}, {"strength": 0.5}, {"denoising_start": 0.2, "denoising_end": 0.7}):

        def run(part=part):
            return refiner(image=latents, generator=generator(), **part, **given).images

        _, steps = counted(base.unet, run)
        base(denoising_end=0.7, generator=generator(), **given)  # what the base remembers is not the refiner's
        check_against_reference(base, base.unet, run, steps)


# -- inversion and loops of one's own


def loop_over(unet, scheduler, walk, session=None):
    """A loop that walks timesteps in its own order."""
    x, context = torch.randn(1, 4, 8, 8, generator=generator()), torch.randn(1, 7, WIDTH, generator=generator(1))
    timesteps = walk(scheduler)
    with torch.no_grad():
        for i, t in enumerate(timesteps):
            if session is not None:
                session.step(i, len(timesteps))
            x = x + 0.1 * unet(x, t, context).sample
    return x


WALKS = {
    "forward": lambda s: s.timesteps,
    "as numbers": lambda s: s.timesteps.tolist(),
    "as a batch": lambda s: [t.expand(1) for t in s.timesteps],
    "backward by index": lambda s: [s.timesteps[len(s.timesteps) - 1 - i] for i in range(len(s.timesteps))],
    "reversed": lambda s: list(reversed(s.timesteps)),
    "flipped numbers": lambda s: s.timesteps.flip(0).tolist(),
}


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("cls", [DDIMScheduler, DDIMInverseScheduler])
def test_loops_of_ones_own(walk, cls):
    unet, scheduler = random_unet(), cls()
    unet.conv_out.weight.data.mul_(0.05)

    def run():
        scheduler.set_timesteps(6)
        return loop_over(unet, scheduler, WALKS[walk])

    check_with_scheduler(unet, scheduler, run)


def check_with_scheduler(unet, scheduler, run):
    policy = hurry(6, 3)
    expected = reference(unet, policy, run)
    with attnreuse.enable(unet, policy, scheduler=scheduler, map_format="fp32") as session:
        assert (run() - expected).norm() / expected.norm() < 2e-3
        assert session.report().layers[0].reused == 3
        assert maps_alive() == 0


def test_a_loop_over_timesteps_needs_no_scheduler():
    unet, scheduler = random_unet(), DDIMScheduler()
    scheduler.set_timesteps(6)
    with attnreuse.enable(unet, hurry(6, 3)) as session:
        loop_over(unet, scheduler, WALKS["forward"])
    assert session.report().layers[0].reused == 3


def test_steps_that_are_told_work_where_nothing_can_be_read():
    unet, scheduler = random_unet(), DDIMScheduler()
    scheduler.set_timesteps(6)
    expected = reference(unet, hurry(6, 3), lambda: loop_over(unet, scheduler, lambda s: [7] * 6))
    with attnreuse.enable(unet, hurry(6, 3), map_format="fp32") as session:
        actual = loop_over(unet, scheduler, lambda s: [7] * 6, session)
    assert (actual - expected).norm() / expected.norm() < 2e-3


def test_telling_a_step_before_each_of_its_calls_is_telling_it_once():
    unet, contexts, x = random_unet(), torch.randn(2, 1, 7, WIDTH), torch.randn(1, 4, 8, 8)
    with torch.no_grad(), attnreuse.enable(unet, Policy(steps=3, reuse=[0, 1, 1])) as session:
        for step in range(3):
            for context in contexts:
                session.step(step, 3)
                unet(x + 0.1 * step, 10, context)
        assert session.report().layers[0].reused == 4
        assert maps_alive() == 0


@pytest.mark.parametrize("act", ["invert", "edit"])
def test_diffedit_inverts_with_a_scheduler_of_its_own(act):
    base = captioned_pipeline()
    base.unet.conv_out.weight.data.mul_(0.05)
    config = base.scheduler.config
    pipe = diffusers.StableDiffusionDiffEditPipeline(
        vae=base.vae, text_encoder=base.text_encoder, tokenizer=base.tokenizer, unet=base.unet,
        scheduler=base.scheduler, inverse_scheduler=DDIMInverseScheduler.from_config(config), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 8, "inpaint_strength": 0.75}
    image = torch.rand(1, 3, 16, 16, generator=generator())

    def invert():
        return pipe.invert(prompt=CAPTION, image=image, generator=generator(), **given).latents

    latents = invert()

    def edit():
        mask = torch.ones(1, 8, 8)
        call = {"mask_image": mask, "image_latents": latents, "generator": generator(), "output_type": "latent"}
        return pipe("a blue square", **call, **given).images

    check_against_reference(pipe, pipe.unet, {"invert": invert, "edit": edit}[act], 6)


# -- modular pipelines: one call per guidance branch, branches that come and go


def modular(guider):
    modular_pipelines = pytest.importorskip("diffusers.modular_pipelines")
    full = sdxl(diffusers.StableDiffusionXLPipeline)
    pipe = modular_pipelines.StableDiffusionXLAutoBlocks().init_pipeline()
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
    pipe.update_components(**{name: full.components[name] for name in names}, guider=guider)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def guiders():
    from diffusers import guiders as g
    from diffusers.hooks import LayerSkipConfig

    where = {"indices": [0], "fqn": "down_blocks.1.attentions.0.transformer_blocks"}
    scores = LayerSkipConfig(**where, skip_attention=False, skip_attention_scores=True, skip_ff=False)
    perturbed = {"guidance_scale": 5.0, "perturbed_guidance_scale": 2.8, "perturbed_guidance_config": scores}
    return {
        "guidance": lambda: g.ClassifierFreeGuidance(guidance_scale=5.0),
        "guidance that stops": lambda: g.ClassifierFreeGuidance(guidance_scale=5.0, stop=0.5),
        "guidance that starts late": lambda: g.ClassifierFreeGuidance(guidance_scale=5.0, start=0.3),
        "perturbed attention": lambda: g.PerturbedAttentionGuidance(
            **perturbed, perturbed_guidance_start=0.01, perturbed_guidance_stop=0.8
        ),
        "skipped layers": lambda: g.SkipLayerGuidance(
            guidance_scale=5.0, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0,
            skip_layer_config=LayerSkipConfig(**where),
        ),
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["guidance", "guidance that stops", "guidance that starts late", "perturbed attention", "skipped layers"]
)
def test_modular_pipelines_and_their_guiders(name):
    pytest.importorskip("diffusers.guiders")

    def run(pipe):
        call = {"height": 16, "width": 16, "num_inference_steps": 8, "generator": generator()}
        return pipe(prompt=CAPTION, output_type="latent", output="images", **call)

    def fresh():  # diffusers' guiders keep their step between runs
        return modular(guiders()[name]())

    stock, outs = run(fresh()), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for policy in (hurry(8, 0), hurry(8, 4)):
            pipe = fresh()
            with attnreuse.enable(pipe, policy, map_format="fp32") as session:
                outs.append(run(pipe))
                report = session.report()
                assert maps_alive() == 0
    torch.testing.assert_close(outs[0], stock, rtol=0, atol=1e-4)
    assert 0 < (outs[1] - stock).norm() / stock.norm() < 0.3
    assert min(layer.reused for layer in report.layers) >= 4
