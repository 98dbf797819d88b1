"""`attnreuse analyze`: how errors grow, maps drift and age costs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from attnreuse.cli.console import clear_errors, faint, out, progress
from attnreuse.cli.inputs import check_prompts, count_for, load_pipeline, refuse_beside, setting_for, writable
from attnreuse.cli.options import (
    AsJson,
    Batch,
    Eta,
    Guidance,
    Images,
    Layers,
    Model,
    Prompts,
    Scheduler,
    Seed,
    Share,
    Steps,
)

EXAMPLES = (
    "    attnreuse analyze\n\n    attnreuse analyze --scheduler DPM --out dpm.json\n\n"
    "    attnreuse search --analysis attnreuse-analysis.json"
)


def command(
    context: typer.Context,
    model: Model = "",
    steps: Steps = 20,
    prompt: Prompts = None,
    images: Images = 4,
    seed: Seed = 2000,
    guidance: Guidance = None,
    eta: Eta = None,
    layers: Layers = None,
    scheduler: Scheduler = None,
    batch: Batch = 4,
    schedules: Annotated[
        int,
        typer.Option(min=0, help="How many random schedules test the prediction: at least 3, or 0 for no test."),
    ] = 100,
    reuse: Share = 0.5,
    noise: Annotated[float, typer.Option(min=1e-4, help="Relative size of the noise that is added to maps.")] = 0.05,
    out_path: Annotated[
        Path, typer.Option("--out", help="Where the measurements go (.json). Plots go beside it as PNG.")
    ] = Path("attnreuse-analysis.json"),
    as_json: AsJson = False,
) -> None:
    """Measure how errors grow, maps drift and age costs, and how well that predicts a schedule's error."""
    with clear_errors():
        from attnreuse.study import analysis, plots
        from attnreuse.study.evaluate import Evaluator

        check_prompts(context, model, prompt)
        if schedules == 0:
            refuse_beside(context, "--schedules 0", "reuse")
        plots.pyplot()
        writable("--out", out_path, ".json")
        figures = [out_path.with_suffix(".png"), out_path.with_name(f"{out_path.stem}-layers.png")]
        for path in figures:
            writable("--out", path)
        setting = setting_for(model, prompt, images, steps, seed, guidance, eta, "fp32", layers, batch)
        evaluator = Evaluator(load_pipeline(model, scheduler), setting)
        count = count_for(reuse, evaluator.executed_steps) if schedules else None
        with progress("runs") as tell:
            measured = analysis.analyze(evaluator, schedules=schedules, reuse=count, noise=noise, progress=tell)
        measured.save(out_path)
        for path, figure in zip(figures, (plots.analysis_figure, plots.layer_drift_figure), strict=True):
            figure(measured).savefig(path, dpi=120)
    if as_json:
        print(measured.model_dump_json(indent=2))
        return
    for table in _tables(measured):
        out.print(table)
    faint(", ".join(map(str, [out_path, *figures])))


def _tables(measured: Any) -> Iterator[Table]:
    growth = Table(title=f"growth of a perturbation at one of {measured.steps} steps, {measured.scheduler}")
    for column in ("perturbation", "rate per step", "95 % interval", "R²", "off the fit at steps"):
        growth.add_column(column)
    for g in (measured.growth, measured.noise):
        what = "reuse of the last map" if g.size is None else f"noise of relative size {g.size:g}"
        interval = f"{g.rate_low:.3f} to {g.rate_high:.3f}"
        growth.add_row(what, f"{g.rate:.3f}", interval, f"{g.r2:.2f}", ", ".join(map(str, g.misfits)) or "none")
    yield growth
    stale = Table(title="distance of the final latent when one step applies maps of this age")
    stale.add_column("step")
    for age in measured.staleness.ages:
        stale.add_column(str(age), justify="right")
    for step, distances in zip(measured.staleness.steps, measured.staleness.distances, strict=True):
        stale.add_row(str(step), *("" if d is None else f"{d:.2e}" for d in distances))
    yield stale
    if measured.prediction is not None:
        ranks = Table(
            "predicted from", title=f"rank correlation with the error of {len(measured.prediction.schedules)} schedules"
        )
        ranks.add_column("rank", justify="right")
        p = measured.prediction
        for column, rank in (
            ("growth and drift, measured (attnreuse.predict)", p.rank),
            ("noise levels (the rule hurry)", p.rank_level),
            ("the same, ages in calls", p.rank_age),
            ("growth fit alone", p.rank_growth),
            ("latest is best (the paper)", p.rank_hurry),
        ):
            ranks.add_row(column, "" if rank is None else f"{rank:.3f}")
        yield ranks
