"""The GPU suite: tests first, then kernels against exact attention, then whole denoiser steps; in ten minutes.

    python -m benchmarks.gpu                     everything; appends to benchmarks/results/, draws the plot
    python -m benchmarks.gpu --only kernels      or steps, or tests

A failing test ends it: no speed of wrong code. Denoisers have random weights and their published configs.
"""

import argparse
import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch
from rows import RESULTS, append, provenance

from attnreuse.adapters import adapter_of
from attnreuse.binding.denoiser import form_of, layer_kinds
from attnreuse.binding.processors import ReuseAttnProcessor, attention_layers
from attnreuse.binding.shapes import map_shapes
from attnreuse.maps.formats import AttentionMap, format_named
from attnreuse.maps.ring import outline
from attnreuse.measure.timing import Times, interleaved
from attnreuse.policy import Action
from attnreuse.study import bench

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ["fp16", "bf16", "u8", "u4"]
UNETS: dict[str, dict[str, Any]] = {  # unet/config.json of stable-diffusion-v1-5 and stable-diffusion-xl-base-1.0
    "SD1.5 512": dict(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        cross_attention_dim=768,
        attention_head_dim=8,
    ),
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


def run_tests() -> None:
    """The marked tests and the kernels' own, on the device; SystemExit where one fails."""
    # Most of the time compiles kernels, one core a test.
    command = [sys.executable, "-m", "pytest", "-q", "-n", "8", "tests/test_gpu.py", "tests/test_triton.py"]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise SystemExit("tests fail: nothing is measured")


def measure_kernels(device: torch.device, repeats: int = 20) -> tuple[list[bench.Row], bench.Ceilings]:
    """Every shape and format in fp16."""
    limits = bench.ceilings(device, torch.float16)
    rows: list[bench.Row] = []
    for name, shape in bench.SHAPES.items():
        rows += bench.measure(name, shape, MEASURED, torch.float16, device, limits, repeats)
        print(f"{name}: {sum(r.green for r in rows)} of {len(rows)} ops within their error so far", flush=True)
    return rows, limits


def make_unet(config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """A random UNet, and arguments of its forward for one picture under guidance."""
    return make_denoiser("UNet2DConditionModel", config["sample_size"], config, device, dtype)


def make_denoiser(
    cls: str, side: int, config: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> tuple[Any, dict[str, Any]]:
    """The same of any class of diffusers whose latents for this picture are `side` x `side`."""
    import diffusers

    torch.manual_seed(0)
    with device:
        denoiser = getattr(diffusers, cls)(**config).to(device, dtype).eval().requires_grad_(False)
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
    placed = []
    for layer, module in attention_layers(denoiser).items():
        if kinds[layer] != "cross":
            processor = ReuseAttnProcessor(module.processor, form_of(adapter, module))
            processor.slot = AttentionMap.empty(format_named(name), shapes[layer][0], device)
            processor.outline = outline(processor.slot.shape, device)
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
    make: Callable[[torch.device, torch.dtype], tuple[Any, dict[str, Any]]],
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    mode: str,
    repeats: int = 10,
) -> list[StepRow]:
    """Stock, capture and reuse steps of the denoiser that `make` makes, in turns; maps in format `name`."""
    denoiser, given = make(device, dtype)
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


def step_plan() -> list[tuple[str, Callable[..., tuple[Any, dict[str, Any]]], torch.dtype, tuple[str, ...]]]:
    """Models, how each is made, in the dtype that it is run in, and modes; what compiles longest comes last."""
    plan: list[Any] = [
        (model, functools.partial(make_unet, config), torch.float16, ("eager", "graph", "compiled"))
        for model, config in UNETS.items()
    ]
    plan += [
        (model, functools.partial(make_denoiser, *of), torch.bfloat16, ("eager", "graph"))
        for model, of in TRANSFORMERS.items()
    ]
    return plan


def plot(rows: list[bench.Row], device: str, path: Path) -> None:
    """Memory against latency of reuse, in units of the fastest exact attention, one panel per shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(row.shape for row in rows if row.n == row.m))
    figure, axes = plt.subplots(1, len(names), figsize=(3.1 * len(names), 3.4), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        done = [r for r in rows if r.shape == name and r.op != "exact" and r.of_exact is not None]
        for op, backend in sorted({(r.op, r.backend) for r in done}):
            shown = [r for r in done if (r.op, r.backend) == (op, backend)]
            marker = "^" if op == "capture" else "o"
            axis.plot(
                [r.map_bytes / 2**20 for r in shown], [r.of_exact for r in shown], marker, label=f"{op} {backend}"
            )
            for r in shown:
                axis.annotate(r.kind, (r.map_bytes / 2**20, r.of_exact), (4, 4), textcoords="offset points", fontsize=8)
        axis.axhline(1.0, color="gray", linewidth=1, linestyle="--")
        axis.set(title=name, xlabel="map, MiB", xscale="log")
        axis.title.set_fontsize(9)
    axes[0][0].set_ylabel("time over the fastest exact attention")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(device, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["tests", "kernels", "steps"], help="one part (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: nothing to measure (python -m benchmarks.compile checks the kernels without)")
    device = torch.device("cuda")
    about = provenance(device)
    if args.only in (None, "tests"):
        run_tests()
    if args.only in (None, "kernels"):
        rows, limits = measure_kernels(device)
        append(args.out / "gpu_kernels.csv", [row | about for row in bench.to_dicts(rows, limits)])
        plot(rows, str(about["device"]), args.out / "memory-latency.png")
    if args.only in (None, "steps"):
        for model, make, dtype, modes in step_plan():
            for mode in modes:
                steps = measure_steps(model, make, "u8", device, dtype, mode)
                append(args.out / "gpu_steps.csv", [vars(row) | about for row in steps])


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*TensorFloat32.*")
    main()
