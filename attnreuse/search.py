"""PHAST: local search around HURRY for the schedule whose pictures stay closest to the full-step ones.

A neighbour of a schedule lets one reuse step and one computed step trade places. The search is a
deterministic function of the scores and the seed, and every score is kept in a file, so a search
that was killed goes on where it was, and finds what it would have found.

Source: arXiv 2401.01008 (PHAST); objectives, restarts and prefix sharing are ours.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import BaseModel

from attnreuse import costs
from attnreuse.costs import RunCosts
from attnreuse.environment import environment
from attnreuse.errors import AttnReuseError
from attnreuse.evaluate import Calls, Evaluator, Setting
from attnreuse.metrics import HIGHER_IS_BETTER
from attnreuse.policy import Policy, hurry
from attnreuse.progress import Progress, silent
from attnreuse.rows import Row, strip, trades

Scores = dict[str, float]
Value = tuple[int, float]  # larger is better
Judged = Iterator[tuple[int, Scores]]  # by index of the schedule
MOST = 20_000  # schedules that `exhaustive` agrees to evaluate


# -- what is sought


@dataclass(frozen=True)
class Objective:
    """Best mean `metric`; or, with a `floor` for it, the fastest schedule that keeps above.

    Attributes:
        metric: "psnr" (dB), "ssim" or "lpips".
        floor: worst acceptable metric; then the predicted seconds of a run are minimised.
        memory_budget: most bytes of maps.
    """

    metric: str = "psnr"
    floor: float | None = None
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        if self.metric not in HIGHER_IS_BETTER:
            raise ValueError(f"metric must be one of {', '.join(HIGHER_IS_BETTER)}, got {self.metric!r}")

    def quality(self, scores: Scores) -> float:
        """The metric, signed so that larger is better."""
        return scores[self.metric] * (1 if HIGHER_IS_BETTER[self.metric] else -1)

    def value(self, scores: Scores, seconds: float) -> Value:
        """Schedules below the floor rank by quality, below all others."""
        if self.floor is None:
            return 1, self.quality(scores)
        return (1, -seconds) if self.reaches(scores[self.metric]) else (0, self.quality(scores))

    def reaches(self, found: float) -> bool:
        """Is this metric as good as the floor, if there is one?"""
        return self.floor is None or self.quality({self.metric: found}) >= self.quality({self.metric: self.floor})


@dataclass(frozen=True)
class Improvement:
    """An improvement: after how many evaluations, to which row, with which metric."""

    evaluations: int
    reuse: str
    metric: float


@dataclass
class SearchResult:
    """What a search found.

    Attributes:
        policy: the best, with its metrics on the search's pictures.
        start: metric of the first schedule, where the search began.
        history: improvements, in order.
        evaluations: distinct schedules judged, those read from the cache included.
        stopped: "local optimum", "budget", "patience" or "all evaluated".
        calls: schedules judged now, not read from the cache, and denoiser calls asked for and made.
        scores: metric of every schedule judged, by its row ("..RR").
    """

    policy: Policy
    start: float
    history: list[Improvement]
    evaluations: int
    stopped: str
    calls: Calls
    scores: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        found = asdict(self) | {"policy": self.policy.model_dump(mode="json", exclude_none=True)}
        return found | {"calls_saved": self.calls.saved}


# -- engines


class Engine(Protocol):
    """Scores schedules, each of a run of its `steps` (``num_inference_steps``); yields (index, scores) as it goes."""

    evaluator: Evaluator

    def run(self, policies: list[Policy], metrics: tuple[str, ...], steps: list[int]) -> Judged: ...


class InProcess:
    """One schedule after the other, here."""

    def __init__(self, evaluator: Evaluator):
        self.evaluator = evaluator

    def run(self, policies: list[Policy], metrics: tuple[str, ...], steps: list[int]) -> Judged:
        for i, (policy, count) in enumerate(zip(policies, steps, strict=True)):
            yield i, self.evaluator.at(count).scores(policy, metrics)


class RayEngine:
    """Schedules spread over a ray cluster, each worker with the pipeline, and threads, of this process.

    Same threads, same arithmetic: results equal those of :class:`InProcess` on like machines. A worker
    that dies is started again and its schedule judged anew.

    Args:
        evaluator: of this process; its pipeline is copied to the workers.
        workers: how many; None: as many as the cluster's CPUs (or GPUs) allow.
        address: of a running cluster; None: a local one.
    """

    def __init__(self, evaluator: Evaluator, workers: int | None = None, address: str | None = None):
        try:
            import ray
        except ImportError as error:
            raise AttnReuseError("engine 'ray' needs ray: pip install 'attnreuse[ray]'") from error
        self.evaluator = evaluator
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        threads, on_gpu = torch.get_num_threads(), evaluator.pipe.device.type == "cuda"
        cluster = ray.cluster_resources()
        room = cluster.get("GPU", 0) if on_gpu else cluster.get("CPU", 1) // threads
        self.workers = workers or max(1, int(room))
        claim = {"num_gpus": 1} if on_gpu else {"num_cpus": min(threads, cluster.get("CPU", 1) / self.workers)}
        device = str(evaluator.pipe.device)
        self._pipe = ray.put(evaluator.pipe.to("cpu"))  # held: a worker started again reads it again
        evaluator.pipe.to(device)
        actor = ray.remote(max_restarts=-1, max_task_retries=-1, **claim)(_Worker)
        self.actors = [actor.remote(self._pipe, evaluator.setting, threads, device) for _ in range(self.workers)]

    def run(self, policies: list[Policy], metrics: tuple[str, ...], steps: list[int]) -> Judged:
        from ray.util import ActorPool

        jobs, pool = list(zip(itertools.count(), policies, steps, strict=False)), ActorPool(self.actors)
        yield from pool.map_unordered(lambda actor, job: actor.scores.remote(*job, metrics), jobs)

    def close(self) -> None:
        """Give the workers back."""
        import ray

        for actor in self.actors:
            ray.kill(actor)


class _Worker:
    """One process of a :class:`RayEngine`."""

    def __init__(self, pipe: Any, setting: Setting, threads: int, device: str):
        torch.set_num_threads(threads)
        pipe.set_progress_bar_config(disable=True)
        self.evaluator = Evaluator(pipe.to(device), setting)

    def pid(self) -> int:
        return os.getpid()

    def scores(self, index: int, policy: Policy, steps: int, metrics: tuple[str, ...]) -> tuple[int, Scores]:
        return index, self.evaluator.at(steps).scores(policy, metrics)


class _Kept(BaseModel, extra="forbid"):
    """A line of a cache: the scores of a schedule (of runs of so many steps), or what runs cost on a machine."""

    setting: str
    steps: int | None = None
    reuse: str | None = None
    scores: Scores | None = None
    machine: str | None = None
    costs: RunCosts | None = None


class Judge:
    """Scores of schedules through an engine, and their predicted times: each judged, and costs measured, once ever.

    Args:
        engine: judges what the file does not hold.
        cache: the file, a JSON line per schedule; None keeps all in memory only.
        run_costs: of the engine's setting; None: as the file has them for this machine, else they are measured.

    Raises:
        ValueError: the file holds other things.
    """

    def __init__(self, engine: Engine, cache: str | Path | None = None, run_costs: RunCosts | None = None):
        self.engine, self.cache = engine, None if cache is None else Path(cache)
        self._scores: dict[tuple[int, str], Scores] = {}
        self._costs = run_costs
        if self.cache is None:
            return
        self._setting = engine.evaluator.key()
        for row in (row for row in self._rows() if row.setting == self._setting):
            if row.scores is not None:
                self._scores.setdefault((row.steps, row.reuse), {}).update(row.scores)
            elif row.machine == _machine(engine.evaluator):
                self._costs = self._costs or row.costs

    @property
    def costs(self) -> RunCosts:
        """What runs of the setting cost here."""
        if self._costs is None:
            self._costs = costs.measure(self.engine.evaluator)
            self._append(machine=_machine(self.engine.evaluator), costs=self._costs)
        return self._costs

    def seconds(self, policy: Policy, steps: int) -> float:
        """Predicted, of one batch of a run of `steps`."""
        return self.costs.seconds(self.engine.evaluator.at(steps).schedule(policy))

    def fits(self, policy: Policy, steps: int, memory_budget: int | None) -> bool:
        """Do maps and outputs of one batch fit into so many bytes?"""
        return memory_budget is None or self.engine.evaluator.at(steps).map_bytes(policy) <= memory_budget

    def __call__(
        self, policies: list[Policy], metrics: tuple[str, ...] = ("psnr",), steps: list[int] | None = None
    ) -> list[Scores]:
        """Scores of `policies`, in order, each for a run of its `steps` (default: the setting's)."""
        steps = steps or [self.engine.evaluator.setting.steps] * len(policies)
        keys = [(count, _text(policy)) for policy, count in zip(policies, steps, strict=True)]
        missing = {
            key: policy
            for key, policy in zip(keys, policies, strict=True)
            if not set(metrics) <= self._scores.get(key, {}).keys()
        }
        new = list(missing)
        for i, scores in self.engine.run(list(missing.values()), metrics, [count for count, _ in new]):
            self.engine.evaluator.calls.schedules += 1
            self._scores.setdefault(new[i], {}).update(scores)
            self._append(steps=new[i][0], reuse=new[i][1], scores=scores)
        return [self._scores[key] for key in keys]

    def _append(self, **row: Any) -> None:
        if self.cache is None:
            return
        with self.cache.open("a") as file:
            file.write(_Kept(setting=self._setting, **row).model_dump_json(exclude_none=True) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _rows(self) -> list[_Kept]:
        """Lines of the cache; one that a kill cut short is cut off."""
        data = self.cache.read_bytes() if self.cache.exists() else b""
        whole, rest = data[: data.rfind(b"\n") + 1], data[data.rfind(b"\n") + 1 :]
        begin = b'{"setting":'
        try:
            rows = [_Kept.model_validate_json(line) for line in whole.splitlines()]
            if not (rest.startswith(begin) or begin.startswith(rest)):
                raise ValueError
        except ValueError as error:
            raise ValueError(f"{self.cache} is not a file of scores: give another, or move it away") from error
        if rest:
            self.cache.write_bytes(whole)
        return rows


# -- step-wise search


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
        setting: the other fields of :class:`~attnreuse.evaluate.Setting`: ``guidance``, ``size``,
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
    climb = _Climb(engine, objective, budget, patience, Judge(engine, cache), progress, rank)
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
    climb = _Climb(engine, objective, total, None, Judge(engine, cache), progress, None)
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
        self.evaluator, self.objective, self.judge_policies = engine.evaluator, objective, judge
        self.budget, self.patience, self.progress, self.rank = budget, patience, progress, rank
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
                self.history.append(Improvement(len(self.values), strip(row), scores[self.objective.metric]))
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
            policy,
            self.scores[self.first][metric],
            self.history,
            len(self.values),
            self.stopped,
            self.evaluator.calls,
            {strip(row): s[metric] for row, s in self.scores.items()},
        )

    def _now(self) -> str:
        """The metric of the schedule that the search began with, and of the best."""
        metric = self.objective.metric
        first, best = (self.scores[row][metric] for row in (self.first or self.best, self.best))
        return f"{metric} {first:.4g} at the start, best {best:.4g}"

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


# -- helpers


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


def _machine(evaluator: Evaluator) -> str:
    """The device and threads that the costs of a run belong to."""
    about = environment(evaluator.pipe.unet.device)
    return f"{about['device']}, {about['threads']} threads"


def _text(policy: Policy) -> str:
    """The schedule alone, as a cache's key."""
    if isinstance(policy.reuse, dict):
        return json.dumps({name: strip(row) for name, row in policy.reuse.items()}, sort_keys=True)
    return strip(policy.reuse)
