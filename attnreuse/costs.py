"""What a run takes on this machine: layers timed in their place, within runs of the pipeline.

Timed alone, in a warm cache and without what a session does around them, layers seem to save more than they do.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

from torch.nn import Module

from attnreuse.evaluate import Evaluator
from attnreuse.planner import LayerCost
from attnreuse.policy import Action, Policy
from attnreuse.processors import attention_layers
from attnreuse.schedule import Schedule
from attnreuse.session import enable
from attnreuse.timing import stopwatch

ROUNDS = 3
Taken = dict[tuple[str, Action], list[float]]  # seconds of each call of a layer, by what it did


@dataclass(frozen=True)
class RunCosts:
    """Seconds that one batch of pictures takes.

    Attributes:
        fixed: once a run, outside of the denoiser.
        step: each executed step within the denoiser, outside of the served layers.
        layers: each served layer at one step, by action, with its projections.
    """

    fixed: float
    step: float
    layers: dict[str, LayerCost]

    def seconds(self, schedule: Schedule) -> float:
        """Of a run with this schedule of the same layers."""
        attention = sum(cost.total(schedule.actions[name]) for name, cost in self.layers.items())
        return self.fixed + self.step * schedule.policy.steps + attention


def measure(evaluator: Evaluator) -> RunCosts:
    """Costs of the evaluator's layers, at its setting and map format.

    Medians of runs of one batch in turns: stock, every other step reused, every other held.
    """
    setting = evaluator.setting
    setting = replace(setting, prompts=setting.prompts[: setting.batch])
    one = Evaluator(evaluator.pipe, setting, memo_bytes=0)
    steps = one.executed_steps
    cached = [Policy(steps=steps, reuse=[letter if i % 2 else False for i in range(steps)]) for letter in (True, "H")]
    taken: Taken = defaultdict(list)
    outside: list[tuple[float, float]] = []  # seconds of stock runs outside of the denoiser, and of the layers within
    for policy in ROUNDS * [None, *cached]:
        seconds, denoiser, of_layers = _timed(one, policy)
        for key, calls in of_layers.items():
            taken[key] += calls
        if policy is None:
            outside.append((seconds - denoiser, (denoiser - sum(map(sum, of_layers.values()))) / steps))
    fixed, step = map(statistics.median, zip(*outside, strict=True))
    return RunCosts(fixed, step, {name: _cost(taken, name) for name in evaluator.served()})


def _timed(evaluator: Evaluator, policy: Policy | None) -> tuple[float, float, Taken]:
    """Seconds of a run of one batch, stock or with `policy`; of the denoiser's calls in it; of its layers' calls."""
    setting = evaluator.setting
    schedule = evaluator.schedule(policy or evaluator.policy([False] * evaluator.executed_steps, "stock"))
    mark, between = stopwatch(evaluator.pipe.unet.device)
    layers, whole, within = attention_layers(evaluator.pipe.unet), [], []
    marks: dict[str, list[Any]] = {name: [] for name in schedule.actions}
    timed = [(evaluator.pipe.unet, within), *((layers[name], found) for name, found in marks.items())]

    @contextmanager
    def around(start: int) -> Iterator[None]:
        given = {"map_format": setting.map_format, "layers": setting.layers}
        with (
            nullcontext() if policy is None else enable(evaluator.pipe, policy, **given),
            _marking(timed, mark),
        ):
            whole.append(mark())
            yield
            whole.append(mark())

    evaluator.run(around)
    taken: Taken = defaultdict(list)
    for name, found in marks.items():
        calls, actions = _pairs(found, between), schedule.actions[name]
        per_step = len(calls) // len(actions)
        for i, action in enumerate(actions):
            taken[name, action].append(sum(calls[i * per_step : (i + 1) * per_step]))
    return between(*whole), sum(_pairs(within, between)), taken


@contextmanager
def _marking(timed: list[tuple[Module, list[Any]]], mark: Callable[[], Any]) -> Iterator[None]:
    """Within, each module's list gets two marks of each of its calls: where it begins and where it ends."""
    hooks = []
    for module, found in timed:
        hooks.append(module.register_forward_pre_hook(lambda *_, found=found: found.append(mark())))
        hooks.append(module.register_forward_hook(lambda *_, found=found: found.append(mark())))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _pairs(marks: list[Any], between: Callable[[Any, Any], float]) -> list[float]:
    return [between(begin, end) for begin, end in zip(marks[::2], marks[1::2], strict=True)]


def _cost(taken: Taken, name: str) -> LayerCost:
    """Medians by action; what a layer never did costs what computing does."""
    computed = taken[name, Action.COMPUTE]
    return LayerCost(*(statistics.median(taken[name, Action(f.name)] or computed) for f in fields(LayerCost)))
