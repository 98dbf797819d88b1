"""What a run takes on this machine: layers timed in their place, within runs of the pipeline.

Timed alone, in a warm cache and without what a session does around them, layers seem to save more than they do.
"""

from __future__ import annotations

import functools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

from torch.nn import Module

from attnreuse.binding.denoiser import find_denoiser
from attnreuse.binding.hooks import Attached
from attnreuse.binding.processors import attention_layers
from attnreuse.binding.report import Report
from attnreuse.binding.schedule import CACHED, Schedule
from attnreuse.binding.shapes import LayerCost
from attnreuse.errors import AttnReuseError
from attnreuse.measure.timing import Times, in_turns, stopwatch
from attnreuse.policy import Action, Policy
from attnreuse.progress import Progress, counted, silent
from attnreuse.study.evaluate import Evaluator

ROUNDS = 3
Taken = dict[tuple[str, Action], list[float]]  # seconds of each step of a layer, by what it did


@dataclass(frozen=True)
class RunCosts:
    """Seconds that one batch of pictures takes.

    Attributes:
        fixed: once a run, before the first step and after the last.
        step: each executed step outside of the served layers, the scheduler's work included.
        session: what each executed step takes longer where maps or outputs are kept.
        layers: each served layer at one step, by action, with its projections.
    """

    fixed: float
    step: float
    session: float
    layers: dict[str, LayerCost]

    def seconds(self, schedule: Schedule) -> float:
        """Of a run with this schedule of the same layers.

        Raises:
            AttnReuseError: it serves layers whose costs are not known.
        """
        if unknown := schedule.actions.keys() - self.layers.keys():
            raise AttnReuseError(f"no costs were measured of {sorted(unknown)[0]}: name it by layers")
        attention = sum(self.layers[name].total(row) for name, row in schedule.actions.items())
        caches = any(action in CACHED for row in schedule.actions.values() for action in row)
        step = self.step + (self.session if caches else 0)
        return self.fixed + step * schedule.policy.steps + attention


@dataclass(frozen=True)
class _Run:
    """Seconds of one run: of its steps, of what lies outside of them, and of each layer's steps."""

    steps: float
    outside: float
    taken: Taken

    @property
    def layers(self) -> float:
        return sum(map(sum, self.taken.values()))


def measure(evaluator: Evaluator, rounds: int = ROUNDS, progress: Progress = silent) -> RunCosts:
    """Costs of the evaluator's layers, at its setting and map format.

    Medians over `rounds` runs of one batch, in turns of random order: stock, every other step reused, every other held.

    Args:
        progress: called before each run, with the number of these done, of all; it counts "runs".

    Raises:
        AttnReuseError: a layer is not called as often in each step, or does not do what its policy says.
    """
    one = _one_batch(evaluator, evaluator.setting.steps)
    steps = one.executed_steps
    kinds: dict[str, Policy | None] = {"stock": None}
    for name, letter in (("reuse", True), ("hold", "H")):
        kinds[name] = Policy(steps=steps, reuse=[i % 2 and letter for i in range(steps)])
    names, of = list(kinds), rounds * len(kinds) + 1
    progress(0, of, "warm-up", "runs")
    _ = one.full

    def tell(done: int, i: int) -> None:
        progress(done + 1, of, f"timing {names[i]}", "runs")

    calls = [functools.partial(_timed, one, policy) for policy in kinds.values()]
    stock, reused, held = in_turns(calls, rounds, tell)
    runs: dict[bool, list[_Run]] = {False: stock, True: reused + held}  # by whether a session serves them
    taken: Taken = defaultdict(list)
    for run in runs[True] + runs[False]:
        for key, seconds in run.taken.items():
            taken[key] += seconds
    step, served = (statistics.median((r.steps - r.layers) / steps for r in runs[key]) for key in (False, True))
    fixed, begun = (statistics.median(r.outside for r in runs[key]) for key in (False, True))
    session = max(0.0, served - step + (begun - fixed) / steps)
    return RunCosts(fixed, step, session, {name: _cost(taken, name) for name in one.served()})


def shares(
    evaluator: Evaluator, runs: list[tuple[int, Policy]], rounds: int = ROUNDS, progress: Progress = silent
) -> list[float]:
    """Measured time of each of `runs`, of so many steps with a policy, as a share of the full run's.

    Medians over `rounds` of one batch, all in turns of random order. `progress`: as in :func:`measure`.
    """
    full = evaluator.policy([False] * evaluator.executed_steps, "full steps")

    def seconds(steps: int, policy: Policy) -> float:
        one = _one_batch(evaluator, steps)
        # A policy that never reuses is timed as the stock pipeline is: nobody enables it.
        return one.run(lambda start: one.enabled(policy) if policy.reuse_steps else nullcontext()).seconds

    timed = [(evaluator.setting.steps, full), *runs]

    def tell(done: int, i: int) -> None:
        of = rounds * len(timed)
        progress(done, of, f"timing {timed[i][1].name}, {counted(timed[i][0], 'step')}", "runs")

    whole, *others = in_turns([functools.partial(seconds, *run) for run in timed], rounds, tell)
    return [Times.of_ratios(own, whole).median for own in others]


def _one_batch(evaluator: Evaluator, steps: int) -> Evaluator:
    """Its first batch, of a run of `steps`, with nothing replayed."""
    setting = evaluator.setting
    setting = replace(setting, prompts=setting.prompts[: setting.batch], steps=steps)
    return Evaluator(evaluator.pipe, setting, memo_bytes=0)


def attention(evaluator: Evaluator) -> dict[str, float]:
    """Seconds of each served layer at one step of a stock run of one batch, with its projections: medians."""
    taken = _timed(evaluator, None).taken
    return {name: statistics.median(seconds) for (name, _), seconds in taken.items()}


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
    taken: Taken = defaultdict(list)
    for name, found in marks.items():
        calls, actions = _pairs(found, between), schedule.actions[name]
        if not calls or len(calls) % len(actions):
            raise AttnReuseError(
                f"{name} was called {len(calls)} times in {len(actions)} steps: its costs cannot be told by step"
            )
        per_step = len(calls) // len(actions)
        for i, action in enumerate(actions):
            taken[name, action].append(sum(calls[i * per_step : (i + 1) * per_step]))
    loop, called = between(within[0], within[-1]), sum(_pairs(within, between))
    last = (loop - called) / max(1, len(within) // 2 - 1)  # the scheduler's last step, as long as those between calls
    return _Run(loop + last, between(*whole) - loop - last, taken)


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


def _pairs(marks: list[Any], between: Callable[[Any, Any], float]) -> list[float]:
    return [between(begin, end) for begin, end in zip(marks[::2], marks[1::2], strict=True)]


def _cost(taken: Taken, name: str) -> LayerCost:
    """Medians by action; what a layer never did costs what computing does."""
    computed = taken[name, Action.COMPUTE]
    return LayerCost(*(statistics.median(taken[name, Action(f.name)] or computed) for f in fields(LayerCost)))
