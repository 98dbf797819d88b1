"""What an analysis found, as a JSON file; and the error of a schedule that follows from it."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import ConfigDict

from attnreuse.planning.rows import ReuseError, best_row, schedule_error
from attnreuse.policy import Policy
from attnreuse.results import Result


class Growth(Result):
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


class Drift(Result):
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


class Staleness(Result):
    """Distance of the final latent when step `steps[i]` alone applies the maps of `ages[j]` steps before."""

    steps: list[int]
    ages: list[int]
    distances: list[list[float | None]]


class Prediction(Result):
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


class Analysis(Result):
    """What :func:`analyze` measured on one model, scheduler and step count; a JSON file."""

    model_config = ConfigDict(extra="forbid")
    file_kind: ClassVar[str] = "an analysis"
    model: str
    scheduler: str
    steps: int
    levels: tuple[float, ...] | None = None
    influence: tuple[float, ...] | Literal["even"] | None = None
    images: int
    growth: Growth
    noise: Growth
    drift: Drift
    staleness: Staleness
    prediction: Prediction | None = None
    version: Literal[1] = 1


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
