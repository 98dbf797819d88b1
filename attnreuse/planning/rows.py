"""Rows: what a layer does at each executed step. How good a row is, and which is best. No tensors here.

A step computes (False), reuses the map (True), or holds the output of the step before ("H"). As text ".RH".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np

Row = tuple["bool | Literal['H']", ...]
ReuseError = Callable[[int, int], float]  # (step that captured, step that reuses) to the predicted error
Influence = Sequence[float] | Literal["even"]  # of each step; "even": a reuse of the level before harms alike anywhere
SAME = 1e-3  # levels that differ less are one level


def strip(row: Iterable[bool | str]) -> str:
    """A row as text: "." where a step computes, "R" where it reuses, "H" where it holds."""
    return "".join("H" if step == "H" else ".R"[step] for step in row)


def parse(row: Sequence[bool | int | str]) -> Row:
    """A row from its text, or from booleans (or 0 and 1) and "H".

    Raises:
        ValueError: something else.
    """
    values = {".": False, "R": True, "H": "H", False: False, True: True}
    try:
        if isinstance(row, dict):
            raise TypeError
        return tuple(values[row[i]] for i in range(len(row)))
    except (KeyError, TypeError):
        raise ValueError(f"a row must hold booleans, or the letters '.', 'R' and 'H', got {row!r}") from None


def holding(row: Row) -> Row:
    """`row` with the output held wherever it reuses: what a layer does whose values never change."""
    return tuple("H" if step else False for step in row)


def trades(row: Row) -> list[Row]:
    """The rows in which a cached step and a computed step (not the first) trade places: Hamming distance two."""
    on = [i for i, step in enumerate(row) if step]
    off = [i for i, step in enumerate(row) if not step and i > 0]
    return [tuple(row[{i: j, j: i}.get(k, k)] for k in range(len(row))) for i, j in itertools.product(on, off)]


def count_of(share: float, steps: int) -> int:
    """Steps that a share of `steps` is, at most all but the first; halves go down, since pairs of calls want that."""
    return max(0, min(math.ceil(share * steps - 0.5 - 1e-9), steps - 1))


def room_for(steps: int, age: int) -> int:
    """Most steps that can reuse maps at most `age` steps old."""
    return steps - -(-steps // (age + 1))


def level_error(levels: Sequence[float], influence: Influence | None = None) -> ReuseError:
    """The error that a reuse is predicted to cause, from what the scheduler says alone.

    A map drifts with the distance in level (log-SNR). What that does to the denoiser's output moves the final sample
    by the influence of the call (:func:`~attnreuse.planning.levels.influences`). Where that is not known,
    ``sqrt(alpha_bar)`` stands for it: where noise prevails, the output moves the sample little (for Gaussian data of
    unit variance this is the exact factor of the probability-flow ODE). Where it is "even", the distance is counted in
    levels.
    """
    if influence == "even":
        place = _places(levels)
        return lambda captured, step: float(abs(place[step] - place[captured]))
    weights = _sqrt_alpha_bar(levels) if influence is None else influence
    return lambda captured, step: weights[step] * abs(levels[step] - levels[captured])


def call_age_error(levels: Sequence[float]) -> ReuseError:
    """:func:`level_error` with the age of a map counted in calls: what distances in level are judged against."""
    weights = _sqrt_alpha_bar(levels)
    return lambda captured, step: weights[step] * (step - captured)


def _places(levels: Sequence[float]) -> list[int]:
    """Of each step: how many times the level has changed before it."""
    changed = (abs(b - a) > SAME for a, b in itertools.pairwise(levels))
    return list(itertools.accumulate(changed, initial=0))


def _sqrt_alpha_bar(levels: Sequence[float]) -> list[float]:
    return [1 / math.sqrt(1 + math.exp(min(700.0, -level))) for level in levels]


def schedule_error(row: Sequence[bool], error: ReuseError) -> float:
    """The sum over the reuses of a schedule; a held output counts as a reuse."""
    total, captured = 0.0, 0
    for step, reuses in enumerate(row):
        if reuses:
            total += error(captured, step)
        else:
            captured = step
    return total


def best_row(steps: int, reuse: int, error: ReuseError) -> Row:
    """The schedule with `reuse` reuses of the least summed error, by dynamic programming.

    Raises:
        ValueError: more reuses than fit.
    """
    if not 0 <= reuse < max(steps, 1):
        raise ValueError(f"reuse must be between 0 and {steps - 1} for {steps} steps, got {reuse}")
    best = np.full((steps + 1, reuse + 1), np.inf)  # least error from a computed step on, by reuses that are left
    best[steps, 0] = 0
    run = np.zeros((steps, reuse + 1), dtype=int)  # reuses of the map of that step
    for at in range(steps - 1, -1, -1):
        cost = 0.0
        for length in range(min(reuse, steps - 1 - at) + 1):
            cost += error(at, at + length) if length else 0.0
            found = cost + best[at + length + 1, : reuse + 1 - length]
            better = found < best[at, length:]
            np.copyto(best[at, length:], found, where=better)
            np.copyto(run[at, length:], length, where=better)
    row, left = [], reuse
    while len(row) < steps:
        length = int(run[len(row), left])
        row += [False] + [True] * length
        left -= length
    return tuple(row)


def stretched(row: Row, steps: int, levels: Sequence[float] | None = None, to: Sequence[float] | None = None) -> Row:
    """`row` for another number of steps: what follows a computed step is what follows it around the same place.

    Args:
        levels, to: noise levels of the row's steps and of the others; without them steps are placed evenly.
    """
    tails: list[Row] = []  # for each step: what follows the latest computed one
    for i, step in enumerate(row):
        tails.append(tails[-1] if step else tuple(itertools.takewhile(bool, row[i + 1 :])))

    def nearest(at: int) -> int:
        share = (at + 0.5) * len(row) / steps - 0.5
        if levels is None or to is None:
            return min(len(row) - 1, round(share))
        return min(range(len(row)), key=lambda i: (round(abs(levels[i] - to[at]) / SAME), abs(i - share)))

    out: list[bool | str] = []
    while len(out) < steps:
        out += [False, *tails[nearest(len(out))]]
    return tuple(out[:steps])
