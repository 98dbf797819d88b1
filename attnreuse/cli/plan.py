"""`attnreuse plan`: memory and time of a policy, before a run."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from attnreuse.cli.console import clear_errors, out, progress
from attnreuse.cli.inputs import default_dtype, default_format, find_model, policy_for, refuse_beside, refuse_without
from attnreuse.cli.options import (
    MAIN_SAMPLER,
    AsJson,
    Fit,
    Format,
    Layers,
    MainScheduler,
    MaxAge,
    MemoryBudget,
    Model,
    PolicyFile,
    Share,
    Steps,
)
from attnreuse.errors import check_finite

EXAMPLES = (
    "    attnreuse plan\n\n    attnreuse plan --height 256 --width 256 --format u4\n\n"
    "    attnreuse plan --model user/pipeline --steps 30 --reuse 12 --memory-budget 2GiB"
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
    scheduler: MainScheduler = None,
    layers: Layers = None,
    height: Annotated[int | None, typer.Option(min=8, help="Pixels. Default: the model's own.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="Pixels. Default: the model's own.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at once. Guidance doubles the denoiser's rows.")] = 4,
    guidance: Annotated[float, typer.Option(help="guidance_scale. At most 1: off, and no rows for it.")] = 7.5,
    frames: Annotated[int | None, typer.Option(min=1, help="Of a video, for models that make one.")] = None,
    memory_budget: MemoryBudget = None,
    measure: Annotated[bool, typer.Option(help="Whether runs are timed here, to predict the gain.")] = True,
    as_json: AsJson = False,
) -> None:
    """Tell the memory of a policy and whether it pays here, before a run, from the model's configs alone."""
    with clear_errors():
        from attnreuse.measure.environment import default_device
        from attnreuse.study.blueprint import Blueprint
        from attnreuse.study.plan import forecast

        if policy is not None:
            refuse_beside(context, "--policy", "reuse", "max_age")
        else:
            refuse_without(context, "--policy", "fit")
        check_finite(guidance=guidance)
        if not model:
            scheduler = scheduler or MAIN_SAMPLER
        path, local = find_model(model)
        size = (height, width) if height and width else None
        blueprint = Blueprint.load(path, scheduler, local, size, frames)
        device = default_device()
        dtype = default_dtype(device)
        chosen = policy_for(policy, fit, model, blueprint.scheduler, steps, reuse, max_age)
        with progress("runs") as tell:
            result = forecast(
                blueprint,
                chosen,
                asked_steps=steps,
                map_format=map_format or default_format(device, dtype),
                layers=layers,
                size=(height or blueprint.size[0], width or blueprint.size[1]),
                pictures=batch,
                guidance=guidance > 1,
                memory_budget=memory_budget,
                dtype=dtype,
                measure_on=device if measure else None,
                frames=frames,
                progress=tell,
            )
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
        return
    out.print(result)
