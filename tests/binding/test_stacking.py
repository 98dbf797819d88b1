"""Reuse beside other tools: what docs/stacking.md says of each is what happens."""

import copy
import pickle
import warnings
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from diffusers import (
    ControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    T2IAdapter,
)
from life import ip_adapter_state, lora_state
from reference_run import reference
from tiny_random import WIDTH, captioned_pipeline, compile_denoiser, guided, random_pipeline, random_unet, sample

import attnreuse
from attnreuse import Policy, hurry
from attnreuse.binding.processors import ReuseAttnProcessor

STEPS = 8
POLICY = Policy(steps=STEPS, reuse=[0, 0, 1, 1, 0, 1, 1, 1])
WORKS, FEWER, ALONE = "works", "works, with fewer reuses", "leaves these layers alone"


@contextmanager
def deepcache(pipe, interval=3):
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    helper.enable()
    yield
    helper.disable()


@contextmanager
def tomesd(pipe):
    import tomesd

    tomesd.apply_patch(pipe, ratio=0.5, max_downsample=1, use_rand=False)
    yield
    tomesd.remove_patch(pipe)


@contextmanager
def pyramid_broadcast(pipe):
    from attnreuse.study.compare.other_caches import attention_broadcast

    with attention_broadcast(2)(pipe):
        yield


@contextmanager
def freeu(pipe):
    pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    yield
    pipe.disable_freeu()


@contextmanager
def sliced(pipe):
    pipe.enable_attention_slicing(1)
    yield
    pipe.disable_attention_slicing()


@contextmanager
def fused(pipe):
    pipe.unet.fuse_qkv_projections()
    yield
    pipe.unet.unfuse_qkv_projections()


@contextmanager
def lora(pipe):
    pipe.load_lora_weights(lora_state(1, copy.deepcopy(pipe.unet)))
    yield
    pipe.unload_lora_weights()


@contextmanager
def ip_adapter(pipe):
    pipe.load_ip_adapter(ip_adapter_state(pipe.unet), subfolder=None, weight_name=None, image_encoder_folder=None)
    yield
    pipe.unload_ip_adapter()


@contextmanager
def accelerate_offload(pipe):
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))  # what enable_sequential_cpu_offload does
    yield
    remove_hook_from_submodules(pipe.unet)


@contextmanager
def group_offload(pipe):
    hooks = pytest.importorskip("diffusers.hooks")
    cpu = torch.device("cpu")
    hooks.apply_group_offloading(pipe.unet, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    yield
    for module in pipe.unet.modules():
        if hasattr(module, "_diffusers_hook"):
            for name in list(module._diffusers_hook.hooks):
                module._diffusers_hook.remove_hook(name, recurse=False)


@contextmanager
def compiled(pipe, whole):
    unet = pipe.unet
    compile_denoiser(pipe, whole, "eager")
    yield
    pipe.unet = unet
    for module in unet.modules():
        module._compiled_call_impl = None


TOOLS = {  # tool: how it is applied, what becomes of the self-attention layers, arguments of the run
    "DeepCache": (deepcache, FEWER, {}),
    "pyramid attention broadcast": (pyramid_broadcast, FEWER, {}),
    "tomesd": (tomesd, ALONE, {}),
    "FreeU": (freeu, WORKS, {}),
    "attention slicing": (sliced, WORKS, {}),
    "fused QKV projections": (fused, WORKS, {}),
    "LoRA": (lora, WORKS, {}),
    "IP-Adapter": (ip_adapter, WORKS, {"ip_adapter_image_embeds": [torch.ones(2, 1, WIDTH)]}),
    "accelerate's offloading": (accelerate_offload, WORKS, {}),
    "group offloading": (group_offload, WORKS, {}),
    "torch.compile": (partial(compiled, whole=True), WORKS, {}),
    "compiled blocks": (partial(compiled, whole=False), WORKS, {}),
}


@pytest.mark.parametrize("first", ["tool", "enable"])
@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_and_reuse(name, first):
    tool, fate, call = TOOLS[name]
    pipe = random_pipeline(block_out_channels=(16, 32, 32), down_block_types=("CrossAttnDownBlock2D",) * 3,
                           up_block_types=("CrossAttnUpBlock2D",) * 3)  # fmt: skip
    given, processors = {**call}, {n: type(p) for n, p in pipe.unet.attn_processors.items()}
    plain = sample(pipe, STEPS)
    with tool(pipe):
        stock = sample(pipe, STEPS, **given)
    outs = []
    for policy in (hurry(STEPS, 0), POLICY):
        with warnings.catch_warnings(), ExitStack() as stack:
            warnings.simplefilter("ignore")
            if first == "tool":
                stack.enter_context(tool(pipe))
            session = stack.enter_context(attnreuse.enable(pipe, policy, map_format="fp32"))
            if first == "enable":
                stack.enter_context(tool(pipe))
            outs.append(sample(pipe, STEPS, **given))
            reports = session.report()
            assert torch.equal(sample(pipe, STEPS, **given), outs[-1])  # and once more, from the start
    never, reused = outs
    torch.testing.assert_close(never, stock, rtol=0, atol=1e-4)
    counts = {layer.name: layer.reused for layer in reports.layers}
    if fate == WORKS:
        assert set(counts.values()) == {5}
        assert 0 < (reused - stock).norm() / stock.norm() < 0.2
    elif fate == FEWER:
        assert 0 <= min(counts.values()) < 5
        assert max(counts.values()) > 0
        assert any(layer.reasons for layer in reports.layers)
    else:
        merged = {n for n in counts if n.startswith(("down_blocks.0", "up_blocks.2"))}
        assert all((counts[n] == 0) == (n in merged) for n in counts)
    assert {n: type(p) for n, p in pipe.unet.attn_processors.items()} == processors
    assert torch.equal(sample(pipe, STEPS), plain)


@pytest.mark.parametrize("interval", [2, 3])
def test_deepcache_and_reuse_equal_deepcache_where_no_map_is_at_hand(interval):
    """Captures fall on steps that skip the deep blocks, so those compute whenever they run."""
    pipe = random_pipeline()
    row = [0] * STEPS
    for step in range(interval, STEPS, interval):
        row[step] = 1  # the steps that run all blocks
    with deepcache(pipe, interval):
        stock = sample(pipe, STEPS)
        with attnreuse.enable(pipe, Policy(steps=STEPS, reuse=row), layers=["mid_block.*attn1"]) as session:
            assert torch.equal(sample(pipe, STEPS), stock)
    (layer,) = session.report().layers
    assert layer.reused == 0
    assert layer.planned["reused"] == sum(row)
    assert sum(layer.reasons.values()) == sum(row) + (STEPS - 1 - sum(row))


def test_tomesd_on_all_layers_is_an_error_that_says_so(pipe):
    import tomesd

    tomesd.apply_patch(pipe, ratio=0.5, max_downsample=2, use_rand=False)
    with (
        attnreuse.enable(pipe, hurry(4, 2)),
        pytest.raises(attnreuse.UnsupportedLayerError, match=r"none of the 7 layers can reuse.*merges, tiles or adds"),
    ):
        sample(pipe, 4)
    tomesd.remove_patch(pipe)


def test_layers_under_perturbed_attention_guidance_are_left_alone():
    pipe = guided(StableDiffusionPAGPipeline, pag_applied_layers=["mid"])
    stock = sample(pipe, STEPS, pag_scale=3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with attnreuse.enable(pipe, hurry(STEPS, 0)):
            assert torch.equal(sample(pipe, STEPS, pag_scale=3.0), stock)
        with attnreuse.enable(pipe, POLICY) as session:
            out = sample(pipe, STEPS, pag_scale=3.0)
    assert 0 < (out - stock).norm() / stock.norm() < 0.2
    assert list(session.report().skipped) == ["mid_block.attentions.0.transformer_blocks.0.attn1"]
    assert [layer.reused for layer in session.report().layers].count(5) == 6


@pytest.mark.parametrize("kind", ["ControlNet", "T2I-Adapter"])
def test_side_networks_are_untouched_and_reuse_works(kind):
    torch.manual_seed(0)
    if kind == "ControlNet":
        side = ControlNetModel.from_unet(random_unet(), conditioning_embedding_out_channels=(16, 32)).eval()
        pipe = guided(StableDiffusionControlNetPipeline, controlnet=side)
    else:
        side = T2IAdapter(in_channels=3, channels=[16, 32], num_res_blocks=1, downscale_factor=2,
                          adapter_type="full_adapter").eval()  # fmt: skip
        pipe = guided(StableDiffusionAdapterPipeline, adapter=side)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    theirs = dict(getattr(side, "attn_processors", {}))

    def run():
        return sample(pipe, STEPS, image=image)

    stock, expected = run(), reference(pipe.unet, POLICY, run)
    with attnreuse.enable(pipe, POLICY, map_format="fp32") as session:
        torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-3)
    assert not torch.equal(expected, stock)
    assert {layer.reused for layer in session.report().layers} == {5}
    assert dict(getattr(side, "attn_processors", {})) == theirs


def test_a_lora_swapped_between_runs_is_in_force(pipe):
    def alone(seed):
        fresh = random_pipeline()
        fresh.load_lora_weights(lora_state(seed), adapter_name=f"a{seed}")
        with attnreuse.enable(fresh, POLICY):
            return sample(fresh, STEPS)

    with attnreuse.enable(pipe, POLICY) as session:
        for seed in (1, 2):
            pipe.load_lora_weights(lora_state(seed), adapter_name=f"a{seed}")
        for seed in (1, 2, 1):
            pipe.set_adapters([f"a{seed}"])
            assert torch.equal(sample(pipe, STEPS), alone(seed))
            assert session.report().layers[0].reused == 5


def test_a_scaled_lora_reuses_as_planned(pipe):
    """Each call scales it and takes the scale back, not to the last bit."""
    pipe.load_lora_weights(lora_state(1), adapter_name="a")
    pipe.set_adapters(["a"], [0.8])
    with attnreuse.enable(pipe, POLICY, strict=True) as session:
        for _ in range(2):
            sample(pipe, STEPS, cross_attention_kwargs={"scale": 0.7})
            assert {layer.reused for layer in session.report().layers} == {5}


def test_the_vae_and_side_networks_keep_their_own_attention(pipe):
    """The VAE's attention is of the same class; it is never touched."""
    vae = {name: id(module.processor) for name, module in pipe.vae.named_modules() if hasattr(module, "processor")}
    with attnreuse.enable(pipe, POLICY, layers="all"):
        sample(pipe, STEPS, output_type="np")
    now = {name: id(module.processor) for name, module in pipe.vae.named_modules() if hasattr(module, "processor")}
    assert now == vae


# -- who reads, sets, saves or copies processors finds their own


def no_trace(unet):
    return not any(isinstance(p, ReuseAttnProcessor) for p in unet.attn_processors.values())


FLOWS = {
    "set_default_attn_processor": lambda p: p.unet.set_default_attn_processor(),
    "fuse and unfuse": lambda p: (p.unet.fuse_qkv_projections(), p.unet.unfuse_qkv_projections()),
    "slicing on and off": lambda p: (p.enable_attention_slicing(), p.disable_attention_slicing()),
    "a saved dict": lambda p: p.unet.set_attn_processor(dict(p.unet.attn_processors)),
    "IP-Adapter on and off": lambda p: ip_adapter(p).__enter__() or p.unload_ip_adapter(),
    "FreeU on and off": lambda p: (p.enable_freeu(0.9, 0.2, 1.2, 1.4), p.disable_freeu()),
}


@pytest.mark.parametrize("flow", FLOWS)
def test_reuse_goes_on_and_leaves_no_trace(pipe, flow):
    before = {n: type(p) for n, p in pipe.unet.attn_processors.items()}
    stock = sample(pipe, STEPS)
    with attnreuse.enable(pipe, POLICY) as session:
        sample(pipe, STEPS)
        FLOWS[flow](pipe)
        assert no_trace(pipe.unet)
        sample(pipe, STEPS)
        assert session.report().layers[0].reused == 5
    assert {n: type(p) for n, p in pipe.unet.attn_processors.items()} == before
    assert torch.equal(sample(pipe, STEPS), stock)


def test_an_ip_adapter_loaded_while_enabled_may_be_unloaded_after(pipe):
    stock = sample(pipe, STEPS)
    with attnreuse.enable(pipe, POLICY):
        adapter = ip_adapter(pipe)
        adapter.__enter__()
    pipe.unload_ip_adapter()
    assert no_trace(pipe.unet)
    assert torch.equal(sample(pipe, STEPS), stock)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda unet: pickle.loads(pickle.dumps(unet)),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_an_enabled_denoiser_is_stock(pipe, how):
    stock = sample(pipe, STEPS)
    with attnreuse.enable(pipe, POLICY) as session:
        expected = sample(pipe, STEPS)
        twin = random_pipeline()
        twin.unet = COPIES[how](pipe.unet)
        assert no_trace(twin.unet)
        assert torch.equal(sample(twin, STEPS), stock)
        attnreuse.disable(twin)
        assert torch.equal(sample(pipe, STEPS), expected)
        with attnreuse.enable(twin, POLICY):
            assert torch.equal(sample(twin, STEPS), expected)
        assert session.report().layers[0].reused == 5


def test_an_enabled_pipeline_can_be_saved(tmp_path):
    pipe = captioned_pipeline()
    stock = sample(pipe, STEPS)
    with attnreuse.enable(pipe, POLICY):
        pipe.save_pretrained(tmp_path)
        torch.save(pipe.unet, tmp_path / "unet.pt")
        expected = sample(pipe, STEPS)
    back = StableDiffusionPipeline.from_pretrained(tmp_path)
    back.set_progress_bar_config(disable=True)
    assert torch.equal(sample(back, STEPS), stock)
    back.unet = torch.load(tmp_path / "unet.pt", weights_only=False)
    assert torch.equal(sample(back, STEPS), stock)
    with attnreuse.enable(back, POLICY):
        assert torch.equal(sample(back, STEPS), expected)


# -- compilation: a graph per action, not per size


def graphs(pipe, whole, sizes):
    """Graphs compiled after runs at each of these sizes."""
    counter, counts = torch._dynamo.testing.CompileCounterWithBackend("eager"), []
    compile_denoiser(pipe, whole, counter)
    for size in sizes:
        sample(pipe, 4, latents=torch.randn(1, 4, size, size), guidance_scale=1.0)
        counts.append(counter.frame_count)
    return counts


@pytest.mark.parametrize("whole", [True, False], ids=["denoiser", "blocks"])
def test_graphs_are_as_many_as_stock_has_times_the_actions(whole):
    sizes = (8, 12, 16)
    stock = graphs(random_pipeline(), whole, sizes)
    assert stock[-1] == stock[1]  # sizes became symbols
    for policy, actions in ((hurry(4, 2), 2), (hurry(4, 2, None), 3)):
        pipe = random_pipeline()
        with attnreuse.enable(pipe, policy) as session, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            counts = graphs(pipe, whole, sizes)
        assert {layer.reused for layer in session.report().layers} == {2}
        assert counts[-1] == counts[1] <= actions * stock[-1]


def test_a_policy_of_many_patterns_raises_the_compilers_limit_and_says_so(pipe):
    torch._dynamo.reset()
    names = [n.removesuffix(".processor") for n in pipe.unet.attn_processors if "attn1" in n]
    rows = {name: [0] + [(step >> i) & 1 for step in range(1, 4)] for i, name in enumerate(names[:2])}
    policy = Policy(steps=4, reuse=rows)
    with attnreuse.enable(pipe, policy):
        expected = sample(pipe, 4)
    unet, pipe.unet = pipe.unet, torch.compile(pipe.unet, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=2):
        with attnreuse.enable(pipe, policy), pytest.warns(UserWarning, match="recompile_limit, is raised from 2 to"):
            actual = sample(pipe, 4)
        assert torch._dynamo.config.recompile_limit == 2
        torch._dynamo.reset()
        with attnreuse.enable(pipe.unet, policy), pytest.warns(UserWarning, match="is raised from 2 to"):
            torch.testing.assert_close(sample(pipe, 4), expected, rtol=1e-4, atol=1e-4)
        assert torch._dynamo.config.recompile_limit == 2
    pipe.unet = unet
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_every_tool_has_its_row_in_the_docs():
    page = Path(__file__).parents[2] / "docs" / "stacking.md"
    lines = [line.split("|") for line in page.read_text(encoding="utf-8").splitlines() if "|" in line]
    rows = {cells[1].strip(): cells[2].strip() for cells in lines}
    assert {name: rows.get(name) for name in TOOLS} == {name: fate for name, (_, fate, _) in TOOLS.items()}
    assert {"perturbed attention guidance", "ControlNet", "T2I-Adapter"} <= set(rows)
