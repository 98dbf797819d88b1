"""Options that several commands take."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Literal

import typer

MAIN_SAMPLER, MAIN_GUIDANCE = "Euler a", 7.5  # of the main job on tiny-shapes
FormatName = Enum("FormatName", {name: name for name in ("fp32", "fp16", "bf16", "u8", "u7", "u4")}, type=str)
MetricName = Enum("MetricName", {name: name for name in ("ssim", "lpips", "fid", "clip")}, type=str)

Model = Annotated[
    str, typer.Option(help="Pipeline: a folder, or a name on the hub. Default: the shipped pipeline tiny-shapes.")
]
Steps = Annotated[int, typer.Option(min=1, help="num_inference_steps of the full run.")]
Share = Annotated[
    float,
    typer.Option(min=0, help="How much of the run reuses: a share of the executed steps below 1, or their number."),
]
MaxAge = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Reuse at the latest steps, of maps at most this many steps old. 0: of any age (the paper's HURRY).",
    ),
]
PolicyFile = Annotated[
    str | None,
    typer.Option(
        "--policy",
        help="Policy or rule: a file, or a name on the hub. Default: the shipped policy that fits, or the rule HURRY.",
    ),
]
Fit = Annotated[
    Literal["exact", "stretch"],
    typer.Option(help="A policy for other steps than this run executes: refuse it, or stretch it by noise level."),
]
Format = Annotated[
    Literal["fp32", "fp16", "bf16", "u8", "u7", "u4"] | None,
    typer.Option("--format", help="Format of the maps. Default: u8 where a kernel serves it, else fp32."),
]
Formats = Annotated[list[FormatName] | None, typer.Option("--format", help="Format of the maps. Repeatable.")]
Guidance = Annotated[float | None, typer.Option(help="guidance_scale. Default: the model's; 2.5 for tiny-shapes.")]
Eta = Annotated[
    float | None, typer.Option(min=0, max=1, help="Share of the noise that DDIM or TCD adds at each step. Default: 0.")
]
Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", help="Prompt of one picture. Repeatable. Default for tiny-shapes: captions it knows."),
]
Images = Annotated[int, typer.Option(min=1, help="How many pictures, where no --prompt is given.")]
Seed = Annotated[int, typer.Option(help="Seed of the first picture. Each further picture adds one.")]
Batch = Annotated[int, typer.Option(min=1, help="Pictures that are sampled at once.")]
LAYERS = "Attention layers that take part: self, cross, all, or a pattern of names."
Layers = Annotated[str | None, typer.Option(help=f"{LAYERS} Default: self, and what a policy names.")]
MemoryBudget = Annotated[str | None, typer.Option(help="Most memory for maps, such as 4GiB, 500MB or 2G.")]
SAMPLER = "Sampler: DDIM, 'Euler a', 'DPM++ 2M SDE Karras', Heun and so on, or a scheduler class of diffusers."
Scheduler = Annotated[str | None, typer.Option(help=f"{SAMPLER} Default: the model's.")]
MainScheduler = Annotated[
    str | None, typer.Option("--scheduler", help=f"{SAMPLER} Default: the model's; {MAIN_SAMPLER} for tiny-shapes.")
]
Metrics = Annotated[
    list[MetricName] | None,
    typer.Option("--metric", help="Metric besides PSNR. Repeatable. Default: ssim; for tiny-shapes also fid, clip."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
