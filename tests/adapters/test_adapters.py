"""Who is served, who is refused and with which words, and an adapter from outside of the package."""

import copy
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from tiny_random import random_pipeline
from torch.nn import functional
from zoo import FRAMES, TOKENS, ZOO, S, conditions

import attnreuse
from attnreuse import Policy, adapters, hurry
from attnreuse.adapters import adapter_of, unserved
from attnreuse.binding.shapes import map_shapes


@pytest.mark.parametrize("name", ZOO)
def test_plans_see_the_shapes_of_runs(name):
    animal = ZOO[name]()
    adapter, model = adapter_of(animal.model), animal.model
    real = {adapter.sample: torch.empty(animal.sample), "timestep": torch.zeros(2), **conditions(animal)}
    planned = adapter.inputs(model, 2, (S, S), TOKENS, FRAMES)
    assert map_shapes(model, planned) == map_shapes(model, real)


def test_the_nearest_model_is_named_and_how_to_serve_another():
    with torch.device("meta"):
        beside = diffusers.FluxControlNetModel(num_layers=1, num_single_layers=1)
    with pytest.raises(attnreuse.UnsupportedLayerError, match="nearest model that is served is FluxTransformer2DModel"):
        attnreuse.enable(beside)
    with pytest.raises(attnreuse.UnsupportedLayerError, match=r"docs/adapters\.md"):
        attnreuse.enable(beside)


def test_models_that_cannot_gain_are_refused_with_both_figures():
    with torch.device("meta"):
        qwen = diffusers.QwenImageTransformer2DModel()
        wan = diffusers.WanTransformer3DModel()
    # 60 layers, 24 heads, 4096 tokens: a byte for each pair, a float for 128 of a row, and one for each row.
    nbytes = 60 * 24 * 4096 * (4096 + 4 * 32 + 4)
    with pytest.raises(attnreuse.UnsupportedLayerError, match=f"at 1024x1024 .* take {nbytes / 2**30:.1f} GiB in u8"):
        attnreuse.enable(qwen)
    with pytest.raises(
        attnreuse.UnsupportedLayerError, match=r"at 480x832 and 81 frames .* attention makes about \d+%"
    ):
        adapter_of(wan)
    with pytest.raises(attnreuse.UnsupportedLayerError, match="at 256x256 and 17 frames"):
        adapter_of(wan, (256, 256), 17)


NARROW = dict(num_layers=1, num_attention_heads=2, attention_head_dim=8)  # layers 16 wide, as texts are
SIZES = dict.fromkeys(("original_size", "target_size", "crop_coords"), torch.ones(1, 2))
AUDIO = dict(audio_num_attention_heads=2, audio_attention_head_dim=8, audio_cross_attention_dim=16, audio_in_channels=4)


@dataclass
class Seen:
    """A small model that is not served, in the pipeline of its family, and what that gives it.

    Attributes:
        size, frames: what is made: neither square nor the default.
        given: further arguments, by the latents.
        beside: tokens in one sequence with those of the picture.
        channels: of the latents before they are packed.
    """

    pipeline: str
    config: dict[str, Any]
    size: tuple[int, int]
    frames: int = 1
    given: Callable[[torch.Tensor], dict[str, Any]] = lambda latents: {}
    beside: int = TOKENS
    channels: int = 4


NOT_SERVED = {
    "AuraFlowTransformer2DModel": Seen(
        "AuraFlowPipeline",
        dict(
            num_mmdit_layers=1,
            num_single_dit_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
        ),
        (96, 64),
        beside=TOKENS + 8,  # registers
    ),
    "CogView4Transformer2DModel": Seen(
        "CogView4Pipeline",
        dict(**NARROW, in_channels=4, text_embed_dim=16, time_embed_dim=8, condition_dim=4),
        (96, 64),
        given=lambda latents: SIZES,
    ),
    "HunyuanImageTransformer2DModel": Seen(
        "HunyuanImagePipeline",
        dict(**NARROW, in_channels=4, num_single_layers=1, text_embed_dim=16, rope_axes_dim=(4, 4)),
        (192, 128),
        given=lambda latents: dict(encoder_attention_mask=torch.ones(1, TOKENS)),
    ),
    "Krea2Transformer2DModel": Seen(
        "Krea2Pipeline",
        dict(
            **NARROW,
            in_channels=16,
            num_key_value_heads=1,
            intermediate_size=16,
            text_hidden_dim=16,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=16,
            axes_dims_rope=(4, 2, 2),
        ),
        (96, 64),
        given=lambda latents: dict(
            encoder_hidden_states=torch.ones(1, TOKENS, 2, 16),
            position_ids=torch.zeros(TOKENS + latents.shape[1], 3),
        ),
    ),
    "Lumina2Transformer2DModel": Seen(
        "Lumina2Pipeline",
        dict(
            in_channels=4,
            hidden_size=24,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(4, 4, 4),
            axes_lens=(16, 16, 16),
            cap_feat_dim=16,
        ),
        (96, 64),
        given=lambda latents: dict(encoder_attention_mask=torch.ones(1, TOKENS, dtype=torch.long)),
    ),
    "EasyAnimateTransformer3DModel": Seen(
        "EasyAnimatePipeline",
        dict(
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            patch_size=2,
            time_embed_dim=8,
            text_embed_dim=16,
        ),
        (96, 64),
        9,
    ),
    "LTX2VideoTransformer3DModel": Seen(
        "LTX2Pipeline",
        dict(**NARROW, **AUDIO, in_channels=4, cross_attention_dim=16, caption_channels=16),
        (192, 128),
        17,
        given=lambda latents: dict(
            audio_hidden_states=torch.ones(1, 5, 4),
            audio_encoder_hidden_states=torch.ones(1, TOKENS, 16),
            num_frames=3,
            height=6,
            width=4,
            audio_num_frames=5,
        ),
        beside=0,
    ),
    "MochiTransformer3DModel": Seen(
        "MochiPipeline",
        dict(**NARROW, in_channels=4, pooled_projection_dim=16, text_embed_dim=16, time_embed_dim=8),
        (96, 64),
        13,
        given=lambda latents: dict(encoder_attention_mask=torch.ones(1, TOKENS)),
    ),
    "MotifVideoTransformer3DModel": Seen(
        "MotifVideoPipeline",
        dict(**NARROW, in_channels=4, num_single_layers=1, text_embed_dim=16, rope_axes_dim=(4, 2, 2)),
        (96, 64),
        9,
    ),
    "SkyReelsV2Transformer3DModel": Seen(
        "SkyReelsV2Pipeline",
        dict(
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            text_dim=16,
            freq_dim=8,
            ffn_dim=16,
        ),
        (96, 64),
        9,
        beside=0,
    ),
}


@pytest.mark.parametrize("name", NOT_SERVED)
def test_the_tokens_and_the_layers_told_of_are_those_of_runs(name, monkeypatch):
    seen, lengths, exact = NOT_SERVED[name], [], functional.scaled_dot_product_attention

    def attend(query, key, value, *args, **kwargs):
        lengths.append((query.shape[2], key.shape[2]))
        return exact(query, key, value, *args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attend)
    model, kind = getattr(diffusers, name)(**seen.config).eval(), getattr(diffusers, seen.pipeline)
    parts = inspect.signature(kind).parameters.values()
    pipe = kind(**{**{p.name: None for p in parts if p.default is p.empty}, "transformer": model})
    made = dict(height=seen.size[0], width=seen.size[1], num_frames=seen.frames)
    made = {k: v for k, v in made.items() if k in inspect.signature(pipe.prepare_latents).parameters}
    latents = pipe.prepare_latents(
        batch_size=1,
        num_channels_latents=seen.channels,
        **made,
        dtype=torch.float32,
        device=torch.device("cpu"),
        generator=None,
    )
    given = dict(timestep=torch.ones(1), encoder_hidden_states=torch.ones(1, TOKENS, 16))
    with torch.no_grad():
        model(latents, **{**given, **seen.given(latents)})
    n = unserved.GRIDS[name].tokens(seen.size, seen.frames)
    assert (n + seen.beside, n + seen.beside) in lengths
    whole = [pair for pair in lengths if pair[0] == pair[1] in {n, n + seen.beside}]
    assert len(whole) == len(unserved.self_attention(model))


def test_figures_are_told_of_models_of_diffusers():
    assert not [name for name in unserved.GRIDS if not hasattr(diffusers, name)]


@pytest.mark.parametrize(
    "pipeline",
    [
        "AnyFlowPipeline",
        "AuraFlowPipeline",
        "EasyAnimatePipeline",
        "ErnieImagePipeline",
        "HunyuanVideo15Pipeline",
        "HunyuanVideoPipeline",
        "Ideogram4Pipeline",
        "Krea2Pipeline",
        "LTX2Pipeline",
        "LTXPipeline",
        "MochiPipeline",
        "MotifVideoPipeline",
        "SkyReelsV2Pipeline",
        "WanPipeline",
        "WanVACEPipeline",
    ],
)
def test_sizes_told_of_are_the_defaults_of_the_pipelines(pipeline):
    kind = getattr(diffusers, pipeline)
    model = next(m for m in unserved.GRIDS if m in inspect.getsource(kind.__init__))
    grid = unserved.GRIDS[model]
    told = dict(height=grid.size[0], width=grid.size[1], num_frames=grid.frames)
    defaults = {k: p.default for k, p in inspect.signature(kind.__call__).parameters.items() if k in told and p.default}
    assert defaults
    assert defaults == {k: told[k] for k in defaults}


@pytest.mark.parametrize("name", ["Flux", "DreamLite"])
def test_foreign_attention_backends_and_context_parallelism_are_refused_by_name(name):
    model = ZOO[name]().model
    flash = copy.deepcopy(model)
    for attn in attnreuse.processors.attention_layers(flash).values():
        attn.processor._attention_backend = "flash"
    with pytest.raises(
        attnreuse.UnsupportedLayerError, match="its attention backend is 'flash'; only 'native' is served"
    ):
        attnreuse.enable(flash, Policy(steps=2, reuse=".R"))
    for attn in attnreuse.processors.attention_layers(model).values():
        attn.processor._parallel_config = SimpleNamespace()
    with pytest.raises(attnreuse.UnsupportedLayerError, match="context parallelism splits its tokens"):
        attnreuse.enable(model, Policy(steps=2, reuse=".R"))


def test_rotary_positions_are_left_out_on_reuse(monkeypatch):
    from diffusers.models import embeddings

    animal, calls, rotate = ZOO["Flux"](), [], embeddings.apply_rotary_emb
    monkeypatch.setattr(
        embeddings, "apply_rotary_emb", lambda *a, **k: calls.append(session.tick.step) or rotate(*a, **k)
    )
    given, scheduler = conditions(animal), SimpleNamespace(timesteps=torch.tensor([900.0, 500.0]))
    with attnreuse.enable(animal.model, Policy(steps=2, reuse=".R"), scheduler=scheduler) as session, torch.no_grad():
        for t in scheduler.timesteps:
            animal.model(torch.ones(animal.sample), timestep=t.expand(2) / 1000, **given)
    assert set(calls) == {0}


def test_half_precision_timesteps_that_the_pipeline_scales_are_told_apart():
    """Of a hundred steps, some are one and the same in bf16."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(100)
    scheduler.set_begin_index(0)
    model = ZOO["Flux"]().model.to(torch.bfloat16)
    animal = ZOO["Flux"]()
    given = {k: v.bfloat16() if v.is_floating_point() else v for k, v in conditions(animal).items()}
    sample, steps = torch.ones(animal.sample, dtype=torch.bfloat16), []
    scaled = scheduler.timesteps.bfloat16() / 1000
    assert len(scaled.unique()) < 100
    with attnreuse.enable(model, Policy(steps=100, reuse="." * 100), scheduler=scheduler) as session, torch.no_grad():
        model.register_forward_pre_hook(lambda *_: steps.append(session.tick.step))
        for t in scheduler.timesteps:
            out = model(sample, timestep=t.expand(2).bfloat16() / 1000, **given, return_dict=False)[0]
            sample = scheduler.step(out, t, sample, return_dict=False)[0]
    assert steps == list(range(100))


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "Flux"])
def test_a_subclass_may_hand_on_whatever_it_is_given(name):
    animal, scheduler = ZOO[name](), SimpleNamespace(timesteps=torch.tensor([900.0, 500.0]))
    adapter, base = adapter_of(animal.model), type(animal.model)

    class HandsOn(base):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    animal.model.__class__ = HandsOn
    sample, given = torch.randn(animal.sample), conditions(animal)
    with attnreuse.enable(animal.model, Policy(steps=2, reuse=".R"), strict=True, scheduler=scheduler) as session:
        for t in scheduler.timesteps:
            step = adapter.as_given(t.expand(2), torch.float32)
            with torch.no_grad():
                if name == "Flux":
                    animal.model(sample, timestep=step, **given)
                else:
                    animal.model(sample, step, **given)
    assert {layer.reused + layer.held for layer in session.report().layers} == {1}


def test_what_a_family_leaves_alone_is_told_of_where_it_is_asked_for_by_name():
    animal = ZOO["AnimateDiff"]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for layers in (None, "self", "all"):
            attnreuse.enable(animal.model, hurry(reuse=0.5), layers=layers, strict=True).disable()
    with pytest.warns(UserWarning, match=r"leaves \d+ of the chosen layers alone, .*: motion modules attend"):
        attnreuse.enable(animal.model, hurry(reuse=0.5), layers=["down_blocks.0.*", "up_blocks.1.*"]).disable()


def test_what_is_not_served_is_named():
    with pytest.raises(attnreuse.UnsupportedLayerError, match="AutoencoderKL is not served"):
        attnreuse.enable(random_pipeline().vae)
    model = ZOO["Flux"]().model
    model.set_attn_processor(TheirProcessor())
    said = r"its processor is TheirProcessor; FluxAttnProcessor .* others by an adapter \(docs/adapters\.md\)"
    with pytest.raises(attnreuse.UnsupportedLayerError, match=said):
        attnreuse.enable(model)


@pytest.mark.parametrize(
    ("name", "size", "latents"),
    [
        ("Flux", (1020, 1024), (126, 128)),
        ("PixArt", (1000, 1000), (128, 128)),
        ("SD3", (1024, 768), (128, 96)),
        ("Kandinsky 2.2", (520, 500), (72, 64)),
        ("Kandinsky 3", (520, 512), (72, 64)),
    ],
)
def test_latents_are_those_of_the_pipelines(name, size, latents):
    model = ZOO[name]().model
    model.register_to_config(sample_size=128)
    assert adapter_of(model).latents(model, size, 8) == latents


@pytest.mark.parametrize(
    ("name", "size", "multiple"),
    [("UNet2DConditionModel", (500, 512), 8), ("SD3", (1024, 1000), 16), ("PixArt", (1001, 1000), 8)],
)
def test_sizes_that_the_pipelines_refuse_are_refused(name, size, multiple):
    model = ZOO[name]().model
    with pytest.raises(ValueError, match=rf"must be multiples of {multiple} for this model, got {size[0]}x{size[1]}"):
        adapter_of(model).latents(model, size, 8)


FLUX_TOKENS = TOKENS + 16


def flux_mask(hidden):
    mask = torch.ones(2, 1, FLUX_TOKENS, FLUX_TOKENS, dtype=torch.bool)
    mask[..., hidden] = False
    return {"joint_attention_kwargs": {"attention_mask": mask}}


CHANGES = {
    "mask": (flux_mask(slice(TOKENS, TOKENS + 8)), flux_mask(slice(TOKENS + 8, FLUX_TOKENS))),
    "positions": ({"img_ids": torch.zeros(16, 3)}, {"img_ids": torch.arange(48.0).view(16, 3)}),
    "pooled text": ({"pooled_projections": torch.zeros(2, 20)}, {"pooled_projections": torch.ones(2, 20)}),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore:attnreuse")
def test_a_step_whose_arguments_changed_computes(name):
    animal = ZOO["Flux"]()
    scheduler, sample = SimpleNamespace(timesteps=torch.tensor([900.0, 500.0])), torch.randn(animal.sample)

    def step(i):
        given = {**conditions(animal), **CHANGES[name][i]}
        return animal.model(sample, timestep=scheduler.timesteps[i].expand(2) / 1000, **given, return_dict=False)[0]

    policy = Policy(steps=2, reuse=".R")
    with torch.no_grad():
        expected = step(1)
        with attnreuse.enable(animal.model, policy, map_format="fp32", scheduler=scheduler) as session:
            step(0)
            assert torch.equal(step(1), expected)
    for layer in session.report().layers:
        assert layer.reused == 0
        assert list(layer.reasons) == ["the prompt has changed"]


def test_flux_takes_a_mask_of_keys():
    animal = ZOO["Flux"]()
    mask = torch.ones(2, FLUX_TOKENS, dtype=torch.bool)
    mask[1, 2:TOKENS] = False
    given = {**conditions(animal), "joint_attention_kwargs": {"attention_mask": mask}}
    scheduler, sample = SimpleNamespace(timesteps=torch.tensor([900.0, 500.0])), torch.randn(animal.sample)
    with torch.no_grad():
        expected = animal.model(sample, timestep=torch.full((2,), 0.9), **given, return_dict=False)[0]
        with attnreuse.enable(animal.model, Policy(steps=2, reuse=".R"), map_format="fp32", scheduler=scheduler):
            out = animal.model(sample, timestep=scheduler.timesteps[0].expand(2) / 1000, **given, return_dict=False)[0]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)


# -- an adapter from outside


class TheirProcessor:
    def __call__(self, attn, x, *_, **__):
        q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        return (q @ k.mT / 4).softmax(-1) @ v


class TheirAttention(torch.nn.Module):
    """One head of 16 channels, whose output no layer projects."""

    heads = 1

    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (torch.nn.Linear(16, 16) for _ in range(3))
        self.processor = TheirProcessor()

    def set_processor(self, processor):
        self.processor = processor

    def forward(self, x):
        return self.processor(self, x)


class TheirModel(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, layers=2):
        super().__init__()
        self.blocks = torch.nn.ModuleList(TheirAttention() for _ in range(layers))

    def forward(self, noisy, timestep):
        for block in self.blocks:
            noisy = noisy + block(noisy)
        return noisy


class TheirForm:
    dispatched = False

    def kind(self, attn):
        return "self"

    def head_dim(self, attn):
        return 16

    channels = head_dim

    def map_shape(self, attn, given, context):
        return len(given), 1, given.shape[1], given.shape[1]

    def inputs(self, attn, given, context, mask, extra):
        return adapters.Inputs(given, given, context, mask, extra)

    def value(self, attn, inputs):
        return attn.to_v(inputs.tokens)[:, None]

    def query(self, attn, inputs):
        return adapters.Query(attn.to_q(inputs.tokens)[:, None], attn.to_k(inputs.tokens)[:, None])

    def finish(self, attn, inputs, output):
        return output[:, 0]

    def flat(self, given):
        return given

    def unflat(self, flat, given, context):
        return flat

    def makers(self, attn):
        return {"to_v": attn.to_v}


class TheirAdapter(adapters.Adapter):
    models = ("TheirModel",)
    sample = "noisy"

    def forms(self):
        return {TheirProcessor: TheirForm()}

    def stock(self, attn):
        return TheirProcessor

    def inputs(self, denoiser, batch, size, tokens, frames):
        return {"noisy": torch.empty(batch, size[0], 16, device="meta"), "timestep": 1}


def test_a_model_must_name_its_timestep():
    class Unnamed(ModelMixin, ConfigMixin):
        def __init__(self):
            super().__init__()
            self.block = TheirAttention()

        def forward(self, noisy, t):
            return self.block(noisy)

    class Its(TheirAdapter):
        models = ("Unnamed",)

    adapters.register(Its())
    with pytest.raises(
        attnreuse.UnsupportedLayerError, match="Unnamed: expected a forward with arguments noisy and time"
    ):
        attnreuse.enable(Unnamed(), Policy(steps=2, reuse=".R"))


@pytest.mark.parametrize(
    ("call", "taken"),
    [
        (lambda self, attn, hidden_states: hidden_states, "attn, hidden_states"),
        (
            lambda self, attn, hidden_states, encoder_hidden_states, text_mask, attention_mask: hidden_states,
            "attn, hidden_states, encoder_hidden_states, text_mask, attention_mask",
        ),
    ],
)
def test_a_processor_must_be_called_as_those_of_diffusers_are(call, taken):
    processor = type("Odd", (), {"__call__": call})

    class Other(TheirModel):
        pass

    class Its(TheirAdapter):
        models = ("Other",)

        def forms(self):
            return {processor: TheirForm()}

        def stock(self, attn):
            return processor

    adapters.register(Its())
    model = Other()
    for block in model.blocks:
        block.processor = processor()
    said = rf"Odd takes \({taken}\); expected a processor that takes \(attn, hidden_states, encoder_hidden_states, att"
    with pytest.raises(attnreuse.UnsupportedLayerError, match=said):
        attnreuse.enable(model, Policy(steps=2, reuse=".R"))


def test_an_adapter_from_outside_is_served():
    torch.manual_seed(0)
    model = TheirModel().eval()
    with pytest.raises(attnreuse.UnsupportedLayerError, match="TheirModel is not served"):
        attnreuse.enable(model)
    adapters.register(TheirAdapter())
    x, timesteps = torch.randn(2, 40, 16), torch.tensor([900.0, 500.0, 100.0])
    with torch.no_grad():
        expected = model(x, timesteps[0])
        with attnreuse.enable(model, Policy(steps=3, reuse=".RH"), map_format="fp32") as session:
            for t in timesteps:
                torch.testing.assert_close(model(x, t), expected, rtol=0, atol=1e-5)
    assert [(layer.captured, layer.reused, layer.held) for layer in session.report().layers] == [(1, 1, 1)] * 2
