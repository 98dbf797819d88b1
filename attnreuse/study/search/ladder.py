"""The ladder: groups of layers compute, reuse or hold at each of all steps, or of fewer; the front of time and quality.

Fewer steps are judged by themselves, and each group of layers alone under schedules of rising savings. Errors are taken
to add (as mean squares): so the joint schedules that should be best are known, and these are judged. Then points of the
front are changed in one place at a time as long as the budget lasts. The front is of judged schedules alone; its times
follow from costs measured on this machine, and are measured themselves where other pictures confirm it.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from attnreuse.binding.denoiser import find_denoiser, holding_layers
from attnreuse.errors import AttnReuseError
from attnreuse.planning.rows import Row, holding, stretched
from attnreuse.policy import Policy
from attnreuse.progress import Progress, counted, silent
from attnreuse.study.costs import RunCosts
from attnreuse.study.search.candidates import Candidate, Letter, Rows, Rung, joined, layer_groups, rising
from attnreuse.study.search.engines import Engine
from attnreuse.study.search.front import Front, Point
from attnreuse.study.search.judge import Judge
from attnreuse.study.setting import Setting

FEWER = tuple(i / 20 for i in range(8, 20))  # shares of the steps that fewer steps make
WIDTH = 4  # schedules judged at once; the same with any engine
CONFIRMED, NEAR = 40, 2.0  # most searched schedules that are confirmed, and dB below the front from which they are
BARREN = 50  # times in a row that no change is new before a search ends


def ladder(
    engine: Engine,
    *,
    by: Literal["kind", "level", "layer"] = "level",
    budget: int = 200,
    budget_time: float | None = None,
    memory_budget: int | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    run_costs: RunCosts | None = None,
    confirm: Setting | None = None,
    progress: Progress = silent,
) -> Front:
    """Search joint schedules of groups of layers for the front of time and PSNR.

    Args:
        engine: judges schedules; its setting says which layers take part ("all": self- and cross-attention).
        by: groups of layers that share a row: see :func:`~attnreuse.study.search.candidates.layer_groups`.
        budget: most schedules to judge.
        budget_time: seconds after which no more are judged; then another run may find others.
        memory_budget: most bytes of maps and outputs.
        seed: of the changes that are tried.
        cache: file of scores and, by machine, costs, appended to; the same search goes on from it.
        run_costs: of the engine's setting (:func:`attnreuse.study.costs.measure`); None: the cache's, or measured.
        confirm: the engine's setting with other prompts, by which the best schedules are judged again: of many
            schedules that a few pictures cannot tell apart, the luckiest looks best. They are timed, too, unless
            `run_costs` say what takes how long. None: the front is the search's.
        progress: called with the schedules judged, the budget, and how many points the front has; then it counts the
            "schedules to confirm", and before each run that is timed "runs".

    Raises:
        AttnReuseError: no schedule fits the memory budget, or was judged in time.
        ValueError: unknown `by`, no budget, a run of one step, or a `confirm` that differs in more than its pictures.
    """
    until = math.inf if budget_time is None else time.monotonic() + budget_time
    if budget < 1 or engine.evaluator.executed_steps < 2:
        raise ValueError(
            f"a ladder needs a budget of at least 1 and a run of at least 2 steps, got {budget} and "
            f"{engine.evaluator.executed_steps}"
        )
    setting = engine.evaluator.setting
    if confirm is not None:
        _check_confirm(setting, confirm)
    groups = layer_groups(engine.evaluator, by)
    climb = _Ladder(Judge(engine, cache, run_costs, progress), groups, budget, until, memory_budget, progress)
    climb.join(climb.scan())
    climb.change(random.Random(seed))
    if not climb.points:
        why = (
            "was judged in that time"
            if climb.stopped == "time"
            else f"fits the memory budget of {memory_budget:,} bytes"
        )
        raise AttnReuseError(f"no schedule {why}")
    evaluations, timed = len(climb.points), confirm is not None and run_costs is None
    if confirm is not None:
        climb.confirm(Judge(engine.of(confirm), cache, climb.judge_policies.costs), timed)
    return Front(
        points=climb.front(),
        full_s=climb.full_s,
        evaluations=evaluations,
        pictures=len((confirm or setting).prompts),
        stopped=climb.stopped,
        times="fitted" if timed else "predicted",
    )


def _check_confirm(search: Setting, confirm: Setting) -> None:
    if replace(confirm, prompts=search.prompts, seed=search.seed) != search:
        raise ValueError(f"confirm must differ from the search in its prompts and seed alone, got {confirm}")
    same = set(enumerate(search.prompts, search.seed)) & set(enumerate(confirm.prompts, confirm.seed))
    if same:
        raise ValueError(f"confirm must have other pictures than the search, {len(same)} are the same")


class _Ladder:
    """The state of the search: what has been judged, and what is left of the budget."""

    def __init__(
        self,
        judge: Judge,
        groups: dict[str, list[str]],
        budget: int,
        until: float,
        memory_budget: int | None,
        progress: Progress,
    ):
        self.evaluator, self.judge_policies, self.groups = judge.engine.evaluator, judge, groups
        self.budget, self.until, self.memory_budget, self.progress = budget, until, memory_budget, progress
        self.steps = self.evaluator.setting.steps
        self.fewer = sorted({max(1, round(share * self.steps)) for share in FEWER} - {self.steps}, reverse=True)
        holds = set(holding_layers(find_denoiser(self.evaluator.pipe)))
        self.letters: dict[str, list[Letter]] = {  # what reuses may hold by itself
            group: [True] if holds >= set(names) else [True, "H"] for group, names in groups.items()
        }
        self.policies: dict[Candidate, Policy] = {}
        self.points: dict[Candidate, Point] = {}
        self.simple: list[Candidate] = []  # known without a search
        self.full_s = self._seconds(Candidate(self.steps))
        self.stopped = ""

    # -- the three parts of the search

    def scan(self) -> dict[str, list[Row]]:
        """Judge fewer steps, each group alone, and one row for all groups or those of both letters; gives the rows."""
        rows = rising(self.evaluator.executed_steps, self.evaluator.levels, self.evaluator.influence)
        tried = {
            group: [row if letter is True else holding(row) for letter in letters for row in rows]
            for group, letters in self.letters.items()
        }
        both = [group for group, letters in self.letters.items() if len(letters) > 1]
        alike = [dict.fromkeys(both, row) for row in (tried[both[0]] if both else [])]
        alike += [dict.fromkeys(self.groups, row) for row in rows]
        self.simple = [*map(Candidate, self.fewer), *(Candidate.of(self.steps, of_groups) for of_groups in alike)]
        self.judge(self.simple)
        self.judge(Candidate.of(self.steps, {group: row}) for group, rows in tried.items() for row in rows)
        return tried

    def join(self, tried: dict[str, list[Row]]) -> None:
        """Judge joint schedules of the rows `tried` alone, of all steps and of fewer, that are predicted to be best."""
        lost = {count: self._lost(Candidate(count)) for count in self.fewer if Candidate(count) in self.points}
        rungs = {
            group: [
                Rung(row, self._lost(one), self.points[one].time - 1)
                for row in rows
                for one in [Candidate.of(self.steps, {group: row})]
                if one in self.points
            ]
            for group, rows in tried.items()
        }
        predicted = [
            (self._seconds(candidate), lost_rows + lost_steps, candidate)
            for lost_rows, rows in joined(rungs)
            for count, lost_steps in [(self.steps, 0.0), *lost.items()]
            for candidate in [Candidate.of(count, self._carried(rows, count))]
        ]
        least, wanted = math.inf, []
        for _, error, candidate in sorted(predicted, key=lambda p: p[:2]):
            if error < least:
                least = error
                wanted.append(candidate)
        order = dict.fromkeys(i for stride in (16, 8, 4, 2, 1) for i in range(0, len(wanted), stride))
        self.judge(wanted[i] for i in order)  # from end to end, then in between, in case the budget ends

    def change(self, rng: random.Random) -> None:
        """Judge points of the front with one change each, as long as the budget lasts."""
        barren = 0
        while not self.stopped and barren < BARREN and (front := self._front()):
            before = len(self.points)
            self.judge([self._changed(rng.choice(front), rng) for _ in range(WIDTH)])
            barren = 0 if len(self.points) > before else barren + 1
        self.stopped = self.stopped or "nothing new"

    def confirm(self, judge: Judge, timed: bool) -> None:
        """Judge what lies on or near the front by other pictures, and time it where `timed`; only that stays."""
        chosen = self._near_front()
        confirmed: dict[Candidate, Point] = {}
        for at in range(0, len(chosen), WIDTH):
            some = chosen[at : at + WIDTH]
            scores = judge([self._policy(c) for c in some], steps=[c.steps for c in some])
            for candidate, score in zip(some, scores, strict=True):
                confirmed[candidate] = self.points[candidate].model_copy(update={"psnr_db": score["psnr"]})
            self.progress(len(confirmed), len(chosen), "judged by other pictures", unit="schedules to confirm")
        if timed:
            shares = self.judge_policies.shares([self._policy(c) for c in chosen], [c.steps for c in chosen])
            times = _fitted([self.points[c].time for c in chosen], shares)
            for candidate, share in zip(chosen, times, strict=True):
                confirmed[candidate] = confirmed[candidate].model_copy(update={"time": share})
        self.points = confirmed

    def _near_front(self) -> list[Candidate]:
        """What is known without a search, and the schedules that lie least below the best of those that take no longer.

        Where more than ``CONFIRMED`` lie on the front itself, as many of them, evenly from the fastest to the slowest.
        """
        best, gaps = -math.inf, {}
        for candidate, point in self._by_time():
            best = max(best, point.psnr_db)
            gaps[candidate] = best - point.psnr_db
        simple = [candidate for candidate in dict.fromkeys(self.simple) if candidate in gaps]
        searched = sorted((c for c, gap in gaps.items() if gap <= NEAR and c not in simple), key=gaps.__getitem__)
        front = [candidate for candidate in searched if gaps[candidate] == 0]  # fastest first
        if len(front) > CONFIRMED:
            return simple + [front[i * (len(front) - 1) // (CONFIRMED - 1)] for i in range(CONFIRMED)]
        return simple + searched[:CONFIRMED]

    # -- judging

    def judge(self, candidates: Iterable[Candidate]) -> None:
        """Judge those that are new and fit, as far as the budgets allow."""
        new = dict.fromkeys(c for c in candidates if c not in self.points and c != Candidate(self.steps))
        fitting = [c for c in new if self.judge_policies.fits(self._policy(c), c.steps, self.memory_budget)]
        for at in range(0, len(fitting), WIDTH):
            room = self.budget - len(self.points)
            self.stopped = "budget" if room <= 0 else "time" if time.monotonic() >= self.until else ""
            if self.stopped:
                return
            some = fitting[at : at + min(WIDTH, room)]
            scores = self.judge_policies([self._policy(c) for c in some], steps=[c.steps for c in some])
            for candidate, score in zip(some, scores, strict=True):
                seconds = self._seconds(candidate)
                self.points[candidate] = Point(
                    policy=self._policy(candidate),
                    steps=candidate.steps,
                    time=seconds / self.full_s,
                    psnr_db=score["psnr"],
                )
                self.progress(len(self.points), self.budget, f"{counted(len(self._front()), 'point')} on the front")

    def front(self) -> list[Point]:
        """Points that none beats, fastest first, named by their time."""
        points = [self.points[candidate] for candidate in self._front()]
        return [p.model_copy(update={"policy": p.policy.model_copy(update=_about(p))}) for p in points]

    def _by_time(self) -> list[tuple[Candidate, Point]]:
        """Fastest first, of equal times the best."""
        return sorted(self.points.items(), key=lambda p: (p[1].time, -p[1].psnr_db))

    def _front(self) -> list[Candidate]:
        front: list[Candidate] = []
        best = -math.inf
        for candidate, point in self._by_time():
            if point.time < 1 and point.psnr_db > best:
                best = point.psnr_db
                front.append(candidate)
        return front

    # -- candidates

    def _carried(self, rows: Rows, count: int) -> Rows:
        """`rows` of all steps for a run of `count`, by noise level."""
        if count == self.steps:
            return rows
        here, there = self.evaluator, self.evaluator.at(count)
        return {g: stretched(row, there.executed_steps, here.levels, there.levels) for g, row in rows.items()}

    def _changed(self, candidate: Candidate, rng: random.Random) -> Candidate:
        """One group's row changed."""
        steps, group = self.evaluator.at(candidate.steps).executed_steps, rng.choice(list(self.groups))
        return candidate.changed(group, steps, (False, *self.letters[group]), rng)

    def _policy(self, candidate: Candidate) -> Policy:
        if candidate not in self.policies:
            evaluator = self.evaluator.at(candidate.steps)
            by_layer = {name: row for group, row in candidate.rows for name in self.groups[group]}
            reuse = by_layer or [False] * evaluator.executed_steps
            self.policies[candidate] = evaluator.policy(reuse, "candidate")
        return self.policies[candidate]

    def _seconds(self, candidate: Candidate) -> float:
        return self.judge_policies.seconds(self._policy(candidate), candidate.steps)

    def _lost(self, candidate: Candidate) -> float:
        """Mean squared error of a judged candidate (its geometric mean over the pictures)."""
        return 10 ** (-self.points[candidate].psnr_db / 10)


def _fitted(predicted: list[float], measured: list[float]) -> list[float]:
    """`predicted` times, moved by the line that leads them to the `measured` ones.

    One run's time is uncertain by some hundredths, and a front would choose those that chanced to be fast.
    """
    if len(set(predicted)) < 3:
        return measured
    line = statistics.linear_regression(predicted, measured)
    return [line.intercept + line.slope * time for time in predicted]


def _about(point: Point) -> dict[str, Any]:
    """What a policy of the front says of itself."""
    return {"name": f"ladder({point.time:.2f})", "metrics": {"psnr_db": round(point.psnr_db, 4)}}
