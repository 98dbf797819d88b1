"""Who is served, who is refused and with which words, and an adapter from outside of the package."""

import copy
import warnings
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from tiny_random import random_pipeline
from zoo import FRAMES, TOKENS, ZOO, S, conditions

import attnreuse
from attnreuse import Policy, adapters, hurry
from attnreuse.adapters import adapter_of
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
        chroma = diffusers.ChromaTransformer2DModel(num_layers=1, num_single_layers=1)
    with pytest.raises(attnreuse.UnsupportedLayerError, match="nearest model that is served is FluxTransformer2DModel"):
        attnreuse.enable(chroma)
    with pytest.raises(attnreuse.UnsupportedLayerError, match=r"docs/adapters\.md"):
        attnreuse.enable(chroma)


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
