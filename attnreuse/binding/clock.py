"""The step clock: where in which walk over timesteps a denoiser call stands.

It follows the calls themselves. Pipelines hand the denoiser an element of their ``timesteps``, a view
into that tensor: its storage tells the walk apart from any other, its place in it the position, without
a transfer from the device, whatever scheduler made it, and also where timesteps repeat (PNDM, Heun),
begin late (img2img) or the scheduler's state is put back between calls (panorama). Only a timestep that
is no view is looked up in the scheduler: by its step index, else by value.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnreuse.binding.conditions import Conditions
from attnreuse.errors import UnknownStepError

HELP = "call session.step(i, n) before the denoiser calls of each step"
STAGES = 4  # timesteps that the calls of one step may have, as a sampler of several stages gives them
CALLS = 32  # that a told step may make, of several requests or of several parts of a picture


def executed_steps(scheduler: Any, steps: int) -> int:
    """Denoiser steps that ``num_inference_steps`` of `steps` executes with this scheduler, which is set to them."""
    config = getattr(scheduler, "config", {})
    # A shift that depends on the size is that of large pictures.
    dynamic = {"mu": config.get("max_shift", 1.15)} if config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(steps, **dynamic)
    return len(scheduler.timesteps)


@dataclass(frozen=True, eq=False)
class Place:
    """Position `position` of a walk over `length` timesteps.

    `timesteps` is the tensor walked over (or any view into it), held so that its address stays its own;
    or the token of :meth:`StepClock.set`. `scheduler` is the one whose timesteps they are, where known.
    """

    timesteps: Any
    position: int
    length: int
    scheduler: Any = None

    @property
    def is_read(self) -> bool:
        """Read off the call, not told."""
        return isinstance(self.timesteps, Tensor)

    @property
    def values(self) -> Tensor:
        """The timesteps of the walk where no scheduler is known."""
        return self.timesteps.new_empty(0).set_(self.timesteps.untyped_storage(), 0, (self.length,), (1,))

    @property
    def walk(self) -> Any:
        """Equal for places of one walk."""
        return self.timesteps.untyped_storage().data_ptr() if self.is_read else id(self.timesteps)


class StepClock:
    """Places denoiser calls by their timestep, or by what :meth:`set` said.

    Attributes:
        as_given: what the denoiser is given for a scheduler's timesteps, where that has a dtype.
    """

    def __init__(self) -> None:
        self.as_given: Callable[[Tensor, torch.dtype], Tensor] = lambda timesteps, dtype: timesteps
        self._told: tuple[object, int, int] | None = None  # token of the walk, step, steps
        self._told_in: tuple[object, int] = (None, 0)  # the loop and the thread that it was told in
        self._since: list[tuple[object, Any]] = []  # the calls since then: timestep, and what they attend over
        self._last: Place | None = None

    def set(self, step: int, steps: int, loop: object = None) -> None:
        """Say that the next denoiser calls, in this `loop`, are step `step` of `steps`; overrides the schedulers."""
        if not 0 <= step < steps:
            raise ValueError(f"step must be in [0, {steps}), got {step}")
        token, last, total = self._told or (object(), 0, steps)
        self._told = (object() if (step == 0 < last) or steps != total else token, step, steps)
        self._told_in = (loop, threading.get_ident())
        self._since.clear()

    def reset(self) -> None:
        """A step that was set is no longer in force."""
        self._told = None
        self._since.clear()

    def place(
        self,
        timestep: Any,
        schedulers: Callable[[], Iterable[Any]],
        loop: object = None,
        conditions: Conditions | None = None,
    ) -> Place:
        """Where a call with this `timestep` and these `conditions` stands; `schedulers` may have made it.

        A step that was told outside of the pipeline's `loop` counts within it only if it is the first, told in the same
        thread: the loop it was told for has been given up otherwise. So it has been where more timesteps come than a
        step has, for the same conditions (those of several requests may differ), or too many calls.

        Raises:
            UnknownStepError: that cannot be told; the message says how to help.
        """
        told_in = (loop, threading.get_ident())
        if self._told and self._told[1] == 0 and self._told_in == (None, told_in[1]):
            self._told_in = told_in
        if self._told and loop is self._told_in[0]:
            self._since.append((_mark(timestep), conditions))
            if not self._given_up(conditions):
                return Place(*self._told)
            self.reset()
        return self.read(timestep, schedulers)

    def _given_up(self, conditions: Conditions | None) -> bool:
        """More came since a step was told than a step has."""
        known = [(mark, other) for mark, other in self._since if mark is not None]
        marks = {mark for mark, _ in known}
        if len(marks) > 1 and len(self._since) > CALLS:
            return True
        if conditions is not None and len(marks) > STAGES:
            marks = {m for m, other in known if other is None or conditions.rows_of(other) is not None}
        return len(marks) > STAGES

    def read(self, timestep: Any, schedulers: Callable[[], Iterable[Any]]) -> Place:
        """:meth:`place` by the timestep alone, whatever was told."""
        if isinstance(timestep, Tensor) and _one_place(timestep):
            self._last = _on_walk(timestep, self._last) or _by_address(timestep, schedulers())
            if self._last is not None:
                return self._last
        return _by_scheduler(timestep, [s for s in schedulers() if _has_timesteps(s)], self.as_given)


def _mark(timestep: Any) -> object:
    """Something equal for equal timesteps, without a look at the device; None where there is no such thing."""
    if not isinstance(timestep, Tensor):
        return timestep if isinstance(timestep, (int, float)) else None
    if timestep.device.type == "cpu":
        return float(timestep.flatten()[0])
    storage = timestep.untyped_storage()
    within = storage.nbytes() > timestep.element_size() and _one_place(timestep)
    return (storage.data_ptr(), timestep.storage_offset()) if within else None


def _has_timesteps(scheduler: Any) -> bool:
    return isinstance(getattr(scheduler, "timesteps", None), Tensor)


def _one_place(t: Tensor) -> bool:
    """Whether all elements of `t` are one and the same."""
    return t.numel() == 1 or not any(stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1)


def _on_walk(t: Tensor, last: Place | None) -> Place | None:
    """The place of a view into the timesteps of the call before."""
    if last is None or t.untyped_storage().data_ptr() != last.walk:
        return None
    if last.scheduler is None:
        return Place(last.timesteps, t.storage_offset(), last.length)
    return Place(last.timesteps, _position(t, last.timesteps), last.length, last.scheduler)


def _by_address(t: Tensor, schedulers: Iterable[Any]) -> Place | None:
    """The place of a view into a scheduler's timesteps, or into timesteps that nobody here knows."""
    storage = t.untyped_storage()
    for scheduler in filter(_has_timesteps, schedulers):
        timesteps = scheduler.timesteps
        if timesteps.untyped_storage().data_ptr() == storage.data_ptr():
            return Place(timesteps, _position(t, timesteps), len(timesteps), scheduler)
    length = storage.nbytes() // t.element_size()
    return Place(t, t.storage_offset(), length) if length > 1 else None


def _position(t: Tensor, timesteps: Tensor) -> int:
    """Where in `timesteps`, which may be every second of a tensor, the view `t` lies."""
    return (t.storage_offset() - timesteps.storage_offset()) // (timesteps.stride(0) or 1)


def _by_scheduler(timestep: Any, schedulers: list[Any], as_given: Callable[[Tensor, torch.dtype], Tensor]) -> Place:
    """The place of a timestep by its value among a scheduler's, or by the scheduler's own count."""
    if not schedulers:
        raise UnknownStepError(f"no scheduler to read the step from: pass scheduler= to attnreuse.enable, or {HELP}")
    t = timestep if isinstance(timestep, Tensor) else torch.tensor(timestep)
    said = ""
    for scheduler in schedulers:
        timesteps = scheduler.timesteps
        index = getattr(scheduler, "step_index", None)
        index = getattr(scheduler, "begin_index", None) if index is None else index
        if index is not None and index < len(timesteps) and t.device.type != "cpu":
            return Place(timesteps, index, len(timesteps), scheduler)  # a look at the value would wait for the device
        if not _one_place(t) and not (t == t.flatten()[0]).all():
            raise UnknownStepError(f"cannot tell the step: the timesteps of the call differ within the batch; {HELP}")
        positions = (as_given(timesteps.cpu(), t.dtype) == t.flatten()[0].cpu()).nonzero().flatten().tolist()
        if index in positions or len(positions) == 1:
            return Place(timesteps, index if index in positions else positions[0], len(timesteps), scheduler)
        times = f"{len(positions)} times" if positions else "not"
        said = said or f"timestep {float(t.flatten()[0]):g} is {times} among the scheduler's {len(timesteps)} timesteps"
    raise UnknownStepError(f"cannot tell the step: {said}; {HELP}")
