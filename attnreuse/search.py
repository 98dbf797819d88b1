"""PHAST: local search around HURRY for the schedule whose pictures stay closest to the full-step ones.

A neighbour of a schedule lets one reuse step and one computed step trade places. The search is a
deterministic function of the scores and the seed, and every score is kept in a file, so a search
that was killed goes on where it was, and finds what it would have found.

Source: arXiv 2401.01008 (PHAST); objectives, restarts, prefix sharing and layer-wise allocation are ours.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from attnreuse import planner
from attnreuse.denoiser import layer_kinds
from attnreuse.errors import AttnReuseError
from attnreuse.evaluate import Calls, Evaluator, Setting
from attnreuse.formats import map_format as format_named
from attnreuse.metrics import HIGHER_IS_BETTER
from attnreuse.policy import Policy, hurry
from attnreuse.rows import room_for, strip, trades

Row = tuple[bool, ...]  # per executed step: reuse?
Scores = dict[str, float]
Value = tuple[int, float]  # larger is better
MOST = 20_000  # schedules that `exhaustive` agrees to evaluate


# -- what is sought


@dataclass(frozen=True)
class Objective:
    """Best mean `metric`; or, with a `floor` for it, the fastest schedule that keeps above.

    Attributes:
        metric: "psnr" (dB), "ssim" or "lpips".
        floor: worst acceptable metric; then the predicted seconds in attention are minimised.
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
        enough = self.quality(scores) >= self.quality({self.metric: self.floor})
        return (1, -seconds) if enough else (0, self.quality(scores))


@dataclass(frozen=True)
class Step:
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
        calls: denoiser calls asked for and made, in this process.
        scores: metric of every schedule judged, by its row ("..RR").
    """

    policy: Policy
    start: float
    history: list[Step]
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
    """Scores schedules; yields (index, scores) as they are done."""

    evaluator: Evaluator

    def run(self, policies: list[Policy], metrics: tuple[str, ...]) -> Iterator[tuple[int, Scores]]: ...


class InProcess:
    """One schedule after the other, here."""

    def __init__(self, evaluator: Evaluator):
        self.evaluator = evaluator

    def run(self, policies: list[Policy], metrics: tuple[str, ...]) -> Iterator[tuple[int, Scores]]:
        for i, policy in enumerate(policies):
            yield i, self.evaluator.scores(policy, metrics)


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

    def run(self, policies: list[Policy], metrics: tuple[str, ...]) -> Iterator[tuple[int, Scores]]:
        from ray.util import ActorPool

        jobs = list(enumerate(policies))
        yield from ActorPool(self.actors).map_unordered(lambda actor, job: actor.scores.remote(*job, metrics), jobs)

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

    def scores(self, index: int, policy: Policy, metrics: tuple[str, ...]) -> tuple[int, Scores]:
        return index, self.evaluator.scores(policy, metrics)


@dataclass
class Judge:
    """Scores of schedules through an engine, each judged once ever: a JSON line per schedule is kept.

    Args:
        engine: judges what the file does not hold.
        cache: the file; None keeps scores in memory only.
    """

    engine: Engine
    cache: Path | None = None
    _held: dict[str, Scores] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.cache is None:
            return
        self.cache = Path(self.cache)
        key = self.engine.evaluator.key()
        for line in self._whole_lines():
            row = json.loads(line)
            if row["setting"] == key:
                self._held.setdefault(row["reuse"], {}).update(row["scores"])

    def __call__(self, policies: list[Policy], metrics: tuple[str, ...] = ("psnr",)) -> list[Scores]:
        """Scores of `policies`, in order."""
        missing = {}
        for policy in policies:
            if not set(metrics) <= set(self._held.get(_text(policy), {})):
                missing.setdefault(_text(policy), policy)
        new = list(missing.values())
        for i, scores in self.engine.run(new, metrics):
            self._keep(_text(new[i]), scores)
        return [self._held[_text(policy)] for policy in policies]

    def _keep(self, text: str, scores: Scores) -> None:
        self._held.setdefault(text, {}).update(scores)
        if self.cache is None:
            return
        row = {"setting": self.engine.evaluator.key(), "reuse": text, "scores": scores}
        with self.cache.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _whole_lines(self) -> list[str]:
        """Lines of the cache; one that a kill cut short is cut off."""
        if not self.cache.exists():
            return []
        data = self.cache.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            self.cache.write_bytes(whole)
        return whole.decode().splitlines()


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
    progress: Callable[[int, int, float], None] = lambda evaluations, budget, best: None,
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
        engine: "local", "ray", or an engine at hand.
        progress: called with (evaluations, budget, best metric so far).
        setting: the other fields of :class:`~attnreuse.evaluate.Setting`: ``guidance``, ``size``,
            ``map_format``, ``layers``, ``batch``.

    Raises:
        ValueError: more reuses than fit, unknown metric, a start of another length.
    """
    if variant not in ("greedy", "exhaustive"):
        raise ValueError(f"variant must be 'greedy' or 'exhaustive', got {variant!r}")
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
    progress: Callable[[int, int, float], None] = lambda evaluations, budget, best: None,
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
        progress: Callable[[int, int, float], None],
        rank: Callable[[Policy], float] | None,
    ):
        self.evaluator, self.objective, self.judge_policies = engine.evaluator, objective, judge
        self.budget, self.patience, self.progress, self.rank = budget, patience, progress, rank
        self.values: dict[Row, Value] = {}
        self.scores: dict[Row, Scores] = {}
        self.here: Row = ()
        self.best: Row = ()
        self.first: Row = ()
        self.history: list[Step] = []
        self.since = 0  # evaluations since this start last improved
        self.stopped = "local optimum"
        self._costs: dict[str, planner.LayerCost] | None = None

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
                self.history.append(Step(len(self.values), strip(row), scores[self.objective.metric]))
            self.progress(len(self.values), self.budget, self.scores[self.best][self.objective.metric])
        return sorted((r for r in rows if r in self.values), key=lambda r: self.values[r], reverse=True)

    def step(self, width: int | None, rng: random.Random) -> bool:
        """Move to a better neighbour; False where there is none, or the budget is spent."""
        if self.here not in self.values:
            return False
        rows = self._neighbours(rng)
        for at in range(0, len(rows), width or len(rows)):
            found = self.judge(rows[at : at + (width or len(rows))])
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
        budget = self.objective.memory_budget
        return budget is None or self.evaluator.map_bytes(self.evaluator.policy(row, "candidate")) <= budget

    def _seconds(self, policy: Policy) -> float:
        """Predicted seconds in attention; only where a floor makes them matter."""
        if self.objective.floor is None:
            return 0.0
        self._costs = self._costs or layer_costs(self.evaluator)
        return _cost(self.evaluator, self._costs, policy)


# -- layer-wise allocation


@dataclass(frozen=True)
class Rung:
    """A group of layers under one schedule: what it saves and what error it alone makes (mean squared)."""

    group: str
    row: Row
    saving: float
    error: float


@dataclass
class LayerwiseResult:
    """`policy` per layer; its `saving`, the sensitivity scan behind it, and the metric measured and predicted."""

    policy: Policy
    saving: float
    psnr_db: float
    predicted_psnr_db: float
    scan: list[Rung]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        found = asdict(self) | {"policy": self.policy.model_dump(mode="json", exclude_none=True)}
        return found | {"scan": [asdict(r) | {"row": strip(r.row)} for r in self.scan]}


def layer_groups(evaluator: Evaluator, by: Literal["kind", "level", "layer"]) -> dict[str, list[str]]:
    """Served layers by "kind" (self, cross), by kind and "level" (query tokens), or each "layer" alone."""
    kinds, shapes = layer_kinds(evaluator.pipe.unet), evaluator.shapes()
    groups: dict[str, list[str]] = {}
    for name in evaluator.served():
        label = {"kind": kinds[name], "level": f"{kinds[name]}@{shapes[name].map[2]}", "layer": name}[by]
        groups.setdefault(label, []).append(name)
    return groups


def layer_costs(evaluator: Evaluator) -> dict[str, planner.LayerCost]:
    """Measured seconds of each served layer by action, at the evaluator's shapes, on its device."""
    unet, chosen = evaluator.pipe.unet, format_named(evaluator.setting.map_format)
    return planner.measure_costs(evaluator.served(), evaluator.shapes(), chosen, unet.dtype, unet.device)


def map_costs(evaluator: Evaluator) -> dict[str, planner.LayerCost]:
    """The paper's cost: map elements computed (a reuse costs nothing, a capture no more than a compute)."""
    return {name: planner.LayerCost(size, size, 0.0, 0.0) for name, size in evaluator.map_sizes().items()}


def layerwise(
    engine: Engine,
    *,
    by: Literal["kind", "level", "layer"] = "level",
    saving: float,
    costs: dict[str, planner.LayerCost],
    ladder: Iterable[Row] | None = None,
    memory_budget: int | None = None,
    cache: str | Path | None = None,
    progress: Callable[[int, int, float], None] = lambda evaluations, budget, best: None,
) -> LayerwiseResult:
    """Give each group of layers its own schedule: scan what each does alone, then allocate greedily.

    Errors of groups are taken to add (as mean squares); the result is measured, and says how well that held.

    Args:
        by: see :func:`layer_groups`.
        saving: wanted share of the computed cost of all served layers.
        costs: of each layer by action (:func:`layer_costs`, :func:`map_costs`).
        ladder: schedules to choose from; default: HURRY with fresh maps and with maps two, four and any steps old.
        memory_budget: most bytes of maps.

    Raises:
        AttnReuseError: the wanted saving cannot be reached.
    """
    evaluator, judge = engine.evaluator, Judge(engine, cache)
    groups = layer_groups(evaluator, by)
    rows = list(dict.fromkeys(ladder if ladder is not None else _ladder(evaluator.executed_steps)))
    policies = {
        (group, row): evaluator.policy(dict.fromkeys(names, row), f"{group} alone")
        for group, names in groups.items()
        for row in rows
    }
    total = _cost(evaluator, costs, evaluator.policy([False] * evaluator.executed_steps, "full"))
    scan = []
    for i, ((group, row), policy) in enumerate(policies.items()):
        psnr = judge([policy])[0]["psnr"]
        scan.append(Rung(group, row, (total - _cost(evaluator, costs, policy)) / total, 10 ** (-psnr / 10)))
        progress(i + 1, len(policies), psnr)
    chosen = _allocate(scan, saving, lambda picked: _rows_fit(evaluator, groups, picked, memory_budget))
    policy = evaluator.policy(
        {name: rung.row for rung in chosen.values() for name in groups[rung.group]}, f"layerwise({by},{saving:.2f})"
    )
    psnr = judge([policy])[0]["psnr"]
    policy = policy.model_copy(update={"metrics": {"psnr_db": round(psnr, 4)}})
    predicted = -10 * math.log10(sum(rung.error for rung in chosen.values()))
    return LayerwiseResult(policy, _saved(chosen), psnr, predicted, scan)


def _allocate(scan: list[Rung], saving: float, fits: Callable[[dict[str, Rung]], bool]) -> dict[str, Rung]:
    """Climb, one group at a time, the rung that saves most per error added, until enough is saved."""
    chosen: dict[str, Rung] = {}
    while _saved(chosen) < saving:
        gains = []
        for rung in scan:
            held = chosen.get(rung.group)
            more = rung.saving - (held.saving if held else 0.0)
            worse = rung.error - (held.error if held else 0.0)
            if more > 1e-12 and fits(chosen | {rung.group: rung}):
                gains.append((more / worse if worse > 0 else math.inf, more, rung))
        if not gains:
            raise AttnReuseError(f"a saving of {saving:.0%} cannot be reached here: at most {_saved(chosen):.0%}")
        rung = max(gains, key=lambda g: g[:2])[2]
        chosen[rung.group] = rung
    return _relaxed(chosen, scan, saving, fits)


def _relaxed(
    chosen: dict[str, Rung], scan: list[Rung], saving: float, fits: Callable[[dict[str, Rung]], bool]
) -> dict[str, Rung]:
    """Take back what the climb saved too much: change the group that lowers the error most, while enough is saved."""

    def error(picked: dict[str, Rung]) -> float:
        return math.fsum(rung.error for rung in picked.values())

    while True:
        without = [{name: rung for name, rung in chosen.items() if name != group} for group in chosen]
        others = [chosen | {rung.group: rung} for rung in scan if rung.group in chosen]
        enough = [p for p in without + others if error(p) < error(chosen) and _saved(p) >= saving and fits(p)]
        if not enough:
            return chosen
        chosen = min(enough, key=error)


def _saved(picked: dict[str, Rung]) -> float:
    return sum(rung.saving for rung in picked.values())


def _rows_fit(
    evaluator: Evaluator, groups: dict[str, list[str]], picked: dict[str, Rung], memory_budget: int | None
) -> bool:
    if memory_budget is None:
        return True
    rows = {name: rung.row for rung in picked.values() for name in groups[rung.group]}
    return evaluator.map_bytes(evaluator.policy(rows, "candidate")) <= memory_budget


def _ladder(steps: int) -> list[Row]:
    rows = []
    for age in (1, 2, 4, None):
        room = room_for(steps, steps if age is None else age)
        counts = {max(1, round(room * share)) for share in (0.25, 0.5, 0.75, 1)}
        rows += [hurry(steps, count, age).reuse for count in sorted(counts)]
    return rows


def _cost(evaluator: Evaluator, costs: dict[str, planner.LayerCost], policy: Policy) -> float:
    schedule = evaluator.schedule(policy)
    return sum(cost.total(schedule.actions[name]) for name, cost in costs.items())


# -- rows


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


def _text(policy: Policy) -> str:
    """The schedule alone, as a cache's key."""
    if isinstance(policy.reuse, dict):
        return json.dumps({name: strip(row) for name, row in policy.reuse.items()}, sort_keys=True)
    return strip(policy.reuse)
