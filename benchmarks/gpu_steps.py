"""Whole denoiser steps for :mod:`benchmarks.gpu`: models of random weights with their published configs, and modes."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch

from attnreuse import ops
from attnreuse.adapters import adapter_of
from attnreuse.binding.denoiser import form_of, layer_kinds
from attnreuse.binding.processors import ReuseAttnProcessor, attention_layers
from attnreuse.binding.shapes import map_shapes
from attnreuse.maps.formats import AttentionMap, format_named
from attnreuse.maps.ring import outline
from attnreuse.measure.timing import Times, interleaved
from attnreuse.policy import Action

_SD15 = dict(block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8)
UNETS: dict[str, dict[str, Any]] = {  # unet/config.json of stable-diffusion-xl-base-1.0 and stable-diffusion-v1-5
    "SDXL 1024": dict(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    "SD1.5 1024": dict(sample_size=128, **_SD15),
    "SD1.5 512": dict(sample_size=64, **_SD15),
}

TRANSFORMERS: dict[str, tuple[str, int, dict[str, Any]]] = {  # class, side of its latents, transformer/config.json
    "PixArt-Sigma 1024": (
        "PixArtTransformer2DModel",
        128,
        dict(sample_size=128, caption_channels=4096, interpolation_scale=2, use_additional_conditions=False),
    ),
    "SD3.5-medium 1024": (
        "SD3Transformer2DModel",
        128,
        dict(
            sample_size=128,
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            out_channels=16,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        ),
    ),
    "FLUX.1-dev 768": ("FluxTransformer2DModel", 96, dict(guidance_embeds=True)),
}


@dataclass(frozen=True)
class StepRow:
    """A whole denoiser step in which every self-attention layer takes one action."""

    model: str
    mode: str  # "eager", "compiled" or "graph"
    action: str
    map_format: str
    median_s: float
    p20_s: float
    p80_s: float
    of_exact: float  # median over that of the stock step in the same mode
    map_bytes: int
    error: float  # relative Frobenius, of the output against the stock step in the same dtype


def make_denoiser(
    cls: str, side: int, config: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> tuple[Any, dict[str, Any]]:
    """A random model of a class of diffusers, and arguments of its forward for a guided picture of `side` latents."""
    import diffusers

    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # made where and as it is to be: billions of weights take minutes on a host
    try:
        with device:
            denoiser = getattr(diffusers, cls)(**config).to(dtype).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(usual)
    adapter = adapter_of(denoiser)
    rows = adapter.rows(denoiser, "", guidance=True)
    given = adapter.inputs(denoiser, rows, (side, side), adapter.tokens or 77, 1)
    given["timestep"] = adapter.as_given(torch.full((rows,), 500.0, device=device), dtype)
    return denoiser, {name: _filled(name, value, device, dtype) for name, value in given.items()}


def _filled(name: str, value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """An argument of the planned shape: noise, or ones for a mask."""
    if isinstance(value, dict):
        return {key: _filled(key, part, device, dtype) for key, part in value.items()}
    if not isinstance(value, torch.Tensor) or not value.is_meta:
        return value
    made = torch.ones if name.endswith("mask") else torch.randn
    return made(value.shape, device=device, dtype=dtype)


def processors_of(denoiser: Any, given: dict[str, Any], name: str, device: torch.device) -> list[ReuseAttnProcessor]:
    """A processor with a map of its own on every layer that attends over image tokens."""
    shapes, kinds, adapter = map_shapes(denoiser, given), layer_kinds(denoiser), adapter_of(denoiser)
    needed = [ops.workspace_bytes(name, s.map, device, denoiser.dtype, s.head_dim) for s in shapes.values()]
    work = torch.empty(max(needed), dtype=torch.uint8, device=device) if any(needed) else None
    placed = []
    for layer, module in attention_layers(denoiser).items():
        if kinds[layer] != "cross":
            processor = ReuseAttnProcessor(module.processor, form_of(adapter, module))
            processor.slot = AttentionMap.empty(format_named(name), shapes[layer][0], device)
            processor.outline = outline(processor.slot.shape, device)
            processor.workspace = work
            module.set_processor(processor)
            placed.append(processor)
    return placed


def step_calls(
    denoiser: Any, given: dict[str, Any], processors: list[ReuseAttnProcessor], mode: str
) -> dict[Action, Any]:
    """A call per action that runs the denoiser step in this mode and returns its output.

    A compiled step has a graph per action, and a CUDA graph fixed maps: what runs is chosen by which is called.
    """
    forward = torch.compile(denoiser) if mode == "compiled" else denoiser

    def eager(action: Action) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            for processor in processors:
                processor.action, processor.did = action.value, None
            return forward(**given, return_dict=False)[0]

        return call

    calls = {action: eager(action) for action in (Action.COMPUTE, Action.CAPTURE, Action.REUSE)}
    for call in calls.values():  # compiles, and fills the maps before they are reused
        call()
    return {action: graphed(call) for action, call in calls.items()} if mode == "graph" else calls


def graphed(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The call as a CUDA graph; fails where it would allocate outside the graph or wait for the device."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay


def measure_steps(
    model: str,
    made: tuple[Any, dict[str, Any]],
    name: str,
    device: torch.device,
    mode: str,
    repeats: int = 10,
) -> list[StepRow]:
    """Stock, capture and reuse steps of a denoiser as it was `made`, in turns; maps in format `name`."""
    denoiser, given = made
    rows = []
    with torch.no_grad():
        processors = processors_of(denoiser, given, name, device)
        calls = step_calls(denoiser, given, processors, mode)
        outputs = {action: call().double() for action, call in calls.items()}
        exact = outputs[Action.COMPUTE]
        times: list[Times] = interleaved(list(calls.values()), device, repeats)
    for (action, out), own in zip(outputs.items(), times, strict=True):
        error = float((out - exact).norm() / exact.norm())
        spread = (own.median, own.p20, own.p80, own.median / times[0].median)
        held = 0 if action is Action.COMPUTE else sum(p.slot.nbytes for p in processors)
        rows.append(StepRow(model, mode, action.value, name, *spread, held, error))
        print(rows[-1], flush=True)
    torch.compiler.reset()
    return rows


def models() -> dict[str, tuple[Callable[[torch.device, torch.dtype], tuple[Any, dict[str, Any]]], torch.dtype]]:
    """How each model is made, and the dtype in which it is run; the most telling first."""
    made: dict[str, Any] = {
        model: (functools.partial(make_denoiser, "UNet2DConditionModel", config["sample_size"], config), torch.float16)
        for model, config in UNETS.items()
    }
    return made | {model: (functools.partial(make_denoiser, *of), torch.bfloat16) for model, of in TRANSFORMERS.items()}
