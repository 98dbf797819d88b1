"""The ladder: groups of layers compute, reuse or hold at each step; the front of what that costs and what it keeps.

Each group of layers is scanned alone under schedules of rising savings. Errors of groups are taken to add (as mean
squares), which gives joint schedules that are best for a price of time; these are judged, and changed in one place
at a time as long as the budget lasts. The front is of judged schedules alone; its times are predicted from costs
measured on this machine.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from attnreuse.denoiser import holding_layers, layer_kinds
from attnreuse.errors import AttnReuseError
from attnreuse.evaluate import Evaluator
from attnreuse.policy import Policy
from attnreuse.processors import attention_layers
from attnreuse.rows import Row, best_row, holding, level_error, strip
from attnreuse.search import Engine, Judge

SHARES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)  # of the steps that a scanned schedule reuses
WIDTH = 4  # schedules judged at once; the same with any engine
Rows = dict[str, Row]  # by group of layers


@dataclass(frozen=True)
class Point:
    """A joint schedule: its predicted `time`, as a share of the full run's, and the measured mean PSNR in dB."""

    policy: Policy
    time: float
    psnr_db: float


@dataclass(frozen=True)
class Front:
    """What a search of the ladder found.

    Attributes:
        points: schedules that no judged one beats in time and PSNR, fastest first.
        full_s: seconds of one batch with every step computed.
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
            wanted = " and ".join(
                [f"at least {floor:g} dB"] * (floor is not None) + [f"at most {time}"] * (time is not None)
            )
            raise AttnReuseError(
                f"no schedule found has {wanted} of the full run's time: they go from {first.psnr_db:.1f} dB at "
                f"{first.time:.2f} to {last.psnr_db:.1f} dB at {last.time:.2f}; more --budget may find one"
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
    climb = _Ladder(engine.evaluator, Judge(engine, cache), by, budget, budget_time, memory_budget, progress)
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
        judge: Judge,
        by: Literal["kind", "level", "layer"],
        budget: int,
        budget_time: float | None,
        memory_budget: int | None,
        progress: Callable[[int, int, float], None],
    ):
        self.evaluator, self.judge_policies, self.progress = evaluator, judge, progress
        self.budget, self.memory_budget = budget, memory_budget
        self.until = math.inf if budget_time is None else time.monotonic() + budget_time
        self.steps, self.groups = evaluator.executed_steps, layer_groups(evaluator, by)
        held = set(holding_layers(evaluator.pipe.unet, attention_layers(evaluator.pipe.unet)))
        self.letters = {g: [True] if held >= set(names) else [True, "H"] for g, names in self.groups.items()}
        self.full_s = _seconds(evaluator)
        self.computed_s = evaluator.attention_seconds(evaluator.policy([False] * self.steps, "full"))
        self.points: dict[str, tuple[Rows, Point]] = {}  # by the rows' text
        self.stopped = ""

    # -- the three parts of the search

    def scan(self) -> None:
        """Each group alone, under schedules of rising savings."""
        self._rungs()
        self.judge([{group: row} for group, rows in self.rungs.items() for row in rows])

    def join(self) -> None:
        """Joint schedules: for a price of time, each group takes the rung of least error and time."""
        alone = {
            group: [(row, *self._error_and_time({group: row})) for row in rows if _key({group: row}) in self.points]
            for group, rows in self.rungs.items()
        }
        joint: dict[str, Rows] = {}
        for exponent in range(-70, 11):
            price = 10 ** (exponent / 10)  # mean squared error that a full run's time is worth
            rows: Rows = {}
            for group, rungs in alone.items():
                row, worth = min(
                    ((row, error - price * saved) for row, error, saved in rungs), key=lambda r: r[1], default=(None, 0)
                )
                if row is not None and worth < 0:
                    rows[group] = row
            if rows:
                joint[_key(rows)] = rows
        self.judge(list(joint.values()))

    def change(self, rng: random.Random) -> None:
        """Change points of the front in one place at a time, as long as the budget lasts."""
        barren = 0
        while not self.stopped and self.points and barren < 50:
            front = [rows for rows, _ in self._front()]
            if not front:
                break
            new = [self._changed(rng.choice(front), rng) for _ in range(WIDTH)]
            before = len(self.points)
            self.judge(new)
            barren = 0 if len(self.points) > before else barren + 1
        self.stopped = self.stopped or "budget"

    # -- judging

    def judge(self, candidates: Iterable[Rows]) -> None:
        """Judge joint schedules as far as the budgets allow."""
        fresh = {_key(rows): rows for rows in candidates if _key(rows) not in self.points}
        new = [(rows, policy) for rows in fresh.values() if self._fits(policy := self._policy(rows))]
        for at in range(0, len(new), WIDTH):
            room = self.budget - len(self.points)
            self.stopped = "budget" if room <= 0 else "time" if time.monotonic() >= self.until else ""
            if self.stopped:
                return
            some = new[at : at + min(WIDTH, room)]
            for (rows, policy), scores in zip(some, self.judge_policies([p for _, p in some]), strict=True):
                self.points[_key(rows)] = rows, Point(policy, self._time(policy), scores["psnr"])
                self.progress(len(self.points), self.budget, scores["psnr"])

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

    def _front(self) -> list[tuple[Rows, Point]]:
        found: list[tuple[Rows, Point]] = []
        for rows, point in sorted(self.points.values(), key=lambda e: (e[1].time, -e[1].psnr_db)):
            if point.time < 1 and (not found or point.psnr_db > found[-1][1].psnr_db):
                found.append((rows, point))
        return found

    # -- schedules

    def _rungs(self) -> None:
        levels = self.evaluator.levels
        error = (
            (lambda captured, step: step - captured)
            if levels is None
            else level_error(levels, self.evaluator.influence)
        )
        counts = sorted({max(1, round(share * (self.steps - 1))) for share in SHARES})
        rows = [best_row(self.steps, count, error) for count in counts]
        self.rungs: dict[str, list[Row]] = {
            group: [row if letter is True else holding(row) for letter in letters for row in rows]
            for group, letters in self.letters.items()
        }

    def _changed(self, rows: Rows, rng: random.Random) -> Rows:
        """One group's row with one step changed, or two steps that trade places."""
        group = rng.choice(list(self.groups))
        row = list(rows.get(group, (False,) * self.steps))
        step, other = rng.randrange(1, self.steps), rng.randrange(1, self.steps)
        if row[step] != row[other]:
            row[step], row[other] = row[other], row[step]
        else:
            row[step] = rng.choice([letter for letter in (False, *self.letters[group]) if letter != row[step]])
        changed = rows | {group: tuple(row)}
        return {name: row for name, row in changed.items() if any(row)}

    def _policy(self, rows: Rows) -> Policy:
        by_layer = {name: row for group, row in rows.items() for name in self.groups[group]}
        return self.evaluator.policy(by_layer, "candidate")

    def _fits(self, policy: Policy) -> bool:
        return bool(policy.reuse) and (
            self.memory_budget is None or self.evaluator.map_bytes(policy) <= self.memory_budget
        )

    def _time(self, policy: Policy) -> float:
        """Predicted share of the full run's time."""
        return 1 - (self.computed_s - self.evaluator.attention_seconds(policy)) / self.full_s

    def _error_and_time(self, rows: Rows) -> tuple[float, float]:
        """Mean squared error of a judged schedule, and the share of time it saves."""
        point = self.points[_key(rows)][1]
        return 10 ** (-point.psnr_db / 10), 1 - point.time


def _seconds(evaluator: Evaluator, rounds: int = 3) -> float:
    """Median seconds of the pipeline for one batch of the setting, every step computed."""
    setting, taken = evaluator.setting, []
    one = Evaluator(evaluator.pipe, replace(setting, prompts=setting.prompts[: setting.batch]))
    for _ in range(rounds + 1):  # the first warms up
        begin = time.perf_counter()
        one.run(lambda start: nullcontext())
        taken.append(time.perf_counter() - begin)
    return median(taken[1:])


def _key(rows: Rows) -> str:
    return str(sorted((group, strip(row)) for group, row in rows.items()))
