"""The step clock: which executed step of which run a denoiser call belongs to, read from the scheduler.

Pipelines hand the denoiser an element of ``scheduler.timesteps``, a view into that tensor, so its
address is its position: exact for schedulers that repeat timesteps (PNDM, Heun), for img2img, which
starts in the middle, and without a transfer from the device. ``set_timesteps`` makes a new tensor,
so another tensor is another run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attnreuse.errors import AttnReuseError


def executed_steps(scheduler: Any, steps: int) -> int:
    """Denoiser steps that ``num_inference_steps`` of `steps` executes with this scheduler, which is set to them."""
    scheduler.set_timesteps(steps)
    return len(scheduler.timesteps)


@dataclass(frozen=True)
class Tick:
    """A denoiser call: number `call` within executed step `step` of `steps`; `new_run` at a run's first.

    `timesteps` is the scheduler's tensor (held, so that its identity is not recycled) and `begin` the
    run's first position in it; both None and 0 for steps given by :meth:`StepClock.set`.
    """

    step: int
    steps: int
    call: int
    new_run: bool
    timesteps: Tensor | None = None
    begin: int = 0


class StepClock:
    """Reads the step off a scheduler, or takes it from :meth:`set`.

    Args:
        scheduler: a function that gives the scheduler in force (a pipeline's may be replaced), or None.
        pipe: the pipeline, for SDXL's ``denoising_end``; or None.

    Attributes:
        last: the latest call that the caller accepted, set by the caller.
    """

    def __init__(self, scheduler: Callable[[], Any], pipe: Any = None):
        self._scheduler, self._pipe = scheduler, pipe
        self._explicit: tuple[int, int] | None = None
        self.last: Tick | None = None

    def set(self, step: int, steps: int) -> None:
        """Say that the next denoiser calls are step `step` of `steps`; overrides the scheduler."""
        if not 0 <= step < steps:
            raise ValueError(f"step must be in [0, {steps}), got {step}")
        if self.last and (step <= self.last.step or steps != self.last.steps):
            self.last = None
        self._explicit = (step, steps)

    def finish(self) -> None:
        """The run is complete: a step that was set is no longer in force."""
        self._explicit = None

    def reset(self) -> None:
        """Forget the run in progress: the next call begins one."""
        self.last = self._explicit = None

    def place(self, timestep: Any) -> Tick:
        """Where a denoiser call with this `timestep` belongs."""
        last = self.last
        if self._explicit:
            step, steps = self._explicit
            return Tick(step, steps, self._call(step), last is None)
        timesteps = self._timesteps()
        position = self._position(timesteps, timestep)
        if last is None or timesteps is not last.timesteps or position < last.begin + last.step:
            return Tick(0, self._executed(len(timesteps) - position), 0, True, timesteps, position)
        step = position - last.begin
        return Tick(step, last.steps, self._call(step), False, timesteps, last.begin)

    def _call(self, step: int) -> int:
        return self.last.call + 1 if self.last and self.last.step == step else 0

    def _timesteps(self) -> Tensor:
        timesteps = getattr(self._scheduler(), "timesteps", None)
        if timesteps is None:
            raise AttnReuseError(
                "no scheduler to read the step from: pass scheduler= to attnreuse.enable, "
                "or call session.step(i, n) before each denoiser call"
            )
        return timesteps

    def _position(self, timesteps: Tensor, timestep: Any) -> int:
        is_tensor = isinstance(timestep, Tensor)
        if is_tensor and timestep.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr():
            return (timestep.data_ptr() - timesteps.data_ptr()) // timesteps.element_size()
        index = getattr(self._scheduler(), "step_index", None)
        if index is not None:
            return index
        value = timestep.flatten()[0] if is_tensor else timestep
        positions = (timesteps == value).nonzero().flatten().tolist()
        if len(positions) != 1:
            found = "not among" if not positions else f"{len(positions)} times among"
            raise AttnReuseError(
                f"cannot tell the step: timestep {float(value):g} is {found} the scheduler's {len(timesteps)} "
                "timesteps; call session.step(i, n) before each denoiser call"
            )
        return positions[0]

    def _executed(self, scheduled: int) -> int:
        """Steps of a run with `scheduled` left; fewer where SDXL's ``denoising_end`` cuts it short."""
        end = getattr(self._pipe, "denoising_end", None)
        return self._pipe.num_timesteps if isinstance(end, float) and 0 < end < 1 else scheduled
