"""A policy becomes the schedule of a run: rules are resolved, and what was made for something else is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from attnreuse.binding.clock import HELP, Place, StepClock
from attnreuse.binding.denoiser import holding_layers, model_name
from attnreuse.binding.layers import Layers
from attnreuse.binding.notices import Notices
from attnreuse.binding.run import Run
from attnreuse.binding.schedule import Schedule
from attnreuse.binding.walk import Told, check_told, levels_from
from attnreuse.errors import PolicyMismatchError, UnknownStepError
from attnreuse.policy import Policy, Rule

Schedulers = Callable[[], Iterable[Any]]  # those that may have made a timestep, likeliest first


@dataclass
class Resolver:
    """Makes the schedules of one denoiser's layers.

    Attributes:
        policy: what the session was enabled with.
        denoiser, layers: whose schedules.
        clock: tells where a told step's timestep stands.
        notices: told what does not fit.
        latest: the schedule that was made last, or None.
    """

    policy: Policy | Rule
    denoiser: Any
    layers: Layers
    clock: StepClock
    notices: Notices
    latest: Schedule | None = None

    def __post_init__(self) -> None:
        if isinstance(self.policy, Policy):
            self._schedule_of(self.policy)

    def schedule(
        self, place: Place | None, steps: int, backward: bool, timestep: Any, schedulers: Schedulers
    ) -> tuple[Schedule, str | None]:
        """The schedule of a run of `steps` that begins at `place`, and why all its layers only compute, if they do.

        Args:
            place: None where its steps are told.
            backward: it walks from the last timestep to the first.
            timestep: of its first denoiser call.
        """
        policy, off = self.policy, None
        if isinstance(policy, Rule):
            try:
                wanted = policy.uses_levels
                told = self._levels(place, steps, backward, timestep, schedulers) if wanted else (None, None)
                policy = policy.resolve(steps, *told)
            except ValueError as error:
                off = f"{self.policy} cannot be resolved: {error}"
                self.notices.complain(PolicyMismatchError(off), "; every layer computes")
                policy = Policy(steps=steps, reuse=(False,) * steps, name=str(self.policy))
        return self._schedule_of(policy), off

    def mismatch(self, run: Run, pipe: Any, certain: bool) -> str | None:
        """Why every layer of this run computes, where the policy does not fit it; None where it fits.

        Args:
            pipe: whose run it is, where that is known; the policy may be for another model.
            certain: the run begins here for sure, so that its number of steps is known.

        Raises:
            PolicyMismatchError: it is for as many steps as were asked for, but not as are executed; or
                under `strict`, whatever differs.
        """
        policy, scheduler = run.schedule.policy, run.begin.scheduler
        made_with = None if scheduler is None else type(scheduler).__name__
        if policy.steps != run.steps:
            message = (
                f"policy {policy.name!r} is for {policy.steps} executed steps, this run executes {run.steps} "
                f"({made_with or 'unknown scheduler'}; Heun executes 2 N - 1, PNDM N + 1, img2img N * strength; "
                f"if that is not so, {HELP}): make the policy for {run.steps}"
            )
            if certain and policy.steps == getattr(scheduler, "num_inference_steps", None):
                raise PolicyMismatchError(message)
            self.notices.complain(PolicyMismatchError(message), "; every layer computes")
            return f"the policy is for {policy.steps} executed steps, this run executes {run.steps}"
        differences = [
            f"{what}: policy {made_for!r}, run {here!r}"
            for what, made_for, here in (
                ("scheduler", policy.scheduler, made_with),
                ("model", policy.model, model_name(pipe or self.denoiser)),
            )
            if None not in (made_for, here) and made_for != here
        ]
        if differences:
            message = f"policy {policy.name!r} was made for something else: {'; '.join(differences)}"
            self.notices.complain(PolicyMismatchError(message))
        return None

    def _schedule_of(self, policy: Policy) -> Schedule:
        holding = holding_layers(self.denoiser, self.layers.modules)
        if self.latest is None or (self.latest.policy, self.latest.holding) != (policy, holding):
            self.latest = Schedule(policy, self.layers.modules, holding)
        return self.latest

    def _levels(self, place: Place | None, steps: int, backward: bool, timestep: Any, schedulers: Schedulers) -> Told:
        """Noise levels and influences of a run that begins at `place`; None where its steps are told.

        Raises:
            ValueError: they cannot be told.
        """
        if place is None:
            try:
                place = self.clock.read(timestep, schedulers)
            except UnknownStepError as error:
                raise ValueError(
                    "told steps have noise levels where their timesteps are those of a scheduler: pass scheduler= to "
                    "attnreuse.enable, or give a policy with a step count"
                ) from error
            backward = check_told(place, steps)
        return levels_from(place, steps, backward, schedulers)
