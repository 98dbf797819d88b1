"""What a run takes on this machine: layers timed in their place, within runs of the pipeline.

Timed alone, in a warm cache and without what a session does around them, layers seem to save more than they do.
"""

from __future__ import annotations

import functools
import itertools
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

from torch.nn import Module

from attnreuse.binding.denoiser import find_denoiser, model_name
from attnreuse.binding.hooks import Attached
from attnreuse.binding.processors import attention_layers
from attnreuse.binding.report import Report
from attnreuse.binding.schedule import CACHED, Schedule
from attnreuse.binding.shapes import LayerCost
from attnreuse.errors import AttnReuseError
from attnreuse.measure.timing import Times, paced, paced_runs, stopwatch
from attnreuse.policy import Action, Policy
from attnreuse.progress import Progress, counted, silent
from attnreuse.study.evaluate import Evaluator

ROUNDS = 3
CACHING: dict[str, Any] = {"reuse": True, "hold": "H"}  # the letter of every other step, in runs that are timed
Taken = dict[tuple[str, Action], list[float]]  # seconds of each step of a layer, by what it did


@dataclass(frozen=True)
class RunCosts:
    """Seconds that one batch of pictures takes.

    Attributes:
        fixed: once a run, before the first step and after the last.
        step: each executed step outside of the served layers, the scheduler's work included.
        session: what each executed step takes longer where maps or outputs are kept.
        layers: each served layer at one step, by action, with its projections.
        begin: what a run takes longer, once, where maps or outputs are kept.
    """

    fixed: float
    step: float
    session: float
    layers: dict[str, LayerCost]
    begin: float = 0.0

    def seconds(self, schedule: Schedule) -> float:
        """Of a run with this schedule of the same layers.

        Raises:
            AttnReuseError: it serves layers whose costs are not known.
        """
        if unknown := schedule.actions.keys() - self.layers.keys():
            raise AttnReuseError(f"no costs were measured of {sorted(unknown)[0]}: name it by layers")
        attention = sum(self.layers[name].total(row) for name, row in schedule.actions.items())
        caches = any(action in CACHED for row in schedule.actions.values() for action in row)
        fixed, step = (self.fixed + self.begin, self.step + self.session) if caches else (self.fixed, self.step)
        return fixed + step * schedule.policy.steps + attention


@dataclass(frozen=True)
class _Run:
    """Seconds of one run: outside of its steps; of each step outside of the layers; and of each layer's steps."""

    outside: float
    rest: list[float]
    taken: Taken

    @property
    def total(self) -> float:
        return self.outside + sum(self.rest) + sum(map(sum, self.taken.values()))

    def scaled(self, by: float) -> _Run:
        """As a machine has it on which everything takes `by` times as long."""
        taken = {key: [by * seconds for seconds in steps] for key, steps in self.taken.items()}
        return _Run(by * self.outside, [by * seconds for seconds in self.rest], taken)


def measure(evaluator: Evaluator, rounds: int = ROUNDS, progress: Progress = silent) -> RunCosts:
    """Costs of the evaluator's layers, at its setting and map format.

    Medians over `rounds` runs of one batch in which every other step reuses, as many in which every other holds, and
    stock runs before and after each, at whose pace it is told: a shared machine is slower for a while, then faster.

    Args:
        progress: called before each run, with the number of these done, of all; it counts "runs".

    Raises:
        AttnReuseError: a layer is not called as often in each step, or does not do what its policy says.
    """
    one = _one_batch(evaluator, evaluator.setting.steps)
    stock, served = _at_one_pace(one, rounds, progress)
    taken: Taken = defaultdict(list)
    for run in stock + served:
        for key, seconds in run.taken.items():
            taken[key] += seconds
    fixed, begun = (statistics.median(run.outside for run in runs) for runs in (stock, served))
    step, kept = (statistics.median(rest for run in runs for rest in run.rest) for runs in (stock, served))
    layers = {name: _cost(taken, name) for name in one.served()}
    return RunCosts(fixed, step, max(0.0, kept - step), layers, begin=max(0.0, begun - fixed))


def _at_one_pace(one: Evaluator, rounds: int, progress: Progress) -> tuple[list[_Run], list[_Run]]:
    """After a warm-up, stock runs, and between every two one that reuses or holds; all told at the stock ones' pace."""
    steps, order, done = one.executed_steps, random.Random(0), itertools.count()
    kinds = {name: one.policy([i % 2 and letter for i in range(steps)], name) for name, letter in CACHING.items()}

    of = 2 + 2 * rounds * len(kinds)

    def run(name: str) -> _Run:
        progress(next(done), of, f"timing {name}", unit="runs")
        return _timed(one, kinds.get(name))

    progress(next(done), of, "warm-up", unit="runs")
    _ = one.full
    stock, served, paces = [run("stock")], [], []
    for name in (name for _ in range(rounds) for name in order.sample(list(kinds), len(kinds))):
        served.append(run(name))
        stock.append(run("stock"))
        paces.append((stock[-2].total + stock[-1].total) / 2)
    usual = statistics.median(each.total for each in stock)
    return (
        [each.scaled(usual / each.total) for each in stock],
        [each.scaled(usual / pace) for each, pace in zip(served, paces, strict=True)],
    )


def shares(
    evaluator: Evaluator, runs: list[tuple[int, Policy]], rounds: int = ROUNDS, progress: Progress = silent
) -> list[float]:
    """Measured time of each of `runs`, of so many steps with a policy, as a share of the full run's.

    Medians over `rounds` of one batch, all in turns at the full run's pace. `progress`: as in :func:`measure`.
    """
    full = evaluator.policy([False] * evaluator.executed_steps, "full steps")

    def seconds(steps: int, policy: Policy) -> float:
        one = _one_batch(evaluator, steps)
        # A policy that never reuses is timed as the stock pipeline is: nobody enables it.
        return one.run(lambda start: one.enabled(policy) if policy.reuse_steps else nullcontext()).seconds

    timed, of = [(evaluator.setting.steps, full), *runs], paced_runs(len(runs), rounds)

    def tell(done: int, i: int) -> None:
        progress(done, of, f"timing {timed[i][1].name}, {counted(timed[i][0], 'step')}", unit="runs")

    reference, *calls = (functools.partial(seconds, *run) for run in timed)
    whole, *others = paced(reference, calls, rounds, tell)
    return [Times.of_ratios(own, whole).median for own in others]


def _one_batch(evaluator: Evaluator, steps: int) -> Evaluator:
    """Its first batch, of a run of `steps`, with nothing replayed."""
    setting = evaluator.setting
    setting = replace(setting, prompts=setting.prompts[: setting.batch], steps=steps)
    return Evaluator(evaluator.pipe, setting, memo_bytes=0)


def attention(evaluator: Evaluator, steps: int) -> dict[str, float]:
    """Share of a stock run of executed `steps` that each served layer takes at one of them, with its projections.

    By medians of one run of one batch, after a warm-up: shares hold at any pace of the machine.
    """
    evaluator.run(lambda start: nullcontext())
    run = _timed(evaluator, None)
    layers = {name: statistics.median(seconds) for (name, _), seconds in run.taken.items()}
    whole = run.outside + steps * (statistics.median(run.rest) + sum(layers.values()))
    return {name: seconds / whole for name, seconds in layers.items()}


def _timed(evaluator: Evaluator, policy: Policy | None) -> _Run:
    """A run of one batch, stock or with `policy`, and what took how long in it."""
    denoiser = find_denoiser(evaluator.pipe)
    schedule = evaluator.schedule(policy or evaluator.policy([False] * evaluator.executed_steps, "stock"))
    mark, between = stopwatch(denoiser.device)
    layers, whole, within = attention_layers(denoiser), [], []
    marks: dict[str, list[Any]] = {name: [] for name in schedule.actions}
    timed = [(denoiser, within), *((layers[name], found) for name, found in marks.items())]

    @contextmanager
    def around(start: int) -> Iterator[None]:
        whole.append(mark())
        serving = nullcontext() if policy is None else evaluator.enabled(policy)
        with serving as session, ExitStack() as stack:
            for module, found in timed:
                stack.enter_context(_marked(module, found, mark))
            yield
            if session is not None:
                _check(session.report())
        whole.append(mark())

    evaluator.run(around)
    of_steps = _by_step(model_name(evaluator.pipe), within, schedule.policy.steps)
    begins, ends = zip(*((calls[0], calls[-1]) for calls in of_steps), strict=True)
    gaps = [between(end, begin) for end, begin in zip(ends, begins[1:], strict=False)]  # the scheduler's work
    gaps.append(statistics.median(gaps or [0.0]))  # the last is as long as the others
    rest = [between(begin, end) + gap for begin, end, gap in zip(begins, ends, gaps, strict=True)]
    outside = between(*whole) - sum(rest)
    taken: Taken = defaultdict(list)
    for name, found in marks.items():
        for i, calls in enumerate(_by_step(name, found, schedule.policy.steps)):
            seconds = sum(between(begin, end) for begin, end in zip(calls[::2], calls[1::2], strict=True))
            taken[name, schedule.actions[name][i]].append(seconds)
            rest[i] -= seconds
    return _Run(outside, rest, taken)


def _check(report: Report) -> None:
    """A layer that did not do what was planned would be timed as if it had."""
    for layer in report.layers:
        for reason in layer.reasons:
            raise AttnReuseError(f"costs cannot be told: {layer.name} does not do what the policy says: {reason}")


def _marked(module: Module, marks: list[Any], mark: Callable[[], Any]) -> Attached:
    """`marks` gets two marks of each call of the module: where it begins and where it ends."""

    def note(*call: Any) -> None:
        marks.append(mark())

    return Attached(module, before=note, after=note)


def _by_step(name: str, marks: list[Any], steps: int) -> list[list[Any]]:
    """Marks of the calls in each step: of each call two.

    Raises:
        AttnReuseError: it is not called as often in each step.
    """
    calls = len(marks) // 2
    if not calls or calls % steps:
        raise AttnReuseError(f"{name} was called {calls} times in {steps} steps: its costs cannot be told by step")
    of_step = 2 * (calls // steps)
    return [marks[i * of_step : (i + 1) * of_step] for i in range(steps)]


def _cost(taken: Taken, name: str) -> LayerCost:
    """Medians by action; what a layer never did costs what computing does."""
    computed = taken[name, Action.COMPUTE]
    return LayerCost(*(statistics.median(taken[name, Action(f.name)] or computed) for f in fields(LayerCost)))
