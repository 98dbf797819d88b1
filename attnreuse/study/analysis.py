"""Why a schedule is good or bad: how errors grow, how maps drift, what age costs, and a prediction from both.

The paper's model says that a perturbation made at step t of T grows as ``exp(rate (T - t))``, whatever
made it, hence "reuse late". Here each part of that is measured, where it fails is said, and the drift of
the maps, which it ignores, is put beside it.

Source: arXiv 2401.01008 (error growth, HURRY); drift, staleness and the prediction are ours.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnreuse.errors import AttnReuseError
from attnreuse.planning.rows import call_age_error, level_error, schedule_error, strip
from attnreuse.policy import Policy
from attnreuse.progress import Progress, counted, silent
from attnreuse.study.evaluate import Evaluator, Sampled
from attnreuse.study.findings import Analysis, Drift, Growth, Prediction, Staleness, predict
from attnreuse.study.metrics import psnr_each
from attnreuse.study.probe import noisy, probing, stale

ROWS = 64  # query rows per head at which drift is measured
Advance = Callable[[str], None]  # called with what was measured
FEWEST = 3  # executed steps that a growth can be fitted to, and schedules that a rank can be of


def analyze(
    evaluator: Evaluator, *, schedules: int = 100, reuse: int | None = None, noise: float = 0.05,
    seed: int = 0, progress: Progress = silent,
) -> Analysis:  # fmt: skip
    """Measure growth, drift and staleness, then test the prediction on random schedules.

    Args:
        schedules: how many, at least 3; 0: none.
        reuse: reuse steps of each; None: half of the steps.
        noise: relative size of the perturbation of the maps.
        progress: called with the runs done, how many there are, and what the last one measured.

    Raises:
        ValueError: too few steps or schedules, or more reuses than fit.
    """
    steps = evaluator.executed_steps
    count = steps // 2 if reuse is None else reuse
    if steps < FEWEST:
        raise ValueError(f"an analysis needs a run of at least {FEWEST} executed steps, got {steps}")
    if schedules and not 1 <= count < steps:
        raise ValueError(f"reuse must be between 1 and {steps - 1} for {steps} executed steps, got {count}")
    if 0 < schedules < FEWEST:
        raise ValueError(f"schedules must be at least {FEWEST}, or 0 for no rank, got {schedules}")
    there = math.comb(steps - 1, count) if schedules else 0
    if schedules and there < FEWEST:
        raise ValueError(
            f"schedules must be 0, for no rank, where there are fewer than {FEWEST}: {counted(count, 'reuse')} in "
            f"{steps} steps can stand in {counted(there, 'way')} (take more steps, or another reuse)"
        )
    schedules = min(schedules, there)
    ages = [age for age in (1, 2, 4, 8) if age < steps]
    places = sorted({min(steps - 1, max(1, round(steps * share))) for share in (0.25, 0.5, 0.75)} | {steps - 1})
    of, done = 2 * (steps - 1) + 1 + len(places) * len(ages) + schedules, itertools.count(1)

    def advance(now: str) -> None:
        progress(next(done), of, now)

    progress(0, of, "full steps")
    parts = {
        "growth": growth(evaluator, advance=advance),
        "noise": growth(evaluator, noise=noise, advance=advance),
        "drift": drift(evaluator),
    }
    advance("drift")
    parts["staleness"] = staleness(evaluator, places, ages, advance=advance)
    about = {"model": evaluator.model, "scheduler": evaluator.scheduler, "steps": steps, "levels": evaluator.levels}
    about["influence"] = evaluator.influence
    found = Analysis(**about, images=len(evaluator.setting.prompts), **parts)
    if not schedules:
        return found
    return found.model_copy(update={"prediction": check_prediction(evaluator, found, schedules, count, seed, advance)})


def growth(evaluator: Evaluator, *, noise: float | None = None, advance: Advance = lambda now: None) -> Growth:
    """Perturb one step at a time, by reuse of the last step's maps or by `noise` of that relative size."""
    linregress, t = _scipy_fit()
    steps, full = evaluator.executed_steps, evaluator.full
    places, distances, quality = list(range(1, steps)), [], []
    for place in places:
        if noise is None:
            sampled = evaluator.sample(Policy(steps=steps, reuse=[step == place for step in range(steps)]))
        else:
            sampled = evaluator.run(lambda start, place=place: probing(evaluator, {place}, noisy(noise, start)))
        distances.append(distance(sampled, full))
        quality.append(float(np.mean(psnr_each(sampled.pictures, full.pictures))))
        advance(f"{'reuse' if noise is None else 'noise'} at step {place}")
    x, y = [steps - place for place in places], np.log(np.maximum(distances, 1e-12))
    fit = linregress(x, y)
    residuals = y - (fit.intercept + fit.slope * np.array(x))
    margin = float(t.ppf(0.975, max(1, len(x) - 2)) * fit.stderr)
    far = 2 * residuals.std(ddof=min(2, len(x) - 1))
    return Growth(
        perturbation="reuse" if noise is None else "noise",
        size=noise,
        steps=places,
        distances=distances,
        psnr_db=quality,
        rate=fit.slope,
        rate_low=fit.slope - margin,
        rate_high=fit.slope + margin,
        offset=fit.intercept,
        r2=fit.rvalue**2,
        misfits=[place for place, r in zip(places, residuals, strict=True) if abs(r) > far],
    )


def drift(evaluator: Evaluator) -> Drift:
    """Distances of the maps of every two steps, at 64 query rows of each head, mean over pictures and heads."""
    steps = evaluator.executed_steps
    totals: dict[str, np.ndarray] = {}  # layer to [2, steps, steps]
    held: dict[str, list[Tensor]] = {}
    batches = 0

    def visit(step: int, name: str, attn_map: Tensor) -> None:
        m = attn_map.shape[2]
        rows = torch.linspace(0, m - 1, min(ROWS, m), device=attn_map.device).round().long()
        now = attn_map[:, :, rows].clone()  # [B, H, R, N]
        table = totals.setdefault(name, np.zeros((2, steps, steps)))
        for then, before in enumerate(held.setdefault(name, [])):
            change = now - before
            relative = change.square().sum((-2, -1)).sqrt() / now.square().sum((-2, -1)).sqrt()  # [B, H]
            table[:, step, step - then - 1] += (relative.mean().item(), change.abs().sum(-1).mean().item() / 2)
        held[name].append(now)

    @contextmanager
    def around(start: int) -> Iterator[None]:
        nonlocal batches
        held.clear()
        batches += 1
        with probing(evaluator, set(range(steps)), visit):
            yield

    evaluator.run(around)
    frobenius, variation = (
        {
            name: [
                [float(v) if lag < step else None for lag, v in enumerate(row)] for step, row in enumerate(tables[i])
            ]
            for name, tables in ((n, t / batches) for n, t in totals.items())
        }
        for i in range(2)
    )
    return Drift(frobenius=frobenius, variation=variation)


def staleness(
    evaluator: Evaluator,
    places: list[int],
    ages: list[int],
    *,
    advance: Advance = lambda now: None,
) -> Staleness:
    """Apply, at one step alone, maps of an earlier step; every other step computes its own."""
    table: list[list[float | None]] = []
    for place in places:
        row: list[float | None] = []
        for age in ages:
            if age > place:
                row.append(None)
                advance(f"no map of age {age} at step {place}")
                continue
            sampled = evaluator.run(lambda start, at=place, age=age: probing(evaluator, {at - age, at}, stale(at, age)))
            row.append(distance(sampled, evaluator.full))
            advance(f"a map of age {age} at step {place}")
        table.append(row)
    return Staleness(steps=places, ages=ages, distances=table)


def check_prediction(
    evaluator: Evaluator,
    analysis: Analysis,
    schedules: int,
    reuse: int,
    seed: int = 0,
    advance: Advance = lambda now: None,
) -> Prediction:
    """Measure random schedules with `reuse` reuse steps each, and rank them by what predicts them."""
    from scipy.stats import spearmanr

    rng, steps = random.Random(seed), evaluator.executed_steps
    rows = set()
    while len(rows) < min(schedules, math.comb(steps - 1, reuse)):
        chosen = rng.sample(range(1, steps), reuse)
        rows.add(tuple(step in chosen for step in range(steps)))
    ordered = sorted(rows)
    policies = [Policy(steps=steps, reuse=row) for row in ordered]
    measured = []
    for policy in policies:
        measured.append(distance(evaluator.sample(policy), evaluator.full))
        advance(f"schedule {len(measured)} of {len(policies)}")
    predicted = [predict(policy, analysis) for policy in policies]
    late = [-sum(step for step, on in enumerate(row) if on) for row in ordered]
    grown = [sum(analysis.growth.fitted(step, steps) for step, on in enumerate(row) if on) for row in ordered]

    def rank(scores: list[float]) -> float:
        return float(spearmanr(scores, measured).statistic)

    by_level = by_age = None
    if analysis.levels is not None:
        error = level_error(analysis.levels, analysis.influence)
        by_level = rank([schedule_error(row, error) for row in ordered])
        by_age = rank([schedule_error(row, call_age_error(analysis.levels)) for row in ordered])
    return Prediction(
        schedules=[strip(row) for row in ordered],
        measured=measured,
        predicted=predicted,
        rank=rank(predicted),
        rank_level=by_level,
        rank_age=by_age,
        rank_hurry=rank(late),
        rank_growth=rank(grown),
    )


def distance(sampled: Sampled, full: Sampled) -> float:
    """Geometric mean over the pictures of the relative distance of the final latents."""
    difference = (sampled.latents - full.latents).flatten(1).double().norm(dim=1)
    relative = difference / full.latents.flatten(1).double().norm(dim=1)  # [P]
    return float(relative.clamp(min=1e-12).log().mean().exp())


def _scipy_fit() -> tuple[Any, Any]:
    try:
        from scipy.stats import linregress, t
    except ImportError as error:
        raise AttnReuseError("the analysis needs scipy: pip install 'attnreuse[eval]'") from error
    return linregress, t
