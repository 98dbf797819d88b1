"""What the ladder judges: runs of so many steps in which each group of layers has a row of its own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from attnreuse.binding.denoiser import find_denoiser, layer_kinds
from attnreuse.planning.rows import Influence, Row, best_row, level_error
from attnreuse.study.evaluate import Evaluator

SHARES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)  # of the steps that a scanned schedule reuses
Letter = bool | Literal["H"]  # computes, reuses, holds
Rows = dict[str, Row]  # by group of layers


class Rung(NamedTuple):
    """A row of one group alone; what mean squared error and what share of the full run's time (negative) it adds."""

    row: Row
    lost: float
    time: float


@dataclass(frozen=True)
class Candidate:
    """A run of `steps` (``num_inference_steps``), and the rows of the groups of layers that not only compute."""

    steps: int
    rows: tuple[tuple[str, Row], ...] = ()

    @classmethod
    def of(cls, steps: int, rows: Rows) -> Candidate:
        """The one candidate of these rows."""
        return cls(steps, tuple(sorted((group, row) for group, row in rows.items() if any(row))))

    def changed(self, group: str, steps: int, letters: Sequence[Letter], rng: random.Random) -> Candidate:
        """One step of the `group`'s row of executed `steps` has another of `letters`, or two steps trade places."""
        rows = dict(self.rows)
        row = list(rows.get(group, (False,) * steps))
        if steps > 1:
            step, other = rng.randrange(1, steps), rng.randrange(1, steps)
            if row[step] != row[other]:
                row[step], row[other] = row[other], row[step]
            else:
                row[step] = rng.choice([letter for letter in letters if letter != row[step]])
        return Candidate.of(self.steps, rows | {group: tuple(row)})


def layer_groups(evaluator: Evaluator, by: Literal["kind", "level", "layer"]) -> dict[str, list[str]]:
    """Served layers by "kind" (self, cross), by kind and "level" (query tokens), or each "layer" alone.

    Raises:
        ValueError: another `by`.
    """
    if by not in ("kind", "level", "layer"):
        raise ValueError(f"by must be 'kind', 'level' or 'layer', got {by!r}")
    kinds, shapes = layer_kinds(find_denoiser(evaluator.pipe)), evaluator.shapes()
    groups: dict[str, list[str]] = {}
    for name in evaluator.served():
        label = {"kind": kinds[name], "level": f"{kinds[name]}@{shapes[name].map[2]}", "layer": name}[by]
        groups.setdefault(label, []).append(name)
    return groups


def rising(steps: int, levels: Sequence[float] | None, influence: Influence | None) -> list[Row]:
    """Rows of rising savings: of least predicted error, and those that compute one step of 2, one of 3."""
    error = (lambda captured, step: step - captured) if levels is None else level_error(levels, influence)
    counts = sorted({max(1, round(share * (steps - 1))) for share in SHARES})
    rows = [best_row(steps, count, error) for count in counts]
    return list(dict.fromkeys([*rows, *(tuple(i % k > 0 for i in range(steps)) for k in (2, 3))]))


def joined(rungs: dict[str, list[Rung]]) -> list[tuple[float, Rows]]:
    """For rising prices of time: each group's row of least error and time, and the sum of their errors."""
    joint: dict[tuple, tuple[float, Rows]] = {}
    for exponent in range(-70, 11):
        price = 10 ** (exponent / 10)  # mean squared error that a full run's time is worth
        best = {group: min(found, key=lambda r: r.lost + price * r.time) for group, found in rungs.items() if found}
        best = {group: rung for group, rung in best.items() if rung.lost + price * rung.time < 0}
        if best:
            rows = {group: rung.row for group, rung in best.items()}
            joint[tuple(rows.items())] = sum(rung.lost for rung in best.values()), rows
    return list(joint.values())
