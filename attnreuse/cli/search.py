"""`attnreuse search`: PHAST, exhaustive search, and the ladder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from attnreuse.cli.console import clear_errors, faint, out, progress
from attnreuse.cli.inputs import check_prompts, count_for, load_pipeline, refuse_ignored, setting_for, writable
from attnreuse.cli.options import (
    LAYERS,
    AsJson,
    Batch,
    Eta,
    Format,
    Guidance,
    MemoryBudget,
    Model,
    Prompts,
    Scheduler,
    Seed,
    Steps,
)
from attnreuse.errors import AttnReuseError, check_finite
from attnreuse.progress import counted

EXAMPLES = (
    "    attnreuse search --out policy.json\n\n    attnreuse search --metric ssim --floor 0.98\n\n"
    "    attnreuse search --method exhaustive --steps 10 --reuse 4\n\n"
    "    attnreuse search --method ladder --scheduler 'Euler a' --floor 45\n\n"
    '    attnreuse search --model user/pipeline --prompt "a red fox" --prompt "a harbour" --engine ray'
)
PHAST, LADDER, RAY = "Only for --method phast", "Only for --method ladder", "Only for --engine ray"
ONLY_FOR_METHOD: dict[str, tuple[str, ...]] = {  # options, by their parameters
    **dict.fromkeys(("variant", "patience", "restarts", "analysis"), ("phast",)),
    **dict.fromkeys(("reuse", "metric"), ("phast", "exhaustive")),
    **dict.fromkeys(("time", "budget_time", "by", "confirm"), ("ladder",)),
    "budget": ("phast", "ladder"),
}


def command(
    context: typer.Context,
    model: Model = "",
    steps: Steps = 20,
    reuse: Annotated[
        float,
        typer.Option(
            min=0,
            help="phast, exhaustive: how much of the run reuses, a share of the steps below 1, or a number of steps.",
        ),
    ] = 0.5,
    method: Annotated[
        Literal["phast", "exhaustive", "ladder"],
        typer.Option(
            help="phast trades steps of one schedule, exhaustive judges all, ladder finds the best one at every time."
        ),
    ] = "phast",
    variant: Annotated[
        Literal["greedy", "exhaustive"],
        typer.Option(
            rich_help_panel=PHAST,
            help="Move to the first better neighbours, or to the best of all neighbours.",
        ),
    ] = "greedy",
    metric: Annotated[
        Literal["psnr", "ssim", "lpips"],
        typer.Option(help="phast, exhaustive: what measures the distance from the full-step pictures."),
    ] = "psnr",
    floor: Annotated[
        float | None, typer.Option(help="Seek the fastest schedule with at least this metric (ladder: dB of PSNR).")
    ] = None,
    time: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=LADDER,
            help="Seek the best schedule within this share of the full run's time.",
        ),
    ] = None,
    memory_budget: MemoryBudget = None,
    budget: Annotated[int, typer.Option(min=1, help="phast, ladder: judge at most this many schedules.")] = 200,
    budget_time: Annotated[
        float | None,
        typer.Option(
            min=0,
            rich_help_panel=LADDER,
            help="Search for at most this many minutes. Default: no limit.",
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=PHAST,
            help="Leave a start after this many schedules that are no better. Default: never.",
        ),
    ] = None,
    restarts: Annotated[
        int,
        typer.Option(min=0, rich_help_panel=PHAST, help="Also start from this many random schedules."),
    ] = 0,
    analysis: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=PHAST,
            help="A file of `attnreuse analyze`. The search starts from its prediction.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    by: Annotated[
        Literal["kind", "level", "layer"],
        typer.Option(
            rich_help_panel=LADDER,
            help="Which layers share a row: self or cross; these by size; or each layer alone.",
        ),
    ] = "level",
    prompt: Prompts = None,
    images: Annotated[
        int | None,
        typer.Option(min=1, help="How many pictures, where no --prompt is given. Default: 8; ladder: 16."),
    ] = None,
    confirm: Annotated[
        int,
        typer.Option(
            min=0,
            rich_help_panel=LADDER,
            help="Judge the best schedules again by this many other pictures; of --prompt, the last ones.",
        ),
    ] = 0,
    seed: Seed = 1000,
    guidance: Guidance = None,
    eta: Eta = None,
    layers: Annotated[str | None, typer.Option(help=f"{LAYERS} Default: self; all for --method ladder.")] = None,
    map_format: Format = None,
    scheduler: Scheduler = None,
    batch: Batch = 4,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Judge schedules here, or spread over a ray cluster (extra ray).")
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=RAY,
            help="Address of a running cluster. Default: start one on this machine.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=RAY,
            help="How many workers. Default: as many as the cluster holds.",
        ),
    ] = None,
    cache: Annotated[Path, typer.Option(help="File of scores. A search that was stopped goes on from it.")] = Path(
        "attnreuse-search.jsonl"
    ),
    out_path: Annotated[Path, typer.Option("--out", help="Where the policy goes (.json).")] = Path(
        "attnreuse-policy.json"
    ),
    as_json: AsJson = False,
) -> None:
    """Search for the schedule that keeps the full-step pictures best, or the best one at every time (ladder)."""
    with clear_errors(lambda: _kept(cache)):
        from attnreuse.binding.shapes import parse_bytes
        from attnreuse.search import InProcess, Objective, RayEngine, exhaustive, ladder, phast
        from attnreuse.study.evaluate import Evaluator

        refuse_ignored(context, "--method", method, ONLY_FOR_METHOD)
        refuse_ignored(context, "--engine", engine, dict.fromkeys(("address", "workers"), ("ray",)))
        is_ladder = method == "ladder"
        if is_ladder and floor is None and time is None:
            raise ValueError(
                "--method ladder finds a front: say which point to save by --floor (dB) or --time (a share)"
            )
        check_finite(time=time)
        objective = Objective(metric, floor, parse_bytes(memory_budget))
        writable("--out", out_path, ".json")
        writable("--cache", cache)
        layers, images = layers or ("all" if is_ladder else None), images or (16 if is_ladder else 8)
        count = images + confirm
        check_prompts(context, model, prompt)
        setting = setting_for(model, prompt, count, steps, seed, guidance, eta, map_format, layers, batch)
        setting, others = _kept_back(setting, confirm)
        evaluator = Evaluator(load_pipeline(model, scheduler), setting)
        chosen = 0 if is_ladder else count_for(reuse, evaluator.executed_steps)
        judges = RayEngine(evaluator, workers, address) if engine == "ray" else InProcess(evaluator)
        with progress("schedules", at_most=True) as tell:
            common: dict[str, Any] = {"cache": cache, "progress": tell}
            if method == "phast":
                starts, rank = _predicted(analysis, evaluator, chosen)
                result: Any = phast(
                    evaluator.pipe, steps, chosen, evaluator.setting.prompts, objective=objective, variant=variant,
                    starts=starts, rank=rank, restarts=restarts, budget=budget, patience=patience, seed=seed,
                    engine=judges, **common,
                )  # fmt: skip
            elif method == "exhaustive":
                result = exhaustive(judges, chosen, objective=objective, **common)
            else:
                seconds = None if budget_time is None else 60 * budget_time
                result = ladder(
                    judges, by=by, budget=budget, budget_time=seconds, memory_budget=objective.memory_budget,
                    seed=seed, confirm=others, **common,
                )  # fmt: skip
        picked = _picked(result, floor, time, cache) if is_ladder else result
        if not is_ladder and not objective.reaches(result.history[-1].metric):
            raise ValueError(
                f"none of {counted(result.evaluations, 'schedule')} reaches --floor {floor:g}: the best has "
                f"{objective.shown(result.history[-1].metric)}; nothing is saved but the scores in {cache}"
            )
        picked.policy.save(out_path)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
        return
    out.print(_front_table(result, picked) if is_ladder else _table(result, objective))
    judged = evaluator.calls
    replayed = f" ({judged.saved:.0%} of their denoiser calls replayed)" if judged.schedules else ""
    of_cache = result.evaluations - judged.schedules
    out.print(f"{counted(judged.schedules, 'schedule')} judged now{replayed}, {of_cache} from the cache.")
    if is_ladder and picked.steps != steps:
        out.print(f"Run the saved policy with --steps {picked.steps}.")
    faint(f"{out_path}; scores in {cache}")


def _picked(front: Any, floor: float | None, time: float | None, cache: Path) -> Any:
    """The point of the front that is asked for."""
    try:
        return front.pick(floor, time)
    except AttnReuseError as error:
        raise AttnReuseError(f"{error}; nothing is saved but the scores in {cache}") from error


def _kept_back(setting: Any, confirm: int) -> tuple[Any, Any]:
    """The setting without its last pictures, and one with these alone; None where there are none."""
    if not confirm:
        return setting, None
    first = len(setting.prompts) - confirm
    if first < 1:
        raise ValueError(
            f"--confirm {confirm} leaves no picture to search with: there are {len(setting.prompts)} prompts"
        )
    kept = replace(setting, prompts=setting.prompts[first:], seed=setting.seed + first)
    return replace(setting, prompts=setting.prompts[:first]), kept


def _kept(cache: Path) -> str:
    """What an interrupt leaves."""
    if not cache.exists():
        return "nothing was judged yet"
    return f"the scores so far are in {cache}; run the same command again to go on"


def _predicted(analysis: Path | None, evaluator: Any, reuse: int) -> tuple[list[Any], Any]:
    """Where a search starts, and how it ranks: by an analysis; else by noise levels; else from HURRY, unranked."""
    from attnreuse.planning.rows import best_row, level_error, schedule_error

    if analysis is None and evaluator.levels is None:
        return [], None
    if analysis is None:
        error, executed = level_error(evaluator.levels, evaluator.influence), evaluator.executed_steps
        row = best_row(executed, reuse, error)
        return [evaluator.policy(row, "start")], lambda policy: schedule_error(policy.reuse, error)
    from attnreuse.policy import hurry
    from attnreuse.study.findings import Analysis, best_predicted, predict

    measured = Analysis.load(analysis)
    made_for, here = (measured.scheduler, measured.steps), (evaluator.scheduler, evaluator.executed_steps)
    if made_for != here:
        raise ValueError(
            f"--analysis {analysis} is of {made_for[0]}, {made_for[1]} steps; this run: {here[0]}, {here[1]}"
        )
    starts = [best_predicted(measured, reuse), hurry(measured.steps, reuse, None)]
    return starts, lambda policy: predict(policy, measured)


def _front_table(front: Any, picked: Any) -> Table:
    """The points of a front, and which of them is saved."""
    about = f"stopped at: {front.stopped}; PSNR of {counted(front.pictures, 'picture')}"
    table = Table(title=f"{about}\ntime, {front.times}, as a share of {front.full_s:.2f} s", title_justify="left")
    for column in ("time", "PSNR, dB", "steps", "schedule", ""):
        table.add_column(column, justify="right" if column in ("time", "PSNR, dB", "steps") else "left")
    for point in front.points:
        does = "reuses" if point.policy.reuse_steps else "computes all"
        saved = "saved" if point is picked else ""
        table.add_row(f"{point.time:.3f}", f"{point.psnr_db:.2f}", str(point.steps), does, saved)
    return table


def _table(result: Any, objective: Any) -> Table:
    """Improvements of a step-wise search."""
    table = Table(title=f"{result.policy.name}\nstopped at: {result.stopped}", title_justify="left")
    metric = ", ".join(filter(None, (objective.metric.upper(), objective.unit)))
    for column in ("schedule", metric, "after"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    for step in result.history:
        table.add_row(step.reuse, f"{step.metric:.3f}", str(step.evaluations))
    return table
