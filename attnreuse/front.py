"""The ladder: groups of layers compute, reuse or hold at each of all steps, or of fewer; the front of time and quality.

Fewer steps are judged by themselves, and each group of layers alone under schedules of rising savings. Errors are taken
to add (as mean squares): so the joint schedules that should be best are known, and these are judged. Then points of the
front are changed in one place at a time as long as the budget lasts. The front is of judged schedules alone; its times
follow from costs measured on this machine.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from attnreuse import costs
from attnreuse.denoiser import holding_layers, layer_kinds
from attnreuse.errors import AttnReuseError
from attnreuse.evaluate import Evaluator
from attnreuse.policy import Policy
from attnreuse.processors import attention_layers
from attnreuse.rows import Row, best_row, holding, level_error, stretched, strip
from attnreuse.search import Engine, Judge, Scores

FEWER = tuple(i / 20 for i in range(8, 20))  # shares of the steps that fewer steps make
SHARES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)  # of the steps that a scanned schedule reuses; and one of 2, two of 3
WIDTH = 4  # schedules judged at once; the same with any engine
Rows = dict[str, Row]  # by group of layers
Candidate = tuple[int, Rows]  # ``num_inference_steps``, and what the groups do in them


@dataclass(frozen=True)
class Point:
    """A joint schedule of a run of `steps` (``num_inference_steps``).

    Attributes:
        time: predicted, as a share of the full run's.
        psnr_db: measured, the mean, against the full run's pictures.
    """

    policy: Policy
    steps: int
    time: float
    psnr_db: float


@dataclass(frozen=True)
class Front:
    """What a search of the ladder found.

    Attributes:
        points: schedules that no judged one beats in time and PSNR, fastest first.
        full_s: predicted seconds of one batch with every step computed.
        evaluations: distinct schedules judged, those read from the cache included.
        stopped: "budget" or "time".
    """

    points: list[Point]
    full_s: float
    evaluations: int
    stopped: str

    def pick(self, floor: float | None = None, time: float | None = None) -> Point:
        """The fastest point of at least `floor` dB, or the best that takes at most `time` (a share of the full run's).

        Raises:
            AttnReuseError: there is none; the message says what there is.
        """
        if not self.points:
            raise AttnReuseError(f"none of {self.evaluations} schedules is predicted to be faster than full steps here")
        points = [p for p in self.points if (floor is None or p.psnr_db >= floor) and (time is None or p.time <= time)]
        if not points:
            first, last = self.points[0], self.points[-1]
            wanted = [] if floor is None else [f"at least {floor:g} dB"]
            wanted += [] if time is None else [f"at most {time:g}"]
            raise AttnReuseError(
                f"no schedule found has {' and '.join(wanted)} of the full run's time: they go from "
                f"{first.psnr_db:.1f} dB at {first.time:.2f} to {last.psnr_db:.1f} dB at {last.time:.2f}; "
                "more --budget may find one"
            )
        return points[-1] if floor is None else points[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        points = [asdict(p) | {"policy": p.policy.model_dump(mode="json", exclude_none=True)} for p in self.points]
        return asdict(self) | {"points": points}


def layer_groups(evaluator: Evaluator, by: Literal["kind", "level", "layer"]) -> dict[str, list[str]]:
    """Served layers by "kind" (self, cross), by kind and "level" (query tokens), or each "layer" alone."""
    kinds, shapes = layer_kinds(evaluator.pipe.unet), evaluator.shapes()
    groups: dict[str, list[str]] = {}
    for name in evaluator.served():
        label = {"kind": kinds[name], "level": f"{kinds[name]}@{shapes[name].map[2]}", "layer": name}[by]
        groups.setdefault(label, []).append(name)
    return groups


def ladder(
    engine: Engine,
    *,
    by: Literal["kind", "level", "layer"] = "level",
    budget: int = 200,
    budget_time: float | None = None,
    memory_budget: int | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    run_costs: costs.RunCosts | None = None,
    progress: Callable[[int, int, float], None] = lambda evaluations, budget, best: None,
) -> Front:
    """Search joint schedules of groups of layers for the front of time and PSNR.

    Args:
        engine: judges schedules; its setting says which layers take part ("all": self- and cross-attention).
        by: groups of layers that share a row: see :func:`layer_groups`.
        budget: most schedules to judge.
        budget_time: seconds after which no more are judged; then another run may find others.
        memory_budget: most bytes of maps and outputs.
        seed: of the changes that are tried.
        cache: file of scores, appended to; the same search goes on from it.
        run_costs: of the engine's setting (:func:`attnreuse.costs.measure`); None: they are measured.
        progress: called with (evaluations, budget, latest PSNR).

    Raises:
        AttnReuseError: no schedule fits the memory budget, or was judged in time.
        ValueError: unknown `by`, no budget, or a run of one step.
    """
    if by not in ("kind", "level", "layer"):
        raise ValueError(f"by must be 'kind', 'level' or 'layer', got {by!r}")
    if budget < 1 or engine.evaluator.executed_steps < 2:
        raise ValueError(
            f"a ladder needs a budget of at least 1 and a run of at least 2 steps, got {budget} and "
            f"{engine.evaluator.executed_steps}"
        )
    run_costs = run_costs or costs.measure(engine.evaluator)
    climb = _Ladder(engine.evaluator, run_costs, Judge(engine, cache), by, budget, budget_time, memory_budget, progress)
    climb.scan()
    climb.join()
    climb.change(random.Random(seed))
    if not climb.points:
        why = (
            "was judged in that time"
            if climb.stopped == "time"
            else f"fits the memory budget of {memory_budget:,} bytes"
        )
        raise AttnReuseError(f"no schedule {why}")
    return Front(climb.front(), climb.full_s, len(climb.points), climb.stopped)


class _Ladder:
    """The state of the search: what has been judged, and what is left of the budget."""

    def __init__(
        self,
        evaluator: Evaluator,
        run_costs: costs.RunCosts,
        judge: Judge,
        by: Literal["kind", "level", "layer"],
        budget: int,
        budget_time: float | None,
        memory_budget: int | None,
        progress: Callable[[int, int, float], None],
    ):
        self.evaluator, self.costs, self.judge_policies = evaluator, run_costs, judge
        self.budget, self.memory_budget, self.progress = budget, memory_budget, progress
        self.until = math.inf if budget_time is None else time.monotonic() + budget_time
        self.steps, self.groups = evaluator.setting.steps, layer_groups(evaluator, by)
        self.fewer = sorted({max(1, round(share * self.steps)) for share in FEWER} - {self.steps}, reverse=True)
        holds = set(holding_layers(evaluator.pipe.unet, attention_layers(evaluator.pipe.unet)))
        self.letters: dict[str, list[bool | Literal["H"]]] = {  # what reuses may hold by itself
            group: [True] if holds >= set(names) else [True, "H"] for group, names in self.groups.items()
        }
        self.full_s = self._seconds((self.steps, {}))
        self.points: dict[str, tuple[Candidate, Point]] = {}  # by the candidate's text
        self.stopped = ""

    # -- the three parts of the search

    def scan(self) -> None:
        """Fewer steps; each group alone under schedules of rising savings; and all groups of both letters as one."""
        rows = self._rows()
        self.rungs = {
            group: [row if letter is True else holding(row) for letter in letters for row in rows]
            for group, letters in self.letters.items()
        }
        both = [group for group, letters in self.letters.items() if len(letters) > 1]
        self.judge([(count, {}) for count in self.fewer])
        self.judge([(self.steps, {group: row}) for group, rows in self.rungs.items() for row in rows])
        self.judge([(self.steps, dict.fromkeys(both, row)) for row in (self.rungs[both[0]] if both else [])])

    def join(self) -> None:
        """Joint schedules, of all steps and of fewer, that are predicted to be best."""
        lost = {count: self._lost((count, {})) for count in self.fewer if _key((count, {})) in self.points}
        predicted = [
            (self._seconds(candidate), lost_rows + lost_steps, candidate)
            for lost_rows, rows in self._joint()
            for count, lost_steps in [(self.steps, 0.0), *lost.items()]
            for candidate in [(count, self._carried(rows, count))]
        ]
        least, wanted = math.inf, []
        for _, error, candidate in sorted(predicted, key=lambda p: p[:2]):
            if error < least:
                least = error
                wanted.append(candidate)
        order = dict.fromkeys(i for stride in (16, 8, 4, 2, 1) for i in range(0, len(wanted), stride))
        self.judge([wanted[i] for i in order])  # from end to end, then in between, in case the budget ends

    def change(self, rng: random.Random) -> None:
        """Change points of the front in one place at a time, as long as the budget lasts."""
        barren = 0
        while not self.stopped and self.points and barren < 50:
            front = [candidate for candidate, _ in self._front()]
            if not front:
                break
            new = [self._changed(rng.choice(front), rng) for _ in range(WIDTH)]
            before = len(self.points)
            self.judge(new)
            barren = 0 if len(self.points) > before else barren + 1
        self.stopped = self.stopped or "budget"

    # -- judging

    def judge(self, candidates: Iterable[Candidate]) -> None:
        """Judge joint schedules as far as the budgets allow."""
        fresh = {_key(candidate): candidate for candidate in candidates if _key(candidate) not in self.points}
        fresh.pop(_key((self.steps, {})), None)
        fitting = [candidate for candidate in fresh.values() if self._fits(candidate)]
        for at in range(0, len(fitting), WIDTH):
            room = self.budget - len(self.points)
            self.stopped = "budget" if room <= 0 else "time" if time.monotonic() >= self.until else ""
            if self.stopped:
                return
            some = fitting[at : at + min(WIDTH, room)]
            counts = [count for count, _ in some]
            self._keep(some, self.judge_policies([self._policy(candidate) for candidate in some], steps=counts))

    def _keep(self, candidates: list[Candidate], scores: list[Scores]) -> None:
        for candidate, score in zip(candidates, scores, strict=True):
            point = Point(self._policy(candidate), candidate[0], self._seconds(candidate) / self.full_s, score["psnr"])
            self.points[_key(candidate)] = candidate, point
            self.progress(len(self.points), self.budget, point.psnr_db)

    def front(self) -> list[Point]:
        """Points that none beats, fastest first, named by their time."""
        return [
            replace(
                p,
                policy=p.policy.model_copy(
                    update={"name": f"ladder({p.time:.2f})", "metrics": {"psnr_db": round(p.psnr_db, 4)}}
                ),
            )
            for _, p in self._front()
        ]

    def _front(self) -> list[tuple[Candidate, Point]]:
        found: list[tuple[Candidate, Point]] = []
        for candidate, point in sorted(self.points.values(), key=lambda e: (e[1].time, -e[1].psnr_db)):
            if point.time < 1 and (not found or point.psnr_db > found[-1][1].psnr_db):
                found.append((candidate, point))
        return found

    # -- candidates

    def _rows(self) -> list[Row]:
        """Schedules of rising savings: of least predicted error, and regular ones."""
        steps, levels = self.evaluator.executed_steps, self.evaluator.levels
        error = (
            (lambda captured, step: step - captured)
            if levels is None
            else level_error(levels, self.evaluator.influence)
        )
        counts = sorted({max(1, round(share * (steps - 1))) for share in SHARES})
        rows = [best_row(steps, count, error) for count in counts]
        return list(dict.fromkeys([*rows, *(tuple(i % k > 0 for i in range(steps)) for k in (2, 3))]))

    def _joint(self) -> list[tuple[float, Rows]]:
        """For rising prices of time: each group's rung of least error and time, and the sum of their errors."""
        alone = {
            group: [
                (row, self._lost(one), self._seconds(one) / self.full_s - 1)
                for row in rows
                for one in [(self.steps, {group: row})]
                if _key(one) in self.points
            ]
            for group, rows in self.rungs.items()
        }
        joint: dict[str, tuple[float, Rows]] = {}
        for exponent in range(-70, 11):
            price = 10 ** (exponent / 10)  # mean squared error that a full run's time is worth
            total, rows = 0.0, {}
            for group, rungs in alone.items():
                row, lost, saved = min(rungs, key=lambda r: r[1] + price * r[2], default=(None, 0.0, 0.0))
                if row is not None and lost + price * saved < 0:
                    total, rows[group] = total + lost, row
            if rows:
                joint[_key((self.steps, rows))] = total, rows
        return list(joint.values())

    def _carried(self, rows: Rows, count: int) -> Rows:
        """`rows` of all steps for a run of `count`, by noise level."""
        if count == self.steps:
            return rows
        here, there = self.evaluator, self.evaluator.at(count)
        carried = {g: stretched(row, there.executed_steps, here.levels, there.levels) for g, row in rows.items()}
        return {group: row for group, row in carried.items() if any(row)}

    def _changed(self, candidate: Candidate, rng: random.Random) -> Candidate:
        """One group's row with one step changed, or two steps that trade places."""
        count, rows = candidate
        steps, group = self.evaluator.at(count).executed_steps, rng.choice(list(self.groups))
        row = list(rows.get(group, (False,) * steps))
        if steps > 1:
            step, other = rng.randrange(1, steps), rng.randrange(1, steps)
            if row[step] != row[other]:
                row[step], row[other] = row[other], row[step]
            else:
                row[step] = rng.choice([letter for letter in (False, *self.letters[group]) if letter != row[step]])
        changed = rows | {group: tuple(row)}
        return count, {name: row for name, row in changed.items() if any(row)}

    def _policy(self, candidate: Candidate) -> Policy:
        count, rows = candidate
        judge = self.evaluator.at(count)
        by_layer = {name: row for group, row in rows.items() for name in self.groups[group]}
        return judge.policy(by_layer or [False] * judge.executed_steps, "candidate")

    def _fits(self, candidate: Candidate) -> bool:
        return self.memory_budget is None or self.evaluator.map_bytes(self._policy(candidate)) <= self.memory_budget

    def _seconds(self, candidate: Candidate) -> float:
        """Predicted, of one batch."""
        return self.costs.seconds(self.evaluator.schedule(self._policy(candidate)))

    def _lost(self, candidate: Candidate) -> float:
        """Mean squared error of a judged candidate."""
        return 10 ** (-self.points[_key(candidate)][1].psnr_db / 10)


def _key(candidate: Candidate) -> str:
    count, rows = candidate
    return f"{count} {sorted((group, strip(row)) for group, row in rows.items())}"
