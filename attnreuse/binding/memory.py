"""The memory of a run's branches: planned for the shapes of a call, within the budget; what is left out is reported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from attnreuse import ops
from attnreuse.binding.layers import Layers
from attnreuse.binding.notices import Notices
from attnreuse.binding.run import Branch, Run
from attnreuse.binding.shapes import map_requests, map_shapes
from attnreuse.errors import MemoryBudgetError, UnsupportedLayerError
from attnreuse.maps.formats import MapFormat
from attnreuse.maps.ring import RingPlan, plan_ring


@dataclass(frozen=True)
class Memory:
    """Gives branches the memory of their maps.

    Attributes:
        denoiser, layers: whose maps, and which.
        map_format: of the maps.
        budget: most bytes that a branch may have, or None.
        notices: told which layers only compute.
    """

    denoiser: Any
    layers: Layers
    map_format: MapFormat
    budget: int | None
    notices: Notices

    def give(self, run: Run, branch: Branch, given: dict[str, Any]) -> None:
        """Allocate the maps of a branch for a call with the arguments `given` of the denoiser.

        A branch that this step has not called gives up its own memory for a new one.
        """
        waiting = [other for other in run.branches if other.step < run.step]
        if waiting and not branch.released:  # whose turn may not come: memory stays what the plan says
            min(waiting, key=lambda other: other.step).release("its memory went to another call of the step")
        run.allocate(branch, self._plan(run, branch, given))

    def _plan(self, run: Run, branch: Branch, given: dict[str, Any]) -> RingPlan | None:
        """Plan the maps of a branch for inputs of these shapes; layers left out are reported."""
        names, sample = [n for n in self.layers.modules if n not in run.report.skipped], branch.call.sample
        try:
            shapes = map_shapes(self.denoiser, given, self.layers.all)
        except UnsupportedLayerError as error:
            self.notices.only_compute(run, dict.fromkeys(names, str(error)))
            return None
        dtype = ops.unserved_dtype(sample.dtype)
        branch.idle = frozenset(n for n in names if n not in shapes)
        elsewhere = {name for other in run.branches for name in other.ring.plan.requests}  # skip-layer guidance
        never = dict.fromkeys(branch.idle - elsewhere, "the model does not call it")
        self.notices.only_compute(run, dict.fromkeys(names, dtype) if dtype else never)
        names = [] if dtype else [n for n in names if n in shapes]
        for name in names if self.notices.strict else []:
            reason = ops.fallback_reason(self.map_format, sample.device, sample.dtype, shapes[name].head_dim)
            if reason:
                raise UnsupportedLayerError(f"layer {name} would run through plain torch: {reason}")
        try:
            called = (self.map_format, _compute_dtype(sample), sample.device)
            requests = map_requests(run.schedule, names, shapes, *called)
            plan = plan_ring(requests, self.map_format, self.budget)
        except MemoryBudgetError as error:
            self.notices.only_compute(run, dict.fromkeys(names, str(error)))
            return None
        for layer in run.report.layers:
            if layer.name in shapes:  # another branch may call more of them
                layer.shape, layer.head_dim = shapes[layer.name][:2]
        unfit = "its map of {:,} bytes does not fit the memory budget of {:,}"
        dropped = {name: unfit.format(nbytes, self.budget) for name, nbytes in plan.dropped.items()}
        self.notices.only_compute(run, dropped, asked_for=True)
        return plan


def _compute_dtype(sample: torch.Tensor) -> torch.dtype:
    """What layers give for this sample."""
    device = sample.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else sample.dtype
