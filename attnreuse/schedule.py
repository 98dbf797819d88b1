"""A schedule: what each served layer does at each step of a run, by the run's policy."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from attnreuse.policy import Action, Policy


class Schedule:
    """The actions of `layers` under `policy`.

    Attributes:
        policy: it follows from.
        actions: per step what each layer does, by layer name.
        steps: the same by step: an action per layer, in the order of the layers.
        first_capture: the first step that captures, or None.
        last_reuse: the last step that reuses, or -1.
    """

    def __init__(self, policy: Policy, layers: Iterable[str]):
        self.policy = policy
        self.actions = {name: policy.actions(name) for name in layers}
        self.steps = list(zip(*self.actions.values(), strict=True))
        self.first_capture = next((i for i, step in enumerate(self.steps) if Action.CAPTURE in step), None)
        self.last_reuse = max((i for i, step in enumerate(self.steps) if Action.REUSE in step), default=-1)
        self._due = {name: _captures(row) for name, row in self.actions.items()}

    def at(self, step: int) -> tuple[Action, ...]:
        """What every layer does at `step`; beyond the policy's last, all compute."""
        return self.steps[step] if step < len(self.steps) else (Action.COMPUTE,) * len(self.actions)

    def planned(self, name: str, step: int) -> Action:
        """What layer `name` does at `step`."""
        row = self.actions[name]
        return row[step] if step < len(row) else Action.COMPUTE

    def due(self, name: str, step: int) -> int:
        """The step whose map layer `name` reuses at `step`."""
        return self._due[name][step]


def _captures(row: list[Action]) -> list[int]:
    """Per step: the latest step up to it that captures, or -1."""
    return list(itertools.accumulate((i if action is Action.CAPTURE else -1 for i, action in enumerate(row)), max))
