"""Held outputs: cross-attention of an unchanged context, and layers whose row says "H"."""

import copy
import json
import warnings

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from reference_run import reference
from tiny_random import TOKENS, WIDTH, compile_denoiser, prompt, random_pipeline, random_unet, sample

import attnreuse
from attnreuse import Policy, hurry, load_policy, periodic
from attnreuse.binding.processors import attention_layers
from attnreuse.binding.shapes import map_shapes
from attnreuse.maps.ring import OutputSlot, outline
from attnreuse.planning.rows import parse, stretched, strip

POLICY = periodic(6, 3)


@pytest.fixture
def pipe():
    pipe = random_pipeline()
    pipe.unet.set_attn_processor(AttnProcessor())  # the arithmetic of the reference
    return pipe


def of_kind(session, kind):
    return [layer for layer in session.report().layers if layer.kind == kind]


def counts(layer):
    return layer.computed, layer.captured, layer.reused, layer.held


# -- cross-attention


@pytest.mark.parametrize(("stock", "error"), [(AttnProcessor, 1e-5), (AttnProcessor2_0, 3e-4)])
def test_cross_attention_holds_what_reuse_of_an_exact_map_would_give(pipe, stock, error):
    expected = reference(pipe.unet, POLICY, lambda: sample(pipe, 6), layers="cross")
    pipe.unet.set_attn_processor(stock())
    with attnreuse.enable(pipe, POLICY, layers="cross", strict=True) as session:
        actual = sample(pipe, 6)
        assert torch.equal(sample(pipe, 6), actual)
    assert {counts(layer) for layer in session.report().layers} == {(2, 0, 0, 4)}
    torch.testing.assert_close(actual, expected, rtol=0, atol=error)
    assert (actual - sample(pipe, 6)).abs().max() > 10 * error


def test_a_held_output_is_its_own_size_and_the_plan_knows_it(pipe):
    with attnreuse.enable(pipe, POLICY, layers="cross") as session:
        sample(pipe, 6, batch=2)
    given = {"sample": torch.empty(4, 4, 8, 8), "timestep": 1, "encoder_hidden_states": torch.empty(4, TOKENS, WIDTH)}
    shapes = map_shapes(pipe.unet, given)
    for layer in session.report().layers:
        (b, _, m, _), channels = shapes[layer.name].map, shapes[layer.name].channels
        assert layer.map_bytes == -(-4 * b * m * channels // 256) * 256
    assert session.report().allocated_bytes == session.report().predicted_bytes


def test_a_changed_prompt_computes_and_is_told(pipe):
    other = prompt(seed=5)

    def change(pipe, step, t, kwargs):
        embeds = torch.cat([other["negative_prompt_embeds"], other["prompt_embeds"]])
        return {**kwargs, "prompt_embeds": embeds} if step == 3 else kwargs

    given = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with (
        attnreuse.enable(pipe, POLICY, layers="cross") as session,
        pytest.warns(UserWarning, match="instead of holding"),
    ):
        actual = sample(pipe, 6, **given)
    assert {counts(layer) for layer in session.report().layers} == {(3, 0, 0, 3)}  # step 4 has another prompt
    policy = Policy(steps=6, reuse=".RR..R")
    expected = reference(pipe.unet, policy, lambda: sample(pipe, 6, **given), layers="cross")
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("where", ["new memory at every step", "half of the batch from step 4 on"])
def test_the_same_prompt_in_other_memory_is_held(pipe, where):
    def change(pipe, step, t, kwargs):
        if where.startswith("new"):
            return {**kwargs, "prompt_embeds": kwargs["prompt_embeds"].clone()}
        if step == 3:
            pipe._guidance_scale = 0.0
            return {**kwargs, "prompt_embeds": kwargs["prompt_embeds"][-1:]}
        return kwargs

    given = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    expected = reference(
        pipe.unet, POLICY, lambda: sample(pipe, 6, **given), layers="cross", keep_last_rows=where.startswith("half")
    )
    with attnreuse.enable(pipe, POLICY, layers="cross", strict=True) as session:
        actual = sample(pipe, 6, **given)
    assert {counts(layer) for layer in session.report().layers} == {(2, 0, 0, 4)}
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_a_context_that_a_hook_changes_is_never_held(pipe):
    """Held outputs would be of the context of another step."""
    seen = []

    def change(module, args, kwargs):
        seen.append(1)
        return args, {**kwargs, "encoder_hidden_states": kwargs["encoder_hidden_states"] * (1 + 0.1 * len(seen))}

    for name, attn in attention_layers(pipe.unet).items():
        if name.endswith("attn2"):
            attn.register_forward_pre_hook(change, with_kwargs=True)
    expected = sample(pipe, 6)
    seen.clear()
    with attnreuse.enable(pipe, POLICY, layers="cross") as session, pytest.warns(UserWarning, match="another tensor"):
        assert torch.equal(sample(pipe, 6), expected)
    assert {counts(layer) for layer in session.report().layers} == {(6, 0, 0, 0)}


def hotswap(pipe):
    for module in pipe.unet.modules():
        if hasattr(module, "lora_B"):
            module.lora_B["default"].weight.data.mul_(-2)


ADAPTERS = {
    "scale": lambda pipe: pipe.unet.set_adapters(["default"], [0.1]),
    "off": lambda pipe: pipe.unet.disable_adapters(),
    "weights written past torch's count": hotswap,
}


@pytest.mark.parametrize("change", ADAPTERS)
def test_layers_with_adapters_reuse_maps_and_so_follow_every_change(pipe, change):
    from peft import LoraConfig

    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_v", "to_out.0"], init_lora_weights=False))
    weights = copy.deepcopy(pipe.unet.state_dict())

    def run():
        pipe.unet.load_state_dict(weights)
        pipe.unet.enable_adapters()
        pipe.unet.set_adapters(["default"], [1.0])
        at = lambda pipe, step, t, kwargs: (ADAPTERS[change](pipe) if step == 3 else None, kwargs)[1]  # noqa: E731
        return sample(pipe, 6, callback_on_step_end=at)

    expected = reference(pipe.unet, POLICY, run, layers="cross")
    with attnreuse.enable(pipe, POLICY, layers="cross", map_format="fp32", strict=True) as session:
        actual = run()
    assert {counts(layer) for layer in session.report().layers} == {(0, 2, 4, 0)}
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-4)
    with attnreuse.enable(pipe, POLICY, layers="cross", map_format="fp32"):
        assert (actual - sample(pipe, 6)).abs().max() > 1e-2  # what was changed shows


def patched(attn):
    real = attn.to_v.forward
    attn.to_v.forward = lambda x: 2 * real(x)


MID_RUN = {
    "an adapter": lambda attn: setattr(attn, "to_v", torch.nn.utils.parametrizations.weight_norm(attn.to_v)),
    "a patch": patched,
    "a hook": lambda attn: attn.to_v.register_forward_hook(lambda module, args, output: 2 * output),
    "other weights": lambda attn: attn.to_v.load_state_dict({"weight": attn.to_v.weight * 2}),
    "a weight in its place": lambda attn: setattr(attn.to_v, "weight", torch.nn.Parameter(attn.to_v.weight * 2)),
    "a bias in place": lambda attn: attn.to_out[0].bias.data.__class__ and attn.to_out[0].bias.detach().add_(1),
}


@pytest.mark.parametrize("change", MID_RUN)
def test_what_changes_a_layer_in_mid_run_computes(pipe, change):
    name = "mid_block.attentions.0.transformer_blocks.0.attn2"
    attn = pipe.unet.get_submodule(name)

    def at(pipe, step, t, kwargs):
        if step == 3:
            MID_RUN[change](attn)
        return kwargs

    with (
        attnreuse.enable(pipe, POLICY, layers="cross") as session,
        pytest.warns(UserWarning, match="mid_block.*of holding"),
    ):
        sample(pipe, 6, callback_on_step_end=at)
    for layer in session.report().layers:
        assert layer.held == (4 if layer.name != name else 3 if "weight" in change or "bias" in change else 2)


@pytest.mark.parametrize("make", ["a patch", "a hook", "quantised"])
def test_layers_that_other_tools_changed_before_reuse_maps(pipe, make):
    if make == "quantised":
        pipe.unet = torch.ao.quantization.quantize_dynamic(pipe.unet, {torch.nn.Linear})
    else:
        for name, attn in attention_layers(pipe.unet).items():
            if name.endswith("attn2"):
                MID_RUN[make](attn)
    with attnreuse.enable(pipe, POLICY, layers="cross", strict=True) as session:
        sample(pipe, 6)
    assert {counts(layer) for layer in session.report().layers} == {(0, 2, 4, 0)}


def test_a_call_without_context_holds_nothing():
    unet = random_unet(block_out_channels=(32, 32), cross_attention_dim=32)
    x = torch.randn(1, 4, 8, 8)
    with (
        torch.no_grad(),
        attnreuse.enable(unet, hurry(3, 2, None), layers="cross") as session,
        pytest.warns(UserWarning, match="was given nothing"),
    ):
        outs = [(session.step(step, 3), unet(x, 10, None).sample)[1] for step in range(3)]
    assert {counts(layer) for layer in session.report().layers} == {(3, 0, 0, 0)}
    with torch.no_grad():
        assert all(torch.equal(out, unet(x, 10, None).sample) for out in outs)


def test_layers_that_project_their_context_anew_reuse_maps():
    unet = random_unet(encoder_hid_dim=16, encoder_hid_dim_type="text_proj")
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, TOKENS, 16)
    with torch.no_grad(), attnreuse.enable(unet, hurry(3, 2, None), layers="cross", strict=True) as session:
        for step in range(3):
            session.step(step, 3)
            unet(x, 10, context)
    assert {counts(layer) for layer in session.report().layers} == {(0, 1, 2, 0)}


def test_the_stock_pipeline_is_never_touched_by_what_is_held(pipe):
    expected = sample(pipe, 6)
    with attnreuse.enable(pipe, POLICY, layers="all"):
        sample(pipe, 6)
    assert torch.equal(sample(pipe, 6), expected)


# -- rows that say H


def test_a_row_may_mix_reuse_and_hold(pipe):
    """Each letter does what it says: against processors that keep maps and outputs by themselves."""
    policy = Policy(steps=6, reuse=".RH.HR")

    class Reference:
        def __init__(self):
            self.step = -1

        def __call__(self, attn, hidden_states, *args, **kwargs):
            self.step = (self.step + 1) % 6
            letter = strip(policy.reuse)[self.step]
            if letter == "H":
                return self.output.clone()
            value = attn.head_to_batch_dim(attn.to_v(hidden_states))
            if letter == ".":
                query, key = (attn.head_to_batch_dim(f(hidden_states)) for f in (attn.to_q, attn.to_k))
                self.map = attn.get_attention_scores(query, key)
            self.output = attn.to_out[0](attn.batch_to_head_dim(self.map @ value))
            return self.output

    selves = {n: m for n, m in attention_layers(pipe.unet).items() if n.endswith("attn1")}
    before = {name: module.processor for name, module in selves.items()}
    for module in selves.values():
        module.set_processor(Reference())
    expected = sample(pipe, 6)
    for name, module in selves.items():
        module.set_processor(before[name])
    with attnreuse.enable(pipe, policy, map_format="fp32", strict=True) as session:
        actual = sample(pipe, 6)
        assert torch.equal(sample(pipe, 6), actual)
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-4)
    assert (actual - sample(pipe, 6)).abs().max() > 3e-3
    assert {counts(layer) for layer in session.report().layers} == {(0, 2, 2, 2)}
    assert "held" in str(session.report())
    assert max(map(len, str(session.report()).splitlines())) <= 80


def test_holding_alone_keeps_no_map(pipe):
    with attnreuse.enable(pipe, Policy(steps=6, reuse=".HH.HH"), map_format="fp32", strict=True) as session:
        sample(pipe, 6)
    held = session.report().allocated_bytes
    with attnreuse.enable(pipe, periodic(6, 3), map_format="fp32") as session:
        sample(pipe, 6)
    assert 0 < held < session.report().allocated_bytes / 4


def test_a_layer_beyond_the_budget_neither_reuses_nor_holds(pipe):
    policy = Policy(steps=6, reuse=".RH.RH")
    with attnreuse.enable(pipe, policy) as session:
        sample(pipe, 6)
    whole = session.report().allocated_bytes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with attnreuse.enable(pipe, policy, memory_budget=whole // 2) as session:
            sample(pipe, 6)
    report = session.report()
    assert 0 < report.allocated_bytes <= whole // 2
    for layer in report.layers:
        assert counts(layer) == ((6, 0, 0, 0) if layer.name in report.skipped else (0, 2, 2, 2))


@pytest.mark.parametrize("whole", [True, False], ids=["denoiser", "blocks"])
def test_compiled_holds_what_eager_holds(pipe, whole):
    policy = Policy(steps=6, reuse={"down_blocks.*": ".RH.HR", "*": ".HHRR."})
    with attnreuse.enable(pipe, policy, layers="all"):
        expected = sample(pipe, 6)
    compile_denoiser(pipe, whole, "aot_eager")
    with attnreuse.enable(pipe, policy, layers="all") as session, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = sample(pipe, 6)
    assert {counts(layer) for layer in of_kind(session, "self")} == {(0, 2, 2, 2), (1, 1, 2, 2)}
    assert {layer.held for layer in of_kind(session, "cross")} == {4}
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("whole", [True, False], ids=["denoiser", "blocks"])
def test_compiled_layers_see_a_context_that_a_hook_changes(pipe, whole):
    strength = [1.0]

    def change(module, args, kwargs):
        return args, {**kwargs, "encoder_hidden_states": kwargs["encoder_hidden_states"] * strength[0]}

    for name, attn in attention_layers(pipe.unet).items():
        if name.endswith("attn2"):
            attn.register_forward_pre_hook(change, with_kwargs=True)
    compile_denoiser(pipe, whole, "eager", fullgraph=False)
    with attnreuse.enable(pipe, POLICY, layers="cross") as session, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sample(pipe, 6)
    assert {layer.held for layer in session.report().layers} == {0}


@pytest.mark.parametrize("shape", [(2, 16, 12), (2, 12, 4, 4)], ids=["tokens", "image"])
def test_outputs_keep_the_shape_of_their_input(shape):
    from attnreuse.adapters.forms import Plain
    from attnreuse.binding.processors import ReuseAttnProcessor

    attn = Attention(12, heads=2, dim_head=6, rescale_output_factor=2.0).eval()
    processor = ReuseAttnProcessor(attn.processor, Plain())
    attn.set_processor(processor)
    first, second = torch.randn(shape), torch.randn(shape)
    expected = processor.original(attn, first)
    storage = torch.full((2 * 16 * 12 * 4,), 255, dtype=torch.uint8)  # NaN
    processor.output = OutputSlot(storage, outline((2, 16, 12), storage.device), torch.float32)
    with torch.no_grad():
        assert torch.equal(attn(first), expected)
        assert processor.kept
        processor.did, processor.action = None, "hold"
        held = attn(second)
        assert torch.equal(held, expected)
        held.zero_()  # what follows may write to it
        processor.did = None
        assert torch.equal(attn(second), expected)


# -- policies


def test_rows_are_text_lists_or_both():
    assert parse(".RH") == (False, True, "H") == parse([0, 1, "H"])
    assert Policy(steps=3, reuse=".R.").reuse == (False, True, False)
    assert Policy(steps=3, reuse={"*": [False, "H", "H"]}).row("a") == (False, "H", "H")
    for wrong in (".RX", [0, 2, 1], [0, "R!", 1], 7, [None] * 3, {0, 1}, (x for x in "...")):
        with pytest.raises(ValueError, match="booleans, or the letters"):
            Policy(steps=3, reuse=wrong)
    with pytest.raises(ValueError, match="must compute at the first step"):
        Policy(steps=3, reuse="H..")


def test_policies_can_be_kept_in_sets():
    made = [Policy(steps=3, reuse={"a": ".RH"}, metrics={"psnr_db": 1.0}) for _ in range(2)]
    assert len({*made, hurry(reuse=0.5), hurry(reuse=0.5), hurry(reuse=0.25)}) == 3
    orders = [{"a*": ".RH", "*": "..."}, {"*": "...", "a*": ".RH"}]
    first, second = (Policy(steps=3, reuse=order) for order in orders)  # the first pattern that matches counts
    assert first != second
    with pytest.raises(ValueError, match="finite number"):
        Policy(steps=3, reuse=".R.", metrics={"psnr_db": float("inf")})


def test_files_hold_text_and_old_ones_load(tmp_path):
    path = tmp_path / "policy.json"
    Policy(steps=4, reuse={"a": ".RH.", "*": ".R.."}).save(path)
    data = json.loads(path.read_text())
    assert (data["version"], data["reuse"]) == (2, {"a": ".RH.", "*": ".R.."})
    assert load_policy(path) == Policy(steps=4, reuse={"a": [0, 1, "H", 0], "*": [0, 1, 0, 0]})
    path.write_text(json.dumps({"steps": 3, "reuse": [False, True, False], "version": 1}))
    assert load_policy(path) == Policy(steps=3, reuse=".R.")
    path.write_text(json.dumps({"steps": 3, "reuse": ".R.", "version": 3}))
    with pytest.raises(ValueError, match="is not a policy file: version"):
        load_policy(path)


def test_what_is_held_stretches_with_the_rest():
    assert strip(stretched(parse(".RH.HH"), 12)) == ".RH.RH.HH.HH"
    policy = Policy(steps=6, reuse=".RH.HH").stretch(3)
    assert strip(policy.reuse) in (".RH", ".HH")
