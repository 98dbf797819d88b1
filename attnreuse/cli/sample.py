"""`attnreuse sample`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from attnreuse.cli.console import clear_errors, faint, out, progress
from attnreuse.cli.inputs import (
    check_prompts,
    default_format,
    load_pipeline,
    policy_for,
    refuse_beside,
    refuse_without,
    writable,
)
from attnreuse.cli.options import (
    MAIN_GUIDANCE,
    MAIN_SAMPLER,
    AsJson,
    Eta,
    Fit,
    Format,
    Layers,
    MainScheduler,
    MaxAge,
    Model,
    PolicyFile,
    Prompts,
    Seed,
    Share,
    Steps,
)
from attnreuse.progress import counted

EXAMPLES = (
    "    attnreuse sample\n\n    attnreuse sample --scheduler Heun --reuse 0.25\n\n"
    '    attnreuse sample --model user/pipeline --prompt "a red fox" --steps 30 --reuse 0.4 --format u8'
)
PROMPTS = (
    "a red circle left of a blue square on gray",
    "a yellow triangle above a green circle on white",
    "a cyan square below a purple triangle on black",
    "a blue circle on pink",
)


def command(
    context: typer.Context,
    model: Model = "",
    steps: Steps = 20,
    reuse: Share = 0.5,
    max_age: MaxAge = None,
    policy: PolicyFile = None,
    fit: Fit = "exact",
    map_format: Format = None,
    layers: Layers = None,
    scheduler: MainScheduler = None,
    guidance: Annotated[
        float | None, typer.Option(help=f"guidance_scale. Default: the model's; {MAIN_GUIDANCE} for tiny-shapes.")
    ] = None,
    eta: Eta = None,
    seed: Seed = 0,
    prompt: Prompts = None,
    out_path: Annotated[
        Path, typer.Option("--out", help="Where the picture goes (.png). A JSON file goes beside it.")
    ] = Path("attnreuse-sample.png"),
    as_json: AsJson = False,
) -> None:
    """Sample with full steps, with reuse, and with the plain steps that should take as long."""
    with clear_errors():
        from attnreuse.binding.denoiser import find_denoiser
        from attnreuse.planning.samplers import step_options
        from attnreuse.study.sample import sample, sheet

        json_path = out_path.with_suffix(".json")
        writable("--out", out_path, ".png")
        writable("--out", json_path)
        if policy is not None:
            refuse_beside(context, "--policy", "reuse", "max_age")
        else:
            refuse_without(context, "--policy", "fit")
        check_prompts(context, model, prompt)
        if not model:
            scheduler, guidance = scheduler or MAIN_SAMPLER, MAIN_GUIDANCE if guidance is None else guidance
        pipe = load_pipeline(model, scheduler)
        step_options(pipe.scheduler, eta)
        denoiser = find_denoiser(pipe)
        chosen = policy_for(policy, fit, model, pipe.scheduler, steps, reuse, max_age)
        with progress("runs") as tell:
            result = sample(
                pipe,
                prompt or list(PROMPTS),
                steps=steps,
                policy=chosen,
                layers=layers,
                map_format=map_format or default_format(denoiser.device, denoiser.dtype),
                seed=seed,
                guidance=guidance,
                eta=eta,
                progress=tell,
            )
        result.save(json_path)
        sheet(result).save(out_path)
    if as_json:
        print(result.model_dump_json(indent=2))
        return
    out.print(_table(result))
    out.print(_verdict(result))
    faint(f"{out_path}, {json_path}; {result.environment['device']}")


def _table(result: Any) -> Table:
    pictures = counted(len(result.prompts), "picture")
    table = Table(title=f"{pictures}, {result.policy}, {result.report.map_format} maps")
    for column in ("", "steps", "latency", "against full", "PSNR", "map memory"):
        table.add_column(column, justify="left" if not column else "right")
    for way in result.ways:
        reference = way is result.baseline
        quality = "reference" if reference else "equal" if way.mean_psnr_db is None else f"{way.mean_psnr_db:.2f} dB"
        table.add_row(
            way.label,
            str(way.steps),
            f"{way.latency_s:.2f} s",
            f"{way.latency_s / result.baseline.latency_s:.2f}x",
            quality,
            f"{result.report.allocated_bytes / 2**20:.1f} MiB" if way is result.reuse else "",
        )
    return table


def _verdict(result: Any) -> str:
    """Honest lines about what was measured."""
    saved = f"saved {max(0.0, result.saved_s):.2f} s" + (
        ", more than that, as times differ from run to run" if result.saved_s > result.at_most_s else ""
    )
    share = result.attention_s / result.baseline.latency_s
    limit = (
        f"Attention with its projections takes {share:.0%} of full steps' time in the layers with maps; reuse "
        f"could save {result.at_most_s:.2f} s at most, and {saved}."
    )
    ratio = result.baseline.latency_s / result.reuse.latency_s
    speed = f"Reuse ran {ratio:.2f} times as fast as full steps" if ratio >= 1 else (
        f"Reuse did not pay here: it took {1 / ratio:.2f} times as long as full steps"
    )  # fmt: skip
    ours, theirs = result.reuse.mean_psnr_db, result.fewer.mean_psnr_db
    if ours is None or theirs is None:
        return f"{speed}. {limit}"
    better = "above" if ours > theirs else "below"
    gap = f"its PSNR is {abs(ours - theirs):.2f} dB {better} that of {counted(result.fewer.steps, 'plain step')}"
    return f"{speed}; {gap}. {limit}"
