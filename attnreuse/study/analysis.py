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
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from attnreuse.binding.denoiser import find_denoiser
from attnreuse.binding.processors import ReuseAttnProcessor, attention_layers
from attnreuse.binding.session import enable
from attnreuse.errors import AttnReuseError
from attnreuse.maps.formats import AttentionMap, format_named
from attnreuse.planning.rows import ReuseError, best_row, call_age_error, level_error, schedule_error, strip
from attnreuse.policy import Action, Policy
from attnreuse.progress import Progress, silent
from attnreuse.study.evaluate import Evaluator, Sampled
from attnreuse.study.metrics import psnr_each

ROWS = 64  # query rows per head at which drift is measured
Visit = Callable[[int, str, Tensor], Tensor | None]  # (step, layer, map [B, H, M, N]) to the map to apply instead
Advance = Callable[[str], None]  # called with what was measured
FEWEST = 3  # executed steps that a growth can be fitted to, and schedules that a rank can be of


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Growth(_Part):
    """Distance of the final latent after a perturbation at one step, and the fit ``exp(offset + rate (T - t))``.

    Attributes:
        perturbation: "reuse" (of the map one step older) or "noise" (of relative size `size`).
        steps: where the perturbation was made.
        distances: geometric mean over pictures of ``|x - full| / |full|`` of the final latent.
        psnr_db: of the pictures.
        rate, rate_low, rate_high: growth per step, with its 95 % confidence interval.
        offset: of the fit.
        r2: share of the variance of the logarithm that it explains.
        misfits: steps that lie more than two standard deviations off the fit.
    """

    perturbation: Literal["reuse", "noise"]
    size: float | None
    steps: list[int]
    distances: list[float]
    psnr_db: list[float]
    rate: float
    rate_low: float
    rate_high: float
    offset: float
    r2: float
    misfits: list[int]

    def fitted(self, step: int, steps: int) -> float:
        """The fit's distance for a perturbation at `step` of `steps`."""
        return math.exp(self.offset + self.rate * (steps - step))


class Drift(_Part):
    """How far maps of two steps are apart: ``[step][lag - 1]`` for each layer, None before the first step.

    Attributes:
        frobenius: ``|P_t - P_s| / |P_t|``.
        variation: total variation per row, ``mean(sum |P_t - P_s|) / 2``.
    """

    frobenius: dict[str, list[list[float | None]]]
    variation: dict[str, list[list[float | None]]]

    def between(self, then: int, now: int, layer: str | None = None) -> float:
        """Relative Frobenius distance of the maps of two steps, of a layer or the mean over all."""
        tables = [self.frobenius[layer]] if layer else list(self.frobenius.values())
        return sum(table[now][now - then - 1] or 0.0 for table in tables) / len(tables)


class Staleness(_Part):
    """Distance of the final latent when step `steps[i]` alone applies the maps of `ages[j]` steps before."""

    steps: list[int]
    ages: list[int]
    distances: list[list[float | None]]


class Prediction(_Part):
    """Spearman correlation, over random schedules, of predicted with measured distance of the final latent.

    Attributes:
        schedules: the rows judged.
        measured, predicted: distances.
        rank: correlation of :func:`predict`, from measured growth and drift.
        rank_level: of the rule ``hurry(reuse=...)``, from what the scheduler says alone; None where that is nothing.
        rank_age: of the same with ages counted in calls.
        rank_hurry: of "latest is best" (mean reuse step).
        rank_growth: of the growth fit alone, without drift.
    """

    schedules: list[str]
    measured: list[float]
    predicted: list[float]
    rank: float
    rank_level: float | None = None
    rank_age: float | None = None
    rank_hurry: float
    rank_growth: float


class Analysis(_Part):
    """What :func:`analyze` measured on one model, scheduler and step count; a JSON file."""

    model: str
    scheduler: str
    steps: int
    levels: tuple[float, ...] | None = None
    influence: tuple[float, ...] | None = None
    images: int
    growth: Growth
    noise: Growth
    drift: Drift
    staleness: Staleness
    prediction: Prediction | None = None
    version: Literal[1] = 1

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        Path(path).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Analysis:
        """Read an analysis file.

        Raises:
            ValueError: not such a file.
        """
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except ValidationError as error:
            raise ValueError(f"{path} is not an analysis file: {error.errors()[0]['msg']}") from None


# -- prediction


def predict(policy: Policy, analysis: Analysis) -> float:
    """Predicted relative distance of the final latent under `policy`, from growth and drift.

    A reuse at step t of the map of step s is taken to do what was measured for a reuse of the map of
    step t - 1, times the ratio of the two drifts; what several reuses do adds up.

    Raises:
        ValueError: an analysis of another number of steps.
    """
    if policy.steps != analysis.steps:
        raise ValueError(f"the analysis is of {analysis.steps} executed steps, the policy for {policy.steps}")
    layers = list(analysis.drift.frobenius) if isinstance(policy.reuse, dict) else [None]
    errors = [schedule_error(policy.row(layer or ""), measured_error(analysis, layer)) for layer in layers]
    return sum(errors) / len(layers)


def measured_error(analysis: Analysis, layer: str | None = None) -> ReuseError:
    """The error of a reuse as :func:`predict` takes it, of a layer or the mean over all: growth times drift."""
    measured = dict(zip(analysis.growth.steps, analysis.growth.distances, strict=True))
    gains = {step: found / max(analysis.drift.between(step - 1, step), 1e-12) for step, found in measured.items()}
    known: dict[tuple[int, int], float] = {}

    def error(captured: int, step: int) -> float:
        if (captured, step) not in known:
            known[captured, step] = gains[step] * analysis.drift.between(captured, step, layer)
        return known[captured, step]

    return error


def best_predicted(analysis: Analysis, reuse: int) -> Policy:
    """The schedule with `reuse` reuse steps that is predicted best."""
    row = best_row(analysis.steps, reuse, measured_error(analysis))
    return Policy(steps=analysis.steps, reuse=row, name=f"predicted({analysis.steps},{reuse})", levels=analysis.levels)


# -- measurements


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
    schedules = min(schedules, math.comb(steps - 1, count)) if schedules else 0
    if 0 < schedules < FEWEST:
        raise ValueError(
            f"a rank needs at least {FEWEST} schedules, or none: got {schedules} of {count} reuses in {steps} steps"
        )
    ages = [age for age in (1, 2, 4, 8) if age < steps]
    places = sorted({min(steps - 1, max(1, round(steps * share))) for share in (0.25, 0.5, 0.75)} | {steps - 1})
    of, done = 2 * (steps - 1) + 1 + len(places) * len(ages) + schedules, itertools.count(1)

    def advance(now: str) -> None:
        progress(next(done), of, now)

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
            sampled = evaluator.run(lambda start, place=place: probing(evaluator, {place}, _noisy(noise, start)))
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
            sampled = evaluator.run(
                lambda start, at=place, age=age: probing(evaluator, {at - age, at}, _stale(at, age))
            )
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


# -- probes


class ProbeAttnProcessor(ReuseAttnProcessor):
    """Shows `visit` the layer's map at the steps wanted, and applies what it gives back, if anything."""

    def __init__(self, original: Any, visit: Callable[[Tensor], Tensor | None]):
        super().__init__(original)
        self.visit = visit

    def _fits(self, attn: Any, hidden_states: Tensor, context: Tensor | None) -> bool:
        return True  # it makes a map as the layer comes

    def _capture(self, attn: Any, hidden_states: Tensor, context: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        b, h, n, _ = value.shape
        self.slot = AttentionMap.empty(format_named("fp32"), (b, h, hidden_states.shape[1], n), value.device)
        output = super()._capture(attn, hidden_states, context, value, mask)
        instead = self.visit(self.slot.dense())
        return output if instead is None else instead.to(value.dtype) @ value


@contextmanager
def probing(evaluator: Evaluator, steps: set[int], visit: Visit) -> Iterator[None]:
    """Within, `visit` sees every served layer's map at these executed steps, and may replace it."""
    denoiser = find_denoiser(evaluator.pipe)
    modules = {name: attention_layers(denoiser)[name] for name in evaluator.served()}
    before = {name: module.processor for name, module in modules.items()}
    never = Policy(steps=evaluator.executed_steps, reuse=[False] * evaluator.executed_steps)

    def probe(name: str) -> ProbeAttnProcessor:
        return ProbeAttnProcessor(before[name], lambda attn_map: visit(session.tick.step, name, attn_map))

    probes = {name: probe(name) for name in modules}

    def arm(module: Any, args: tuple) -> None:
        for processor in probes.values():
            processor.did = None
            processor.action = (Action.CAPTURE if session.tick.step in steps else Action.COMPUTE).value

    with enable(evaluator.pipe, never) as session:  # which tells the step, and leaves the probes alone
        hook = denoiser.register_forward_pre_hook(arm)
        try:
            for name, module in modules.items():
                module.set_processor(probes[name])
            yield
        finally:
            hook.remove()
            for name, module in modules.items():
                module.set_processor(before[name])


def _noisy(size: float, seed: int) -> Visit:
    """Adds noise of relative Frobenius `size`, proportional to the map, that keeps the sums of its rows."""

    def visit(step: int, name: str, attn_map: Tensor) -> Tensor:
        g = torch.Generator().manual_seed(seed * 1_000 + step + sum(map(ord, name)))
        change = attn_map * torch.randn(attn_map.shape, generator=g).to(attn_map.device)
        change -= attn_map * change.sum(-1, keepdim=True)
        return attn_map + change * (size * attn_map.norm() / change.norm())

    return visit


def _stale(place: int, age: int) -> Visit:
    """Keeps the maps of step `place - age`, and applies them at `place`."""
    held: dict[str, Tensor] = {}

    def visit(step: int, name: str, attn_map: Tensor) -> Tensor | None:
        if step == place:
            return held.pop(name)
        held[name] = attn_map.clone()
        return None

    return visit


def _scipy_fit() -> tuple[Any, Any]:
    try:
        from scipy.stats import linregress, t
    except ImportError as error:
        raise AttnReuseError("the analysis needs scipy: pip install 'attnreuse[eval]'") from error
    return linregress, t
