"""A schedule: what each served layer does at each step of a run, by the run's policy."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from attnreuse.policy import Action, Policy

EXACT = (Action.COMPUTE, Action.CAPTURE)
CACHED = (Action.REUSE, Action.HOLD)
Planned = tuple[Action, bool]  # what a layer does, and whether it keeps its output for the next step to hold
NOTHING: Planned = (Action.COMPUTE, False)


class Schedule:
    """The actions of `layers` under `policy`.

    Args:
        holding: those of them whose values never change within a run: they hold their output instead of
            reusing a map, which would give the same.

    Attributes:
        policy, holding: it follows from.
        actions: per step what each layer does, by layer name.
        steps: the same by step, with what is kept: one per layer, in the order of the layers.
        first_kept: the first step that captures a map or keeps an output, or None.
        last_reuse: the last step that reuses or holds, or -1.
    """

    def __init__(self, policy: Policy, layers: Iterable[str], holding: Sequence[str] = ()):
        self.policy, self.holding = policy, holding
        self.actions = {name: policy.actions(name, name in holding) for name in layers}
        planned = [list(zip(row, kept_outputs(row), strict=True)) for row in self.actions.values()]
        self.steps = list(zip(*planned, strict=True))
        stored = [i for i, step in enumerate(self.steps) if any(a is Action.CAPTURE or keep for a, keep in step)]
        self.first_kept = stored[0] if stored else None
        self.last_reuse = max((i for i, step in enumerate(self.steps) if any(a in CACHED for a, _ in step)), default=-1)
        self._captures = {name: _latest(row, EXACT) for name, row in self.actions.items()}
        self._outputs = {name: _latest(row, (*EXACT, Action.REUSE)) for name, row in self.actions.items()}

    def at(self, step: int) -> tuple[Planned, ...]:
        """What every layer does at `step`; beyond the policy's last, all compute."""
        return self.steps[step] if step < len(self.steps) else (NOTHING,) * len(self.actions)

    def planned(self, name: str, step: int) -> Action:
        """What layer `name` does at `step`."""
        row = self.actions[name]
        return row[step] if step < len(row) else Action.COMPUTE

    def due(self, name: str, step: int) -> int:
        """The step whose map layer `name` reuses at `step`, or whose output it holds."""
        latest = self._outputs if self.actions[name][step] is Action.HOLD else self._captures
        return latest[name][step]

    def reuses(self, name: str) -> bool:
        """Whether layer `name` reuses or holds at any step."""
        return any(action in CACHED for action in self.actions[name])

    def reuses_after(self, name: str, step: int) -> bool:
        """Whether layer `name` reuses after `step` before it is to compute again."""
        following = itertools.takewhile(lambda action: action in CACHED, self.actions[name][step + 1 :])
        return Action.REUSE in following


def kept_outputs(row: list[Action]) -> list[bool]:
    """Per step: does the next one hold its output?"""
    return [a is not Action.HOLD and then is Action.HOLD for a, then in itertools.pairwise([*row, Action.COMPUTE])]


def _latest(row: list[Action], actions: tuple[Action, ...]) -> list[int]:
    """Per step: the latest step up to it with one of these actions, or -1."""
    return list(itertools.accumulate((i if action in actions else -1 for i, action in enumerate(row)), max))
