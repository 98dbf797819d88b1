"""Figures of analyses and comparisons (matplotlib, extra ``plot``)."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnreuse.errors import AttnReuseError
from attnreuse.study.findings import Analysis, Growth

INK, QUIET = "#1f2933", "#9aa5b1"


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files only.

    Raises:
        AttnReuseError: matplotlib is missing; the message says how to get it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise AttnReuseError("plots need matplotlib: pip install 'attnreuse[plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"})
    return plt


def analysis_figure(analysis: Analysis) -> Any:
    """Growth, drift over steps and lags, staleness, and predicted against measured, on one page."""
    figure, axes = pyplot().subplots(2, 2, figsize=(11, 8), layout="constrained")
    _growth(axes[0, 0], analysis)
    _drift(figure, axes[0, 1], analysis)
    _staleness(axes[1, 0], analysis)
    _prediction(axes[1, 1], analysis)
    figure.suptitle(f"{analysis.model}, {analysis.scheduler}, {analysis.steps} steps, {analysis.images} pictures")
    return figure


def layer_drift_figure(analysis: Analysis, lag: int = 1) -> Any:
    """Heat map of the drift of each layer's map at each step."""
    figure, axis = pyplot().subplots(figsize=(9, 0.4 * len(analysis.drift.frobenius) + 1.6), layout="constrained")
    names = list(analysis.drift.frobenius)
    table = np.array([[row[lag - 1] for row in analysis.drift.frobenius[name]] for name in names], dtype=float)
    image = axis.imshow(table, aspect="auto", cmap="viridis")
    axis.set(xlabel="step", yticks=range(len(names)), yticklabels=names, title=f"drift of the maps over {lag} step(s)")
    figure.colorbar(image, ax=axis, label="relative Frobenius distance")
    return figure


def _growth(axis: Any, analysis: Analysis) -> None:
    def draw(growth: Growth, color: str, label: str) -> None:
        left = [analysis.steps - step for step in growth.steps]
        axis.semilogy(left, growth.distances, "o", color=color, ms=4, label=label)
        axis.semilogy(left, [growth.fitted(step, analysis.steps) for step in growth.steps], color=color, lw=1)

    for growth, color, what in (
        (analysis.growth, "#d64545", "reuse at one step"),
        (analysis.noise, "#3e7cb1", f"noise of size {analysis.noise.size:g}"),
    ):
        fit = f"rate {growth.rate:.2f} ({growth.rate_low:.2f} to {growth.rate_high:.2f}), R² {growth.r2:.2f}"
        draw(growth, color, f"{what}: {fit}")
    axis.set(xlabel="steps left after the perturbation", ylabel="distance of the final latent", title="growth")
    axis.legend(fontsize=7, frameon=False)


def _drift(figure: Any, axis: Any, analysis: Analysis) -> None:
    n = analysis.steps
    table = np.full((n - 1, n), np.nan)  # lag - 1, step
    for step in range(1, n):
        for lag in range(1, step + 1):
            table[lag - 1, step] = analysis.drift.between(step - lag, step)
    image = axis.imshow(table, origin="lower", aspect="auto", cmap="viridis", extent=(-0.5, n - 0.5, 0.5, n - 0.5))
    axis.set(xlabel="step", ylabel="age of the map, in steps", title="drift of the maps, mean over layers")
    figure.colorbar(image, ax=axis, label="relative Frobenius distance")


def _staleness(axis: Any, analysis: Analysis) -> None:
    for step, distances in zip(analysis.staleness.steps, analysis.staleness.distances, strict=True):
        known = [(a, d) for a, d in zip(analysis.staleness.ages, distances, strict=True) if d is not None]
        axis.loglog(*zip(*known, strict=True), "o-", ms=4, lw=1, label=f"applied at step {step}")
    axis.set(xlabel="age of the map, in steps", ylabel="distance of the final latent", title="staleness")
    axis.set_xticks(analysis.staleness.ages, analysis.staleness.ages)
    axis.minorticks_off()
    axis.legend(fontsize=7, frameon=False)


def _prediction(axis: Any, analysis: Analysis) -> None:
    found = analysis.prediction
    if found is None:
        axis.set_axis_off()
        return
    axis.loglog(found.predicted, found.measured, "o", ms=3, color=INK)
    low, high = min(found.predicted + found.measured), max(found.predicted + found.measured)
    axis.loglog([low, high], [low, high], color=QUIET, lw=1)
    others = f"growth fit {found.rank_growth:.2f}; latest is best {found.rank_hurry:.2f}"
    ranks = f"rank correlation {found.rank:.2f}; {others}"
    axis.set(xlabel="predicted distance", ylabel="measured", title=f"{len(found.schedules)} random schedules\n{ranks}")
