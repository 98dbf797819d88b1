"""PHAST: local search around HURRY for the schedule whose pictures stay closest to the full-step ones.

A neighbour of a schedule lets one reuse step and one computed step trade places. The search is a deterministic function
of the scores and the seed.

Source: arXiv 2401.01008 (PHAST); objectives, restarts and prefix sharing are ours.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from attnreuse.errors import AttnReuseError
from attnreuse.planning.rows import Row, strip, trades
from attnreuse.policy import Policy, hurry
from attnreuse.progress import Progress, silent
from attnreuse.study.evaluate import Evaluator
from attnreuse.study.metrics import try_out
from attnreuse.study.search.engines import Engine, InProcess, RayEngine
from attnreuse.study.search.judge import Judge
from attnreuse.study.search.objective import Improvement, Objective, Scores, SearchResult, Value
from attnreuse.study.setting import Setting

MOST = 20_000  # schedules that `exhaustive` agrees to evaluate


def phast(
    pipe: Any,
    steps: int,
    reuse: int,
    prompts: Iterable[str],
    *,
    objective: Objective | str = "psnr",
    variant: Literal["greedy", "exhaustive"] = "greedy",
    starts: Iterable[Policy] = (),
    restarts: int = 0,
    budget: int = 200,
    patience: int | None = None,
    width: int = 8,
    seed: int = 0,
    rank: Callable[[Policy], float] | None = None,
    cache: str | Path | None = None,
    engine: Engine | Literal["local", "ray"] = "local",
    progress: Progress = silent,
    **setting: Any,
) -> SearchResult:
    """Search the permutations of a schedule with `reuse` reuse steps, from the paper's HURRY (one late block) on.

    Args:
        pipe: a pipeline that :func:`attnreuse.enable` serves.
        steps: ``num_inference_steps``.
        reuse: executed steps that reuse; with a floor, where the search begins.
        prompts: one picture each; they guide the search, so judge its policy on others.
        objective: a metric's name, or an :class:`Objective`.
        variant: "greedy" moves to the best of each `width` neighbours that improves; "exhaustive" to the
            best of all neighbours.
        starts: schedules to begin from instead, each in turn.
        restarts: more, random, schedules to begin from.
        budget: most schedules to judge, over all starts.
        patience: schedules judged without improvement after which a start is left; None: no limit.
        width: neighbours judged at once by the greedy variant; the same with any engine.
        seed: of the order of neighbours, and of the restarts.
        rank: predicted error of a schedule (:func:`attnreuse.predict` of an analysis): the most promising
            neighbours are judged first.
        cache: file of scores, appended to; the same search goes on from it.
        engine: "local", "ray", or an engine at hand: then its pipeline and setting count.
        progress: called with the schedules judged, the budget, and the first and best metric.
        setting: the other fields of :class:`~attnreuse.study.setting.Setting`: ``guidance``, ``size``,
            ``map_format``, ``layers``, ``batch``.

    Raises:
        ValueError: more reuses than fit, unknown metric, a start of another length.
    """
    if variant not in ("greedy", "exhaustive"):
        raise ValueError(f"variant must be 'greedy' or 'exhaustive', got {variant!r}")
    if setting and not isinstance(engine, str):
        raise ValueError(f"an engine at hand has a setting of its own: leave out {', '.join(setting)}")
    engine = _engine(engine, pipe, Setting(tuple(prompts), steps, **setting))
    evaluator = engine.evaluator
    objective = objective if isinstance(objective, Objective) else Objective(objective)
    rng = random.Random(seed)
    begin = [policy.reuse for policy in starts] or [hurry(evaluator.executed_steps, reuse, None).reuse]
    for row in begin:
        if isinstance(row, dict) or len(row) != evaluator.executed_steps:
            raise ValueError(f"starts must have one row of {evaluator.executed_steps} executed steps")
    begin += [_random_row(evaluator.executed_steps, reuse, rng) for _ in range(restarts)]
    climb = _Climb(engine, objective, budget, patience, Judge(engine, cache, progress=progress), progress, rank)
    name = f"phast({evaluator.executed_steps},{reuse})"
    for row in begin:
        climb.start(row)
        while climb.step(width if variant == "greedy" else None, rng):
            pass
    return climb.result(name)


def exhaustive(
    engine: Engine,
    reuse: int,
    *,
    objective: Objective | str = "psnr",
    cache: str | Path | None = None,
    progress: Progress = silent,
) -> SearchResult:
    """Judge every schedule with `reuse` reuse steps, in an order in which neighbours share most steps.

    Raises:
        ValueError: more than 20,000 schedules.
    """
    steps = engine.evaluator.executed_steps
    total = math.comb(steps - 1, reuse)
    if total > MOST:
        raise ValueError(f"{total:,} schedules of {reuse} of {steps} steps are too many to judge (at most {MOST:,})")
    objective = objective if isinstance(objective, Objective) else Objective(objective)
    climb = _Climb(engine, objective, total, None, Judge(engine, cache, progress=progress), progress, None)
    rows = sorted(_row(steps, chosen) for chosen in itertools.combinations(range(1, steps), reuse))
    climb.start(hurry(steps, reuse, None).reuse)
    for at in range(0, total, 16):
        climb.judge(rows[at : at + 16])
    climb.stopped = "all evaluated"
    return climb.result(f"best({steps},{reuse})")


class _Climb:
    """The state of a local search: the schedule it stands on, the best of all, what it has judged."""

    def __init__(
        self,
        engine: Engine,
        objective: Objective,
        budget: int,
        patience: int | None,
        judge: Judge,
        progress: Progress,
        rank: Callable[[Policy], float] | None,
    ):
        try_out(objective.metric)
        self.evaluator, self.objective, self.judge_policies = engine.evaluator, objective, judge
        self.budget, self.patience, self.progress, self.rank = budget, patience, progress, rank
        self.begun = replace(engine.evaluator.calls)
        self.values: dict[Row, Value] = {}
        self.scores: dict[Row, Scores] = {}
        self.here: Row = ()
        self.best: Row = ()
        self.first: Row = ()
        self.history: list[Improvement] = []
        self.since = 0  # evaluations since this start last improved
        self.stopped = "local optimum"

    def start(self, row: Row) -> None:
        """Begin from `row`."""
        self.since, self.stopped = 0, "local optimum"
        if self.judge([row]):
            self.here = row
            self.first = self.first or row

    def judge(self, rows: list[Row]) -> list[Row]:
        """Value rows as far as memory and evaluation budgets allow; those with a value, best first."""
        rows = [row for row in rows if row in self.values or self._fits(row)]
        new = [row for row in rows if row not in self.values]
        room = self.budget - len(self.values)
        if len(new) > room:
            self.stopped = "budget"
            new = new[: max(0, room)]
        policies = [self.evaluator.policy(row, "candidate") for row in new]
        for row, policy, scores in zip(
            new, policies, self.judge_policies(policies, (self.objective.metric,)) if policies else [], strict=True
        ):
            self.scores[row] = scores
            self.values[row] = self.objective.value(scores, self._seconds(policy))
            self.since += 1
            if not self.best or self.values[row] > self.values[self.best]:
                self.best = row
                metric = scores[self.objective.metric]
                self.history.append(Improvement(evaluations=len(self.values), reuse=strip(row), metric=metric))
            self.progress(len(self.values), self.budget, self._now())
        return sorted((r for r in rows if r in self.values), key=lambda r: self.values[r], reverse=True)

    def step(self, width: int | None, rng: random.Random) -> bool:
        """Move to a better neighbour; False where there is none, or the budget is spent."""
        if self.here not in self.values:
            return False
        rows = self._neighbours(rng)
        width = width or len(rows) or 1
        for at in range(0, len(rows), width):
            found = self.judge(rows[at : at + width])
            if found and self.values[found[0]] > self.values[self.here]:
                self.here, self.since = found[0], 0
                return self.stopped != "budget"
            if self.stopped == "budget":
                return False
            if self.patience is not None and self.since >= self.patience:
                self.stopped = "patience"
                return False
        return False

    def result(self, name: str) -> SearchResult:
        if not self.best:
            raise AttnReuseError(f"no schedule fits the memory budget of {self.objective.memory_budget:,} bytes")
        scores, metric = self.scores[self.best], self.objective.metric
        unit = {"psnr": "psnr_db"}
        policy = self.evaluator.policy(self.best, name)
        policy = policy.model_copy(update={"metrics": {unit.get(k, k): round(v, 4) for k, v in scores.items()}})
        return SearchResult(
            policy=policy,
            start=self.scores[self.first][metric],
            history=self.history,
            evaluations=len(self.values),
            stopped=self.stopped,
            calls=self.evaluator.calls.since(self.begun),
            scores={strip(row): s[metric] for row, s in self.scores.items()},
        )

    def _now(self) -> str:
        """The metric of the schedule that the search began with, and of the best."""
        metric = self.objective.metric
        first, best = (self.scores[row][metric] for row in (self.first or self.best, self.best))
        return f"{self.objective.shown(first)} at the start, best {best:.4g}"

    def _neighbours(self, rng: random.Random) -> list[Row]:
        """Rows that differ in one trade (with a floor: also in one flip), in the order to try them."""
        row, rows = self.here, trades(self.here)
        if self.objective.floor is not None:
            steps = sorted(range(1, len(row)), key=lambda i: not row[i])  # first those that reuse
            rows += [(*row[:i], not row[i], *row[i + 1 :]) for i in steps]
        rng.shuffle(rows)
        if self.rank is not None:
            rows.sort(key=lambda r: self.rank(self.evaluator.policy(r, "candidate")))
        return rows

    def _fits(self, row: Row) -> bool:
        setting, budget = self.evaluator.setting, self.objective.memory_budget
        return self.judge_policies.fits(self.evaluator.policy(row, "candidate"), setting.steps, budget)

    def _seconds(self, policy: Policy) -> float:
        """Predicted seconds of a batch; only where a floor makes them matter."""
        if self.objective.floor is None:
            return 0.0
        return self.judge_policies.seconds(policy, self.evaluator.setting.steps)


def _engine(engine: Engine | str, pipe: Any, setting: Setting) -> Engine:
    if engine == "local":
        return InProcess(Evaluator(pipe, setting))
    if engine == "ray":
        return RayEngine(Evaluator(pipe, setting))
    if isinstance(engine, str):
        raise ValueError(f"engine must be 'local', 'ray' or an engine, got {engine!r}")
    return engine


def _row(steps: int, chosen: Iterable[int]) -> Row:
    wanted = set(chosen)
    return tuple(i in wanted for i in range(steps))


def _random_row(steps: int, reuse: int, rng: random.Random) -> Row:
    return _row(steps, rng.sample(range(1, steps), reuse))
