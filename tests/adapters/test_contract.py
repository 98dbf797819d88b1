"""What every adapter keeps, whatever its family: one test for each line of the contract."""

import warnings
from types import SimpleNamespace

import accelerate
import pytest
import torch
from zoo import FRAMES, ZOO, B, conditions, fake_xformers

import attnreuse
from attnreuse import Policy
from attnreuse.adapters import adapter_of
from attnreuse.binding.denoiser import form_of, layer_kinds
from attnreuse.binding.processors import attention_layers

STEPS = 6
POLICY = Policy(steps=STEPS, reuse=".RR.RR")
NEVER = Policy(steps=STEPS, reuse="......")
CLOSE = dict(rtol=0, atol=1e-4)
SCHEDULER = SimpleNamespace(timesteps=None)


@pytest.fixture(params=ZOO)
def animal(request, monkeypatch):
    fake_xformers(monkeypatch)
    return ZOO[request.param]()


def walk(animal, seed=0, steps=STEPS):
    """Outputs of the denoiser at each of `steps`, for samples that change a little from step to step."""
    g = torch.Generator().manual_seed(seed)
    sample, given = torch.randn(animal.sample, generator=g), conditions(animal, seed)
    outputs = []
    for t in timesteps(steps):
        outputs.append(call(animal, sample, t, given))
        sample = sample + 0.1 * torch.randn(animal.sample, generator=g)
    return outputs


def timesteps(steps):
    """Those of a new run."""
    SCHEDULER.timesteps = torch.linspace(900, 100, steps)
    return SCHEDULER.timesteps


def call(animal, sample, timestep, given):
    adapter = adapter_of(animal.model)
    timestep = adapter.as_given(timestep.expand(len(sample)), torch.float32)
    with torch.no_grad():
        return animal.model(**{adapter.sample: sample, "timestep": timestep}, **given, return_dict=False)[0]


def enabled(animal, policy, **options):
    return attnreuse.enable(animal.model, policy, scheduler=SCHEDULER, **options)


def served(animal):
    return {
        name: attn
        for name, attn in attention_layers(animal.model).items()
        if not set(animal.left_alone) & set(name.split("."))
    }


def test_never_reusing_equals_stock(animal):
    expected = walk(animal)
    with enabled(animal, NEVER, layers="all"):
        for now, then in zip(walk(animal), expected, strict=True):
            torch.testing.assert_close(now, then, **CLOSE)


@pytest.mark.parametrize("letter", "RH")
def test_what_is_kept_equals_exact_attention_in_its_own_step(animal, letter):
    given, sample, t = conditions(animal), torch.randn(animal.sample), torch.tensor(500)
    expected = call(animal, sample, t, given)
    policy = Policy(steps=2, reuse=f".{letter}")
    with enabled(animal, policy, map_format="fp32", layers="all", strict=False) as session:
        for step in range(2):
            session.step(step, 2)
            torch.testing.assert_close(call(animal, sample, t, given), expected, **CLOSE)
    kinds, layers = layer_kinds(animal.model), served(animal)
    for layer in session.report().layers:
        form = form_of(adapter_of(animal.model), layers[layer.name])
        # A context may be made anew at each call, and a layer may add what it was given.
        may_not = kinds[layer.name] == "cross" or form.makers(layers[layer.name]) is None
        assert layer.reused + layer.held == 1 or (letter == "H" and may_not and layer.reasons)


def test_reuse_projects_no_query_and_no_key(animal):
    calls = []
    for attn in served(animal).values():
        for name in ("to_q", "to_k", "norm_q", "norm_k", "add_q_proj", "add_k_proj", "norm_added_q", "norm_added_k"):
            module = getattr(attn, name, None)
            if module is not None:
                module.register_forward_pre_hook(lambda *_: calls.append(session.tick.step))
    with enabled(animal, POLICY, layers="all") as session:
        walk(animal)
    assert set(calls) <= {0, 3}
    assert {layer.reused + layer.held for layer in session.report().layers} == {4}


def test_a_fused_projection_gives_values_alone(monkeypatch):
    animal, sizes = ZOO["fused"](), []
    linear = torch.nn.functional.linear
    monkeypatch.setattr("attnreuse.adapters.forms.linear", lambda x, w, b: sizes.append(w.shape[0]) or linear(x, w, b))
    with enabled(animal, POLICY):
        walk(animal)
    attn = next(iter(served(animal).values()))
    assert attn.to_q.out_features in sizes
    assert max(sizes) < attn.to_qkv.out_features


def test_disable_puts_everything_back(animal):
    expected = walk(animal)
    processors = [id(attn.processor) for attn in attention_layers(animal.model).values()]
    with enabled(animal, POLICY, layers="all"):
        reused = walk(animal)
    assert any(not torch.equal(now, then) for now, then in zip(reused, expected, strict=True))
    assert all(torch.equal(now, then) for now, then in zip(walk(animal), expected, strict=True))
    assert [id(attn.processor) for attn in attention_layers(animal.model).values()] == processors


def test_a_run_sees_no_map_of_another(animal):
    with enabled(animal, POLICY, layers="all"):
        alone = walk(animal, seed=1)
    with enabled(animal, POLICY, layers="all"):
        walk(animal, seed=0)
        assert all(torch.equal(now, then) for now, then in zip(walk(animal, seed=1), alone, strict=True))


def test_reports_name_every_layer_and_every_byte(animal):
    with enabled(animal, POLICY, layers="all") as session:
        walk(animal)
    report, names = session.report(), set(attention_layers(animal.model))
    assert {layer.name for layer in report.layers} == set(served(animal))
    assert set(report.skipped) == names - set(served(animal))
    assert report.predicted_bytes == report.allocated_bytes > 0


def test_rows_of_the_batch_keep_their_maps(animal):
    """Guidance may be given up in mid-run: half of the rows go on, with their maps if conditions tell which."""
    g = torch.Generator().manual_seed(0)
    sample, given = torch.randn(animal.sample, generator=g), conditions(animal)
    half, few = sample[1:], {name: _second(value) for name, value in given.items()}
    policy = Policy(steps=3, reuse=".RR")
    with enabled(animal, policy, map_format="fp32", layers="all"):
        for t in timesteps(3):
            whole = call(animal, sample, t, given)
    with warnings.catch_warnings(), enabled(animal, policy, map_format="fp32", layers="all") as session:
        warnings.simplefilter("ignore" if not animal.rows_told else "error")
        for i, t in enumerate(timesteps(3)):
            last = call(animal, sample, t, given) if i == 0 else call(animal, half, t, few)
    if animal.rows_told:
        torch.testing.assert_close(last, whole[1:], **CLOSE)
    # Else the half captures anew at step 1, and reuses that.
    assert {layer.reused + layer.held for layer in session.report().layers} == {2 if animal.rows_told else 1}


def _second(value):
    """The second half of the rows of an argument, if it has some for each picture or frame."""
    if isinstance(value, dict):
        return {name: _second(part) for name, part in value.items()}
    has_rows = isinstance(value, torch.Tensor) and len(value) in (B, B * FRAMES)
    return value[len(value) // 2 :] if has_rows else value


def test_a_compiled_layer_has_a_graph_per_action(animal):
    graphs = []

    def backend(module, example_inputs):
        graphs.append(module)
        return module.forward

    kinds, layers = layer_kinds(animal.model), served(animal)
    name = min(layers, key=lambda name: kinds[name] == "cross")  # cross-attention may hold instead
    attn = layers[name]
    torch._dynamo.reset()
    attn.compile(backend=backend, fullgraph=True)
    policy = Policy(steps=STEPS, reuse="..R.RR")  # compute, capture and reuse
    with enabled(animal, policy, layers="all") as session:
        compiled = walk(animal)
    layer = next(layer for layer in session.report().layers if layer.name == name)
    assert (layer.computed, layer.captured, layer.reused) == (1, 2, 3)
    assert len(graphs) == 3
    attn._compiled_call_impl = None
    with enabled(animal, policy, layers="all"):
        for now, then in zip(walk(animal), compiled, strict=True):
            torch.testing.assert_close(now, then, **CLOSE)


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "fused", "added keys", "SD3, fused", "Flux, fused"])
def test_offloaded_weights_are_there_when_values_are_made(name):
    animal = ZOO[name]()
    with enabled(animal, POLICY):
        expected = walk(animal)
    accelerate.cpu_offload(animal.model, execution_device=torch.device("cpu"))
    with enabled(animal, POLICY) as session:
        assert all(torch.equal(now, then) for now, then in zip(walk(animal), expected, strict=True))
    assert {layer.reused for layer in session.report().layers} == {4}


@pytest.mark.parametrize("name", ["fused", "SD3, fused", "Flux, fused"])
def test_what_a_tool_makes_of_a_fused_projection_counts(name):
    animal = ZOO[name]()
    for attn in served(animal).values():
        if hasattr(attn, "to_qkv"):
            attn.to_qkv.forward = lambda x, own=attn.to_qkv.forward: own(x) / 2
    given, sample, t = conditions(animal), torch.randn(animal.sample), torch.tensor(500)
    expected = call(animal, sample, t, given)
    with enabled(animal, Policy(steps=2, reuse=".R"), map_format="fp32") as session:
        for step in range(2):
            session.step(step, 2)
            torch.testing.assert_close(call(animal, sample, t, given), expected, **CLOSE)


@pytest.mark.parametrize("name", ["Flux", "SD3.5", "PixArt", "added keys"])
def test_a_compiled_denoiser_has_a_graph_per_pattern(name):
    animal, graphs = ZOO[name](), []

    def backend(module, example_inputs):
        graphs.append(module)
        return module.forward

    with enabled(animal, POLICY):
        expected = walk(animal)
    torch._dynamo.reset()
    animal.model.compile(backend=backend, fullgraph=True)
    with enabled(animal, POLICY):
        assert all(torch.equal(now, then) for now, then in zip(walk(animal), expected, strict=True))
    assert len(graphs) == 2
