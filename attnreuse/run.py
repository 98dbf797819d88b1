"""A run: one walk of denoiser calls over timesteps, its branches, and the maps they hold.

A branch is the sequence of calls, at most one a step, that attend over the same: inputs of one shape and
the same conditions. Maps belong to a branch, and only what its layers have written is ever reused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnreuse.clock import Place
from attnreuse.conditions import Conditions
from attnreuse.loops import Loop
from attnreuse.report import Report
from attnreuse.ring import MapRing, plan_ring

CROWD = 8  # calls of one step that a loop nobody announced may make before they count as runs given up


class Call:
    """A denoiser call: its sample ``[B, C, H, W]`` and its conditions."""

    def __init__(self, given: dict[str, Any]):
        self.sample: Tensor = given["sample"]
        self.conditions = Conditions(given, len(self.sample))
        self.shape = (self.sample.shape[1:], self.sample.dtype, self.sample.device)
        self._version = None if self.sample.is_inference() else self.sample._version

    def distance(self, earlier: Call, rows: list[int]) -> Tensor:
        """Squared distance to these rows of an earlier sample, fp32 scalar; infinite where that was overwritten."""
        if earlier._version is None or earlier.sample._version != earlier._version:
            return torch.full((), torch.inf, device=self.sample.device)
        return (self.sample - earlier.sample[rows]).float().square().sum()


@dataclass(eq=False)
class Branch:
    """Calls that attend over the same.

    Attributes:
        call: the latest.
        step: of the latest call.
        ring: its maps; one without bytes where it holds none.
        why: why it holds no map of an earlier step, where there is more to say than that it is the first.
        missed: layers whose latest capture did not happen, with the reason.
    """

    call: Call
    step: int
    ring: MapRing
    why: str
    missed: dict[str, str] = field(default_factory=dict)

    def rows(self, call: Call) -> list[int] | None:
        """For each row of `call`, the row of this branch that attends over the same; or None."""
        return call.conditions.rows_of(self.call.conditions) if call.shape == self.call.shape else None

    def release(self, why: str) -> None:
        """Let go of the maps and their memory."""
        if self.ring.nbytes:
            self.ring, self.why = MapRing(plan_ring([], self.ring.plan.map_format), self.ring.buffer.device), why

    def is_whole(self, rows: list[int] | None) -> bool:
        """Whether `rows` are all of this branch, in order."""
        return rows == list(range(len(self.call.sample)))

    def difference(self, call: Call) -> str:
        """What tells `call` apart from this branch."""
        if call.shape != self.call.shape:
            return f"the sample is {list(call.sample.shape)}, it was {list(self.call.sample.shape)}"
        change = call.conditions.difference(self.call.conditions)
        if change is None and len(call.sample) != len(self.call.sample):
            change = f"the batch is {len(call.sample)}, it was {len(self.call.sample)}"
        return change or "the prompt has changed"


@dataclass(eq=False)
class Run:
    """One walk over timesteps.

    Attributes:
        begin: its first place.
        steps: that it will execute, as far as can be told.
        loop: the pipeline's loop that it belongs to; None for a loop of somebody's own.
        backward: it walks from the last timestep to the first.
        step, call: of the latest denoiser call: executed step, and number of the call within it.
        off: why every layer only computes, or None.
        warned: a layer that did not reuse as planned was named.
        calls: of the denoiser, not yet in the report: step, what each layer did, and why it was not as planned.
    """

    begin: Place
    steps: int
    loop: Loop | None
    backward: bool
    report: Report
    branches: list[Branch] = field(default_factory=list)
    step: int = -1
    call: int = 0
    before: tuple[int, int] = (-1, 0)  # the step before the latest, and the calls it made
    off: str | None = None
    warned: bool = False
    calls: list[tuple[int, list[str | None], dict[str, str]]] = field(default_factory=list)

    def step_of(self, place: Place) -> int:
        """Executed step that `place` is; negative before the run's first."""
        moved = place.position - self.begin.position
        return -moved if self.backward else moved

    def advance(self, step: int) -> None:
        """A call of `step` begins: branches that the step before it did not call are forgotten."""
        if step == self.step:
            self.call += 1
            return
        if self.step >= 0:
            self.before = (self.step, self.call + 1)
        self.step, self.call = step, 0
        self.branches = [b for b in self.branches if b.step in (self.before[0], step)]

    @property
    def complete(self) -> bool:
        """The last step is done: it has made as many calls as the one before."""
        return self.step == self.steps - 1 and self.call + 1 >= self.before[1]

    @property
    def crowded(self) -> bool:
        """More calls of one step than a loop of somebody's own is taken to make."""
        return self.loop is None and len(self.branches) >= CROWD

    def join(self, branch: Branch) -> None:
        """Another branch begins: the report counts its memory."""
        for other in self.branches:
            if other.is_whole(other.rows(branch.call)):
                branch.call.conditions.join(other.call.conditions)
                break
        self.branches.append(branch)
        report, rings = self.report, [b.ring for b in self.branches]
        report.predicted_bytes = max(report.predicted_bytes, sum(ring.plan.nbytes for ring in rings))
        report.allocated_bytes = max(report.allocated_bytes, sum(ring.nbytes for ring in rings))
        for layer in report.layers:
            places = [ring.place(layer.name) for ring in rings]
            layer.map_bytes = max(layer.map_bytes, sum(place.nbytes for place in places if place is not None))

    def find(self, call: Call, step: int) -> tuple[Branch, list[int]] | None:
        """The branch that `call` of `step` continues, and the branch's row for each row of the call."""
        known: dict[tuple[object, tuple], list[int] | None] = {}  # by what they attend over: branches may share it
        fitting, oldest = [], self.step if step > self.step else self.before[0]
        for branch in self.branches:
            if oldest <= branch.step < step:
                about = (branch.call.conditions.group, branch.call.shape)
                if about not in known:
                    known[about] = branch.rows(call)
                if known[about] is not None:
                    fitting.append((branch, known[about]))
        fitting = [fit for fit in fitting if fit[0].is_whole(fit[1])] or fitting
        if len(fitting) > 1:  # the nearest sample tells them apart; at a tie, the order
            distances = torch.stack([call.distance(branch.call, rows) for branch, rows in fitting]).tolist()
            return fitting[distances.index(min(distances))]
        return fitting[0] if fitting else None

    def rewind(self, call: Call, step: int) -> Branch | None:
        """The branch that `call` repeats from a later step on: what it holds is forgotten."""
        for branch in self.branches:
            if branch.step > step and branch.is_whole(branch.rows(call)):
                branch.why = f"the run went back from step {branch.step} to step {step}"
                branch.ring.captured_at.clear()
                return branch
        return None
