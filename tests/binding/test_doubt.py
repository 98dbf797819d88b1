"""Calls and layers that look like earlier ones and are not: they compute, and what is said of them is so."""

import gc
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor2_0
from tiny_random import TOKENS, WIDTH, random_pipeline, random_unet, sample
from zoo import ZOO, B, conditions

import attnreuse
from attnreuse import Policy
from attnreuse.adapters import adapter_of, register, unets
from attnreuse.adapters.forms import Plain
from attnreuse.binding import run as runs
from attnreuse.binding.conditions import Conditions
from attnreuse.binding.processors import attention_layers, takes_extra

pytestmark = pytest.mark.filterwarnings("ignore:attnreuse")


def noise(seed, *shape):
    return torch.randn(shape or (1, 4, 8, 8), generator=torch.Generator().manual_seed(seed))


CONTEXT = noise(99, 1, TOKENS, WIDTH)


@pytest.fixture
def unet():
    return random_unet()


def timesteps(steps):
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps)
    return scheduler.timesteps


class Awkward(float):
    """A number that compares as an array does."""

    def __eq__(self, other):
        return np.array([True, False])

    __hash__ = None


def first(session):
    return session.report().layers[0]


# -- calls that attend over the same and differ in something else


def test_a_setting_that_changes_in_mid_run_computes(unet):
    ts = timesteps(4)
    policy = Policy(steps=4, reuse=".RRR")
    with torch.no_grad(), attnreuse.enable(unet, policy) as session:
        for i, scale in enumerate((1.0, 1.0, 0.5, 0.5)):
            unet(noise(0), ts[i], encoder_hidden_states=CONTEXT, cross_attention_kwargs={"scale": scale})
    assert (first(session).captured, first(session).reused) == (2, 2)
    assert first(session).reasons == {"cross_attention_kwargs.scale is 0.5, it was 1.0": 1}


@pytest.mark.parametrize("before", [("off",), ("off", "on"), ("on", "off")])
def test_calls_with_an_adapter_and_without_have_maps_of_their_own(unet, before):
    """An adapter that is on or off changes queries and keys, and nothing that the denoiser is given."""
    from peft import LoraConfig

    ts = timesteps(6)
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=64, target_modules=["to_q", "to_k"], init_lora_weights=False))

    def last(policy, before):
        with torch.no_grad(), attnreuse.enable(unet, Policy(steps=6, reuse=policy), map_format="fp32") as session:
            for i in range(4):
                for which in before if i < 3 else ("off",):
                    (unet.enable_adapters if which == "on" else unet.disable_adapters)()
                    x = noise(0) + 0.05 * i * noise(1)
                    out = unet(x, ts[i], encoder_hidden_states=CONTEXT).sample
        return out, first(session).reused

    out, reused = last("...R..", before)
    expected, _ = last("...R.." if reused else "......", ("off",))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    assert reused == 1


def test_another_picture_with_the_same_background_goes_on_with_no_map(unet):
    ts, background = timesteps(8), 2 * noise(0)
    policy = Policy(steps=8, reuse="....R...")
    with torch.no_grad(), attnreuse.enable(unet, policy, map_format="fp32") as session:
        for i in range(4):
            unet(background + noise(1) + 0.05 * i * noise(2), ts[i], encoder_hidden_states=CONTEXT)
        unet(background + noise(3), ts[4], encoder_hidden_states=CONTEXT)
    assert first(session).reused == 0
    assert first(session).reasons == {"its sample continues that of no earlier call": 1}


def test_an_adapter_that_is_switched_within_a_call_changes_the_next(unet):
    from peft import LoraConfig

    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=64, target_modules=["to_q", "to_k"], init_lora_weights=False))
    hook = unet.conv_out.register_forward_hook(lambda *args: unet.disable_adapters())

    def walk():
        unet.enable_adapters()
        return [unet(noise(0), t, encoder_hidden_states=CONTEXT).sample for t in timesteps(4)]

    with torch.no_grad():
        expected = walk()
        with attnreuse.enable(unet, Policy(steps=4, reuse=".R.."), map_format="fp32", layers="self") as session:
            actual = walk()
    hook.remove()
    assert first(session).reused == 0
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=1e-4)


CHANGED = "what makes queries and keys is another than before"


def lora(**options):
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=64, target_modules=["to_q", "to_k"], init_lora_weights=False, **options)


def written(part):
    """Write to the weights of queries whose names hold `part`."""

    @torch.no_grad()
    def act(unet):
        for name, weight in unet.named_parameters():
            if part in name and "to_q" in name:
                weight.mul_(-1)

    return act


ACTS = {  # adapters, and what happens in mid-run
    "weights of queries": ([], written("to_q")),
    "LoRA's A": (["lora"], written("lora_A")),
    "LoRA's B": (["lora"], written("lora_B")),
    "weights under a LoRA": (["lora"], written("base_layer")),
    "a weight of one of two": (["lora", "lora"], lambda unet: unet.set_adapters(["0", "1"], [1.0, 0.5])),
    "one of two is fused": (["lora", "lora"], lambda unet: unet.fuse_lora(adapter_names=["0"])),
    "a LoRA within a LoHa": (["lora", "loha"], lambda unet: unet.set_adapters(["0", "1"], [-2.0, 1.0])),
    "weights of a LoRA within a LoHa": (["lora", "loha"], written("lora_B")),
}


@pytest.mark.parametrize("act", ACTS)
def test_what_changes_queries_and_keys_in_mid_run_computes(unet, act):
    from peft import LoHaConfig

    adapters, change = ACTS[act]
    torch.manual_seed(0)
    for name, kind in enumerate(adapters):
        loha = LoHaConfig(r=4, target_modules=["to_q", "to_k"], init_weights=False)
        unet.add_adapter(lora() if kind == "lora" else loha, adapter_name=str(name))
    if len(adapters) > 1:
        unet.set_adapters([str(name) for name in range(len(adapters))])
    with torch.no_grad(), attnreuse.enable(unet, Policy(steps=4, reuse=".RRR")) as session:
        for i, t in enumerate(timesteps(4)):
            if i == 2:
                change(unet)
            unet(noise(0), t, encoder_hidden_states=CONTEXT)
    assert (first(session).captured, first(session).reused) == (2, 2)
    assert first(session).reasons == {CHANGED: 1}


@pytest.mark.parametrize(
    ("loaded", "mode"),
    [
        (torch.no_grad, torch.no_grad),
        (torch.no_grad, torch.inference_mode),
        (torch.inference_mode, torch.inference_mode),
    ],
)
def test_weights_that_are_cast_for_each_call_are_the_same(loaded, mode):
    with loaded():
        unet = random_unet()
        unet.add_adapter(lora())
    unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    with mode(), attnreuse.enable(unet, Policy(steps=4, reuse=".RRR"), strict=True) as session:
        for t in timesteps(4):
            unet(noise(0), t, encoder_hidden_states=CONTEXT)
    assert {layer.reused for layer in session.report().layers} == {3}


@pytest.mark.parametrize("name", ["SD3", "Flux"])
def test_the_strength_of_adapters_may_be_a_tensor(name):
    animal, scale = ZOO[name](), {"scale": torch.tensor(0.7)}
    given = conditions(animal)
    with torch.no_grad(), attnreuse.enable(animal.model, Policy(steps=3, reuse=".RR"), strict=True) as session:
        for i, t in enumerate(timesteps(3)):
            session.step(i, 3)
            animal.model(noise(0, *animal.sample), timestep=t.expand(B) / 1000, joint_attention_kwargs=scale, **given)
    assert {layer.reused for layer in session.report().layers} == {2}


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        (1, 1.0, True),
        (float("nan"), float("nan"), True),
        (np.float32(0.5), np.float32(0.5), True),
        (np.float32(0.5), np.float32(0.25), False),
        (np.array([1.0, 0.5]), np.array([1.0, 0.5]), True),
        (np.array([1.0, 0.5]), np.array([1.0, 0.25]), False),
        (torch.device("cpu"), torch.device("cpu", 0), False),
        (torch.device("cpu"), torch.device("cpu"), True),
        ({"a", "b"}, {"b", "a"}, True),
        ("a", "b", False),
        (object(), object(), False),
        (np.array([0.5, None]), np.array([0.25, None]), False),
        (Awkward(1.0), Awkward(1.0), False),
    ],
)
def test_settings_are_the_same_by_value(before, now, same):
    def of(value):
        return Conditions({"cross_attention_kwargs": {"x": value}}, batch=1)

    assert (of(now).rows_of(of(before)) == [0]) == same


def test_an_array_that_is_written_to_is_another_setting():
    array = np.ones(3)
    before = Conditions({"x": array}, batch=1)
    array[1] = 2
    assert Conditions({"x": array}, batch=1).difference(before) == "x is another than before"


def test_what_is_said_of_a_call_is_of_the_branch_with_its_conditions(unet):
    """Another prompt came last in the step before; this one's picture is what has changed."""
    ts, other = timesteps(3), noise(98, 1, TOKENS, WIDTH)
    with torch.no_grad(), attnreuse.enable(unet, Policy(steps=3, reuse="..R")) as session:
        for i, t in enumerate(ts):
            unet(noise(0) if i < 2 else noise(7), t, encoder_hidden_states=CONTEXT)
            unet(noise(1), t, encoder_hidden_states=other)
    assert first(session).reasons == {"its sample continues that of no earlier call": 1}


@pytest.mark.parametrize("numbers", [False, True])
def test_a_told_step_may_have_many_requests_of_their_own_timesteps(unet, numbers):
    requests, steps = 6, 4
    walks = [timesteps(steps + r)[r:] for r in range(requests)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with attnreuse.enable(unet, Policy(steps=steps, reuse=".R.R")) as session:
            for i in range(steps):
                session.step(i, steps)
                for r in range(requests):
                    t, context = walks[r][i], noise(90 + r, 1, TOKENS, WIDTH)
                    x = noise(r) + 0.02 * i * noise(50 + r)
                    unet(x, int(t) if numbers else t, encoder_hidden_states=context)
    assert (first(session).captured, first(session).reused) == (2 * requests, 2 * requests)


def told_and_given_up(unet, session):
    """A loop of 10 steps that ends at its fifth."""
    for i, t in enumerate(timesteps(10)[:5]):
        session.step(i, 10)
        unet(noise(0) + 0.05 * i * noise(1), t, encoder_hidden_states=CONTEXT)


@pytest.mark.parametrize("vary", ["prompt", "setting"])
def test_short_loops_go_on_after_one_that_was_told_and_given_up(unet, vary):
    """Nothing of them tells at once that the told step is over: neither many timesteps nor one prompt."""
    with torch.no_grad(), attnreuse.enable(unet, attnreuse.periodic(interval=2)) as session:
        told_and_given_up(unet, session)
        reused = []
        for loop in range(20):
            given = {"encoder_hidden_states": noise(loop, 1, TOKENS, WIDTH) if vary == "prompt" else CONTEXT}
            given |= {"cross_attention_kwargs": {"scale": loop}} if vary == "setting" else {}
            for i, t in enumerate(timesteps(4)):
                unet(noise(loop) + 0.05 * i * noise(1), t, **given)
            reused.append(first(session).reused)
            held = sum(branch.ring.nbytes for run in session._runs for branch in run.branches)
    assert set(reused[10:]) == {2}
    assert session.report().steps == 4
    assert held <= 2 * session.report().allocated_bytes


def test_nothing_of_a_told_loop_is_kept_after_disable(unet):
    context = noise(97, 1, TOKENS, WIDTH)
    alive = weakref.ref(context)
    with torch.no_grad(), attnreuse.enable(unet, Policy(steps=4, reuse=".R.R")) as session:
        session.step(0, 4)
        unet(noise(0), timesteps(4)[0], encoder_hidden_states=context)
    del context
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("thread", [False, True])
def test_a_told_loop_beside_a_pipelines_leaves_that_alone(thread):
    """In its callback, from the first step to the last; or in another thread, where its first step alone is told."""
    pipe = random_pipeline()

    def other():
        with torch.no_grad():
            for i, t in enumerate(timesteps(3)[: 1 if thread else 3]):
                session.step(i, 3)
                if not thread:
                    pipe.unet(noise(0), t, encoder_hidden_states=CONTEXT)

    def callback(pipe, step, t, kept):
        if step == 1:
            if thread:
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(other).result()
            else:
                other()
        return kept

    with attnreuse.enable(pipe, attnreuse.periodic(interval=2)) as session:
        sample(pipe, 8, callback_on_step_end=callback)
        assert session.report().steps == 8
        assert first(session).reused == 4


def test_a_sample_that_is_not_a_number_ends_as_without_reuse(unet):
    with torch.no_grad(), attnreuse.enable(unet, Policy(steps=4, reuse=".R.R")) as session:
        for i, t in enumerate(timesteps(4)):
            x = noise(0) + (float("nan") if i >= 2 else 0.05 * i)
            assert unet(x, t, encoder_hidden_states=CONTEXT).sample.isnan().any() == (i >= 2)
    assert first(session).reused == 1


def test_a_loop_that_was_given_up_does_not_hold_later_ones_at_its_step(unet):
    ts = timesteps(10)

    def loop(seed, told=()):
        for i, t in enumerate(ts):
            if i in told:
                session.step(i, 10)
            unet(noise(seed) + 0.05 * i * noise(1), int(t) if told else t, encoder_hidden_states=CONTEXT)
            if told and i == max(told):
                return

    with torch.no_grad(), attnreuse.enable(unet, Policy(steps=10, reuse=".R.R.R.R.R")) as session:
        loop(0, told=range(5))
        one = session.report().allocated_bytes
        loop(2)
        assert session.report().allocated_bytes <= one
        loop(3)
    assert session.report().steps == 10
    assert {layer.reused for layer in session.report().layers} == {5}


def test_a_bar_that_is_closed_late_ends_no_later_loop():
    pipe = random_pipeline()

    def run(late):
        left = iter(pipe.progress_bar(range(9)))
        next(left)

        def close(pipe, step, t, kept):
            if late and step == 4:
                left.close()
            return {}

        return sample(pipe, 8, callback_on_step_end=close), session.report()

    with attnreuse.enable(pipe) as session:
        (expected, told), (actual, report) = run(False), run(True)
        assert not [branch for run in session._runs for branch in run.branches]
    assert torch.equal(actual, expected)
    assert report == told


# -- layers that cannot do what they are to do


def test_a_gradient_that_enters_within_the_denoiser_is_kept(unet):
    unet.requires_grad_(False)
    delta = torch.zeros(1, 16, 1, 1, requires_grad=True)
    unet.conv_in.register_forward_hook(lambda module, args, output: output + delta)

    def gradient():
        delta.grad = None
        for t in timesteps(2):
            out = unet(noise(0), t, encoder_hidden_states=CONTEXT).sample
        out.square().sum().backward()
        return delta.grad.clone()

    expected = gradient()
    with attnreuse.enable(unet, Policy(steps=2, reuse=".R"), layers="all") as session:
        torch.testing.assert_close(gradient(), expected)
    assert all("a gradient is wanted" in " ".join(layer.reasons) for layer in session.report().layers)


def test_layers_on_another_device_than_their_map_compute(unet, monkeypatch):
    ring = runs.MapRing
    monkeypatch.setattr(runs, "MapRing", lambda plan, device: ring(plan, torch.device("meta")))
    with torch.no_grad():
        expected = [unet(noise(0), t, encoder_hidden_states=CONTEXT).sample for t in timesteps(2)]
        with attnreuse.enable(unet, Policy(steps=2, reuse=".R"), layers="all") as session:
            for t, then in zip(timesteps(2), expected, strict=True):
                assert torch.equal(unet(noise(0), t, encoder_hidden_states=CONTEXT).sample, then)
    assert all(any("on another device" in reason for reason in layer.reasons) for layer in session.report().layers)


def test_weights_that_are_moved_as_the_denoiser_is_called_have_not_changed():
    """As offloading does: within the call, after other tools' hooks have seen where they lay before."""
    pipe, moved = random_pipeline(), []
    forward = pipe.unet.forward

    def offloaded(*args, **kwargs):
        if not moved:
            moved.append(1)
            for weight in pipe.unet.parameters():
                weight.data = weight.data.clone()
        return forward(*args, **kwargs)

    pipe.unet.forward = offloaded
    with attnreuse.enable(pipe, Policy(steps=4, reuse=".R.."), layers="cross", strict=True) as session:
        sample(pipe, 4)
    assert first(session).held == 1


def test_an_output_made_with_weights_that_change_within_its_call_is_not_held():
    """As a tool does that merges an adapter of another strength into each call, and takes it out again."""
    pipe = random_pipeline()
    weights = [layer.to_v.weight for name, layer in attention_layers(pipe.unet).items() if name.endswith("attn2")]
    forward, strength = pipe.unet.forward, []

    def merged(*args, **kwargs):
        strength.append(1.0 - 0.1 * (len(strength) % 8))
        with torch.no_grad():
            before = [weight.clone() for weight in weights]
            for weight in weights:
                weight.add_(strength[-1] * 0.2)
            out = forward(*args, **kwargs)
            for weight, then in zip(weights, before, strict=True):
                weight.copy_(then)
        return out

    pipe.unet.forward = merged
    expected = sample(pipe, 8)
    with attnreuse.enable(pipe, Policy(steps=8, reuse=".R.R.R.R"), layers="cross") as session:
        actual = sample(pipe, 8)
    assert first(session).held == 0
    assert first(session).reasons == {"its weights have changed since its output was kept": 4}
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("targets", "captured"), [(["to_q", "to_k"], 2), (["to_v"], 1)])
def test_a_layer_with_an_adapter_reuses_maps_made_with_it_and_holds_nothing(unet, targets, captured):
    from peft import LoraConfig

    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    ts = timesteps(3)
    with torch.no_grad(), attnreuse.enable(unet, Policy(steps=3, reuse=".RR"), layers="cross") as session:
        for i, t in enumerate(ts):
            if i == 1:
                unet.disable_adapters()
            unet(noise(0), t, encoder_hidden_states=CONTEXT)
    assert (first(session).held, first(session).captured, first(session).reused) == (0, captured, 3 - captured)


# -- processors


def test_our_processor_that_another_tool_puts_back_is_stock_without_us(unet):
    class Other(AttnProcessor2_0):
        """Not served."""

    layers, saved, ts = attention_layers(unet), {}, timesteps(4)
    before = {name: type(layer.processor) for name, layer in layers.items()}

    def swap(module, args):
        for layer in layers.values():
            saved[layer] = layer.processor
            layer.set_processor(Other())

    def swap_back(module, args, output):
        for layer, processor in saved.items():
            layer.set_processor(processor)

    with torch.no_grad():
        stock = unet(noise(0), ts[0], encoder_hidden_states=CONTEXT).sample
        session = attnreuse.enable(unet, Policy(steps=4, reuse=".R.."))
        hooks = unet.register_forward_pre_hook(swap), unet.register_forward_hook(swap_back)
        unet(noise(0), ts[0], encoder_hidden_states=CONTEXT)
        for hook in hooks:
            hook.remove()
        unet(noise(0), ts[1], encoder_hidden_states=CONTEXT)
        assert first(session).captured <= 1
        attnreuse.disable(unet)
        assert torch.equal(unet(noise(0), ts[0], encoder_hidden_states=CONTEXT).sample, stock)
    assert {name: type(layer.processor) for name, layer in layers.items()} == before


def test_no_processor_of_ours_stays_on_layers_that_were_fused_before():
    pipe = random_pipeline()
    pipe.fuse_qkv_projections()
    layers, saved = attention_layers(pipe.unet), {}
    before = {name: type(layer.processor) for name, layer in layers.items()}

    def keep(*args):
        saved.update({layer: layer.processor for layer in layers.values()})

    hook = pipe.unet.conv_out.register_forward_hook(keep)
    session = attnreuse.enable(pipe, Policy(steps=4, reuse=".R.."))
    sample(pipe, 4)
    hook.remove()
    for layer, processor in saved.items():
        layer.set_processor(processor)  # ours: read within a call
    session.disable()
    assert {name: type(layer.processor) for name, layer in layers.items()} == before


def test_a_processor_with_arguments_of_its_own_is_refused(unet):
    class Gained(AttnProcessor2_0):
        def __call__(
            self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, *, gain=1.0
        ):
            return gain * super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)

    class WithGained(unets.UNet):
        def forms(self):
            return {**super().forms(), Gained: Plain()}

    usual = adapter_of(unet)
    unet.set_attn_processor(Gained())
    try:
        register(WithGained())
        with pytest.raises(attnreuse.UnsupportedLayerError, match="Gained takes gain besides; expected a processor"):
            attnreuse.enable(unet, Policy(steps=4, reuse=".R.."))
    finally:
        register(usual)
    assert takes_extra(AttnProcessor2_0)
