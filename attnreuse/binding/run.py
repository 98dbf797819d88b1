"""A run: one walk of denoiser calls over timesteps, its branches, and the maps they hold.

A branch is the sequence of calls, at most one a step, that attend over the same: inputs of one shape and
the same conditions. Maps belong to a branch, and only what its layers have written is ever reused.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnreuse.binding.clock import CALLS, Place
from attnreuse.binding.conditions import Conditions, writes
from attnreuse.binding.loops import Loop
from attnreuse.binding.report import Report
from attnreuse.binding.schedule import Schedule
from attnreuse.maps.formats import MapFormat
from attnreuse.maps.ring import MapRing, RingPlan, plan_ring

NEAR = 0.7  # distance of samples from which on a call is not taken to continue a branch; unrelated ones are at 1
CLEARLY = 0.7  # how much nearer than any other the branch must be
FASTER, SMALL = 8.0, 0.18  # how much farther than ever before a sample may move, or how far at least
MOVES = 2  # that must be known for this: samplers of two calls a step move at every second one
CROWD = 8  # calls of one step that a loop nobody announced may make before they count as runs given up


class Call:
    """A denoiser call: its sample ``[B, ...]`` and its conditions.

    Args:
        sample: what is denoised.
        conditions: whose rows are those of the sample.
        keep: the sample may be overwritten before the next step, so keep a copy.
    """

    def __init__(self, sample: Tensor, conditions: Conditions, keep: bool):
        self.sample = sample.clone() if keep or writes(sample) is None else sample
        self.conditions = conditions
        self.shape = (sample.shape[1:], sample.dtype, sample.device)
        self._version = writes(self.sample)

    def distance(self, earlier: Call, rows: list[int]) -> Tensor:
        """One minus the cosine to these rows of an earlier sample, the farthest row's; 1 where that was overwritten."""
        if writes(earlier.sample) != earlier._version:
            return torch.ones((), device=self.sample.device)
        now, then = self.sample.float().flatten(1), earlier.sample[rows].float().flatten(1)  # [B, all others]
        return 1 - torch.nn.functional.cosine_similarity(now, then).amin()


@dataclass(eq=False)
class Branch:
    """Calls that attend over the same.

    Attributes:
        call: the latest.
        step: of the latest call.
        number: of the latest call within its step.
        moves: how far the sample moved from call to call, where that was looked at.
        ring: its maps; without bytes as long as it has no memory.
        why: why it holds no map of an earlier step, where there is more to say than that it is the first.
        waits: it has been given no memory yet, or has lost it.
        released: it has lost its memory.
        unproven: the latest step at which its conditions alone told that the call continues it.
        missed: layers whose latest capture did not happen, with the reason.
        idle: layers that the model does not call in its calls.
    """

    call: Call
    step: int
    ring: MapRing
    why: str
    waits: bool = True
    released: bool = False
    unproven: int = -1
    number: int = 0
    moves: list[float] = field(default_factory=list)
    missed: dict[str, str] = field(default_factory=dict)
    idle: frozenset[str] = frozenset()

    def rows(self, call: Call, values: bool = True) -> list[int] | None:
        """For each row of `call`, the row of this branch that attends over the same; or None.

        Without `values` only conditions in the same memory count, which costs no wait for the device.
        """
        return call.conditions.rows_of(self.call.conditions, values) if call.shape == self.call.shape else None

    @property
    def reach(self) -> float:
        """How far its next sample may lie from its last one, in a loop that nobody announced."""
        return NEAR if len(self.moves) < MOVES else min(NEAR, max(FASTER * max(self.moves), SMALL))

    def release(self, why: str) -> None:
        """Let go of the maps and their memory."""
        if self.ring.nbytes:
            self.ring, self.why = _no_maps(self.ring.plan.map_format, self.call), why
            self.waits = self.released = True

    def forget(self, why: str) -> None:
        """Hold no map and no output any more; the memory stays."""
        self.ring.forget()
        self.why = why

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
        if change is None and self.rows(call) is not None:
            change = "its sample continues that of no earlier call"
        return change or "the prompt has changed"


@dataclass(frozen=True)
class Tick:
    """A denoiser call: number `call` within executed step `step` of `steps`."""

    step: int
    steps: int
    call: int


@dataclass(eq=False)
class Run:
    """One walk over timesteps.

    Attributes:
        begin: its first place.
        steps: that it will execute, as far as can be told.
        schedule: what the layers are to do.
        loop: the pipeline's loop that it belongs to; None for a loop of somebody's own.
        backward: it walks from the last timestep to the first.
        step, call: of the latest denoiser call: executed step, and number of the call within it.
        off: why every layer only computes, or None.
        warned: a layer that did not reuse as planned was named.
        calls: of the denoiser, not yet in the report: step, what each layer did, and why it was not as planned.
    """

    begin: Place
    steps: int
    schedule: Schedule
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
        if self.step > self.before[0]:
            self.before = (self.step, self.call + 1)
        self.step, self.call = step, 0
        self.branches = [b for b in self.branches if b.step in (self.before[0], step)]

    @property
    def complete(self) -> bool:
        """The last step is done: it has made as many calls as the one before."""
        return self.step == self.steps - 1 and self.call + 1 >= self.before[1]

    @property
    def crowded(self) -> bool:
        """More calls of one step than a loop that nobody announced is taken to make."""
        return len(self.branches) >= (CROWD if self.begin.is_read else CALLS)

    def begin_branch(self, call: Call, map_format: MapFormat) -> Branch:
        """A branch that `call` begins, without memory yet."""
        before = [other for other in self.branches if other.step < self.step]
        for other, _ in alike(call, [b for b in self.branches if b.unproven == self.step], values=True):
            other.forget(
                f"a second call of step {self.step} attends over the same, and may be the one that it continued"
            )
        for other in self.branches:
            if other.is_whole(other.rows(call, values=False)):
                call.conditions.join(other.call.conditions)
                break
        same = [other for other in before if other.rows(call) is not None]
        why = (same or before)[-1].difference(call) if before else ""
        self.branches.append(Branch(call, self.step, _no_maps(map_format, call), why))
        return self.branches[-1]

    def allocate(self, branch: Branch, plan: RingPlan | None) -> None:
        """Give a branch the memory of its plan, if it has one, and count it in the report."""
        branch.waits = False
        if plan is None:
            return
        branch.ring = MapRing(plan, branch.call.sample.device)
        report, rings = self.report, [b.ring for b in self.branches]
        report.predicted_bytes = max(report.predicted_bytes, sum(ring.plan.nbytes for ring in rings))
        report.allocated_bytes = max(report.allocated_bytes, sum(ring.nbytes for ring in rings))
        for layer in report.layers:
            layer.map_bytes = max(layer.map_bytes, sum(ring.slot_bytes(layer.name) for ring in rings))

    def fitting(self, call: Call, step: int) -> list[tuple[Branch, list[int]]]:
        """Branches that `call` of `step` may continue, with the branch's row for each row of the call."""
        oldest = self.step if step > self.step else self.before[0]
        branches = [branch for branch in self.branches if oldest <= branch.step < step]
        return alike(call, branches, values=False) or alike(call, branches, values=True)

    def rewind(self, step: int) -> None:
        """Stand before `step` again; what branches hold of this step and later ones is forgotten."""
        for branch in self.branches:
            if branch.step >= step:
                branch.forget(f"the run went back from step {self.step} to step {step}")
                branch.step = step - 1
        self.before, self.step = (step - 1, self.call + 1), step - 1


def alike(call: Call, branches: list[Branch], values: bool) -> list[tuple[Branch, list[int]]]:
    """Branches that attend over the same as `call`, with the branch's row for each row of the call."""
    known: dict[tuple[object, tuple], list[int] | None] = {}  # by what they attend over: branches may share it
    for branch in branches:
        about = (branch.call.conditions.group, branch.call.shape)
        if about not in known:
            known[about] = branch.rows(call, values)
    rows = [(branch, known[branch.call.conditions.group, branch.call.shape]) for branch in branches]
    return [(branch, matches) for branch, matches in rows if matches is not None]


@dataclass(frozen=True)
class Match:
    """The run of a call, the step it is at, and the branch it continues, with the branch's row for each of its own."""

    run: Run
    step: int
    branch: Branch | None = None
    rows: list[int] | None = None

    @property
    def in_order(self) -> bool:
        """The call has the same number within its step as that of the branch had within its own."""
        return self.branch.number == (self.run.call + 1 if self.step == self.run.step else 0)


def continued(call: Call, walks: list[tuple[Run, int]], announced: bool) -> Match | None:
    """The branch of these runs (each with the step that `call` would be) that `call` continues; None if it begins one.

    Conditions and shapes decide. Where several branches share them, the sample tells: it must be near to its own
    branch's last one, and nearer than to any other's; of calls that see the very same sample, the order. In a loop
    that no pipeline announced, calls of another request may come in between at any time, so there the sample must
    tell always, and must not move much faster than before. In doubt what the branch holds is forgotten.
    """
    candidates = [Match(r, step, branch, rows) for r, step in walks for branch, rows in r.fitting(call, step)]
    whole = [c for c in candidates if c.branch.is_whole(c.rows)]
    if any(c.in_order for c in whole):  # else it may be a batch that has lost the rows before them
        candidates = whole
    candidates = [c for c in candidates if c.step - c.branch.step == min(f.step - f.branch.step for f in candidates)]
    candidates = [c for c in candidates if c.branch.call.conditions.beside == call.conditions.beside] or candidates
    if not candidates:
        return None
    if announced and len(candidates) == 1:
        candidates[0].branch.unproven = candidates[0].step
        return candidates[0]
    distances = torch.stack([call.distance(c.branch.call, c.rows) for c in candidates]).nan_to_num(1.0).tolist()
    least = min(distances)
    nearest = [c for c, d in zip(candidates, distances, strict=True) if d == least]
    best = next((c for c in nearest if c.in_order), nearest[0])
    if not announced and least >= best.branch.reach:
        return None
    best.branch.moves.append(least)
    told = len(nearest) == 1 or best.in_order
    if least >= NEAR or not told or any(least >= CLEARLY * d for d in distances if d != least):
        best.branch.forget("several calls attend over the same, and their samples do not tell which is which")
    return best


def _no_maps(map_format: MapFormat, call: Call) -> MapRing:
    return MapRing(plan_ring([], map_format), call.sample.device)
