"""Figures of analyses and comparisons (matplotlib, extra ``plot``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from attnreuse.errors import AttnReuseError
from attnreuse.measure.timing import Times
from attnreuse.progress import counted
from attnreuse.study.findings import Analysis, Growth, Prediction

INK, QUIET = "#1f2933", "#9aa5b1"


class Family(NamedTuple):
    """How methods of one kind are drawn: their `color`, and the `line` that joins their points ("": none)."""

    color: str
    line: str = ""


FAMILIES = {
    "full": Family(INK),
    "plain steps": Family(QUIET, "-"),
    "plain steps, same noise": Family(QUIET, ":"),
    "reuse": Family("#d64545"),
    "ladder": Family("#8f2d2d", "-"),
    "reuse + fewer steps": Family("#e8963c"),
    "other cache": Family("#3e7cb1"),
    "reuse + other cache": Family("#17a2b8"),
    "student": Family("#4c9a6b"),
    "student + reuse": Family("#8a5fb0"),
}
LABEL_PT, LINE_PT = 7, 9.5  # of the labels beside a plot: size, and distance of their lines


@dataclass(frozen=True)
class Spot:
    """A method in a plot of PSNR over time.

    Attributes:
        name: beside the plot, of families whose points are joined below the point; "" shows none.
        family: of ``FAMILIES``.
        time: as a share of the full run's.
        psnr, psnr_ci: mean and half-width of its 95 % confidence interval, dB; None where it is not known.
    """

    name: str
    family: str
    time: Times
    psnr: float
    psnr_ci: float | None = None


def spot_name(method: str, family: str) -> str:
    """What stands at a method's point: its name, or of joined families the number of plain steps, if anything."""
    if not FAMILIES[family].line:
        return method
    return method.partition(" ")[0] if family == "plain steps" else ""


def pareto_figure(spots: list[Spot], title: str) -> Any:
    """PSNR over time with their spreads; names stand beside the plot, with a line to their points."""
    named = [spot for spot in spots if spot.name and not FAMILIES[spot.family].line]
    height = max(4.0, len(named) * LINE_PT / 72 + 1.2)
    figure, axis = pyplot().subplots(figsize=(7.5, height), layout="constrained")
    for spot in spots:
        time, color = spot.time.median, FAMILIES[spot.family].color
        spread = [[time - spot.time.p20], [spot.time.p80 - time]]
        axis.errorbar(time, spot.psnr, spot.psnr_ci or 0, spread, "o", color=color, ms=4, elinewidth=0.7)
    for family, (color, line) in FAMILIES.items():
        joined = sorted((spot.time.median, spot.psnr, spot.name) for spot in spots if spot.family == family)
        if joined and line:
            times, psnrs, _ = zip(*joined, strict=True)
            axis.plot(times, psnrs, line, color=color, lw=1, label=family)
            for *at, name in joined:
                axis.annotate(name, at, xytext=(3, -9), textcoords="offset points", fontsize=6)
    axis.legend(fontsize=LABEL_PT, frameon=False, loc="upper left")
    axis.axvline(1, color=QUIET, lw=0.6, ls=":")
    axis.set(xlabel="time, of the full run's", ylabel="PSNR to the full run, dB")
    axis.set_title(title, loc="left")
    _name_beside(axis, named, height * 72)
    return figure


def _name_beside(axis: Any, spots: list[Spot], points: float) -> None:
    """Names in a column right of an axis of so many `points` of height, none over another."""
    low, high = axis.get_ylim()
    gap = LINE_PT / (0.8 * points)  # of the axis's height, which is about four fifths of the figure's
    spots = sorted(spots, key=lambda spot: -spot.psnr)
    heights = [(spot.psnr - low) / (high - low) for spot in spots]
    for i in range(1, len(heights)):
        heights[i] = min(heights[i], heights[i - 1] - gap)
    lift = max(0.0, -min(heights, default=0.0))  # what has sunk below the axis
    for i in reversed(range(len(heights))):
        heights[i] = max(heights[i], heights[i + 1] + gap if i + 1 < len(heights) else 0.0) if lift else heights[i]
    line = {"arrowstyle": "-", "lw": 0.5, "ls": ":", "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}
    for spot, y in zip(spots, heights, strict=True):
        color = FAMILIES[spot.family].color
        axis.annotate(
            spot.name, (spot.time.median, spot.psnr), (1.03, y), textcoords="axes fraction", fontsize=LABEL_PT,
            color=color, va="center", annotation_clip=False, arrowprops=line | {"color": color},
        )  # fmt: skip


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files only.

    Raises:
        AttnReuseError: matplotlib is missing; the message says how to get it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise AttnReuseError("plots need matplotlib: pip install 'attnreuse[eval,plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "path"})
    return plt


def analysis_figure(analysis: Analysis) -> Any:
    """Growth, drift over steps and lags, staleness, and predicted against measured, on one page."""
    panels = [["growth", "drift"], ["staleness", "prediction" if analysis.prediction else "staleness"]]
    figure, axes = pyplot().subplot_mosaic(panels, figsize=(11, 8), layout="constrained")
    _growth(axes["growth"], analysis)
    _drift(figure, axes["drift"], analysis)
    _staleness(axes["staleness"], analysis)
    if analysis.prediction:
        _prediction(axes["prediction"], analysis.prediction)
    about = f"{counted(analysis.steps, 'step')}, {counted(analysis.images, 'picture')}"
    figure.suptitle(f"{analysis.model}, {analysis.scheduler}, {about}")
    return figure


def layer_drift_figure(analysis: Analysis, lag: int = 1) -> Any:
    """Heat map of the drift of each layer's map at each step."""
    figure, axis = pyplot().subplots(figsize=(9, 0.4 * len(analysis.drift.frobenius) + 1.6), layout="constrained")
    names = list(analysis.drift.frobenius)
    rows = [[row[lag - 1] for row in analysis.drift.frobenius[name][lag:]] for name in names]  # no step has older maps
    table = np.array(rows, dtype=float)
    sides = (lag - 0.5, analysis.steps - 0.5, len(names) - 0.5, -0.5)
    image = axis.imshow(table, aspect="auto", cmap="viridis", extent=sides)
    most = names[int(np.nanargmax(np.nanmean(table, 1)))]
    axis.set(xlabel="step", yticks=range(len(names)), yticklabels=names)
    axis.set_title(f"{most} drifts most, within {counted(lag, 'step')}", loc="right")
    _at_whole_steps(axis)
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
    low, high = analysis.growth.rate_low, analysis.growth.rate_high
    grow = "grow" if low > 0 else "shrink" if high < 0 else "neither grow nor shrink"
    axis.set(xlabel="steps left after the perturbation", ylabel="distance of the final latent")
    axis.set_title(f"Errors of a reuse {grow} on the way to the end")
    _at_whole_steps(axis)
    axis.legend(fontsize=7, frameon=False)


def _drift(figure: Any, axis: Any, analysis: Analysis) -> None:
    n = analysis.steps
    table = np.full((n - 1, n - 1), np.nan)  # lag - 1, step - 1
    for step in range(1, n):
        for lag in range(1, step + 1):
            table[lag - 1, step - 1] = analysis.drift.between(step - lag, step)
    image = axis.imshow(table, origin="lower", aspect="auto", cmap="viridis", extent=(0.5, n - 0.5, 0.5, n - 0.5))
    ages = [float(np.nanmean(table[lag])) for lag in (0, n // 2)]
    axis.set(xlabel="step", ylabel="age of the map, in steps")
    axis.set_title(f"Maps one step old are off by {ages[0]:.0%}, {n // 2 + 1} steps old by {ages[1]:.0%}")
    _at_whole_steps(axis)
    _at_whole_steps(axis, "y")
    figure.colorbar(image, ax=axis, label="relative Frobenius distance")


def _staleness(axis: Any, analysis: Analysis) -> None:
    for step, distances in zip(analysis.staleness.steps, analysis.staleness.distances, strict=True):
        known = [(a, d) for a, d in zip(analysis.staleness.ages, distances, strict=True) if d is not None]
        axis.loglog(*zip(*known, strict=True), "o-", ms=4, lw=1, label=f"applied at step {step}")
    axis.set(xlabel="age of the map, in steps", ylabel="distance of the final latent", title=_of_age(analysis))
    axis.set_xticks(analysis.staleness.ages, analysis.staleness.ages)
    axis.minorticks_off()
    _one_two_five(axis.yaxis)
    axis.legend(fontsize=7, frameon=False)


def _of_age(analysis: Analysis) -> str:
    """What doubling a map's age does."""
    staleness, ages = analysis.staleness, analysis.staleness.ages
    pairs = [(i, ages.index(2 * age)) for i, age in enumerate(ages) if 2 * age in ages]
    rises = [row[j] / row[i] for row in staleness.distances for i, j in pairs if row[i] and row[j]]
    return f"Twice the age, {min(rises):.1f} to {max(rises):.1f} times the harm" if rises else "Harm by age"


def _at_whole_steps(axis: Any, which: str = "x") -> None:
    axis.locator_params(axis=which, integer=True)


def _one_two_five(ticks: Any) -> None:
    """Ticks of a logarithmic axis, close enough for a short one."""
    from matplotlib.ticker import LogLocator

    ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ticks.set_major_formatter("{x:g}")


def _prediction(axis: Any, prediction: Prediction) -> None:
    axis.loglog(prediction.predicted, prediction.measured, "o", ms=3, color=INK)
    low, high = min(prediction.predicted + prediction.measured), max(prediction.predicted + prediction.measured)
    axis.loglog([low, high], [low, high], color=QUIET, lw=1, label="as predicted")
    axis.legend(fontsize=7, frameon=False)
    _one_two_five(axis.xaxis)
    _one_two_five(axis.yaxis)
    axis.minorticks_off()
    others = f"by growth alone {prediction.rank_growth:.2f}, latest first {prediction.rank_hurry:.2f}"
    title = f"Predictions order {len(prediction.schedules)} random schedules: rank correlation {prediction.rank:.2f}"
    axis.set(xlabel="predicted distance of the final latent", ylabel="measured distance", title=f"{title}\n({others})")
