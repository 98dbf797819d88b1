"""The session: reuse on one denoiser, call by call.

Before each denoiser call the session places it: which run it belongs to, which step it is, and which
earlier calls it continues. The layers are then told what to do, and what they did is noted afterwards.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from attnreuse.adapters import parameters
from attnreuse.binding import compiled, loops
from attnreuse.binding.clock import Place, StepClock
from attnreuse.binding.conditions import Conditions
from attnreuse.binding.denoiser import find_denoiser, part_of, unmatched_by, unwrapped
from attnreuse.binding.guard import ThreadGuard
from attnreuse.binding.hooks import Attached, Hook, nothing
from attnreuse.binding.layers import Layers
from attnreuse.binding.memory import Memory
from attnreuse.binding.notices import Notices
from attnreuse.binding.processors import GRADIENT
from attnreuse.binding.report import Report
from attnreuse.binding.resolving import Resolver, Schedulers
from attnreuse.binding.run import Branch, Call, Match, Run, Tick, continued
from attnreuse.binding.walk import executed
from attnreuse.errors import (
    AttnReuseError,
    PolicyMismatchError,
    StaleMapError,
    UnknownStepError,
    UnsupportedLayerError,
)
from attnreuse.maps.formats import MapFormat
from attnreuse.policy import Action, Policy, Rule

RUNS = 8  # loops of somebody's own that may be under way at once
ATTRIBUTE = "_attnreuse_session"  # of an enabled denoiser


class Session:
    """Reuse on one denoiser, from :func:`attnreuse.enable` to :func:`attnreuse.disable`; also a context manager.

    Attributes:
        denoiser: the model; another one once the pipeline was given another one.
        pipe: the pipeline, or None where a denoiser alone was enabled.
        policy, map_format: what it was enabled with; the policy may be a rule.
    """

    def __init__(
        self,
        denoiser: Any,
        pipe: Any,
        scheduler: Any,
        policy: Policy | Rule,
        map_format: MapFormat,
        memory_budget: int | None,
        layers: str | Sequence[str] | None,
        strict: bool,
        given_compiled: bool,
    ):
        self.policy, self.map_format = policy, map_format
        self.pipe, self._scheduler = pipe, scheduler
        self._budget, self._chosen, self._given_compiled = memory_budget, layers, given_compiled
        self._clock, self._guard, self._notices = StepClock(), ThreadGuard(), Notices(strict)
        self._runs: list[Run] = []  # under way; the one called last is last
        self._heard: weakref.WeakSet[loops.Loop] = weakref.WeakSet()  # entered since the session began
        self._walks: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # loop to the walk it announced
        self._now: tuple[Run, Branch | None] | None = None  # of the denoiser call in progress
        self._bind(denoiser)
        self._shown: Run | Report = self._layers.empty_report(self.policy, self.map_format)

    # -- binding

    def _bind(self, denoiser: Any) -> None:
        """Choose the layers of `denoiser` to serve."""
        self.denoiser = denoiser
        self._parameters = parameters(denoiser)
        self._layers = Layers(denoiser, self._chosen, self.policy.patterns)
        self._clock.as_given = self._layers.adapter.as_given
        self._resolver = Resolver(self.policy, denoiser, self._layers, self._clock, self._notices)
        self._memory = Memory(denoiser, self._layers, self.map_format, self._budget, self._notices)
        refused = self._layers.unexpected
        if refused:
            name, reason = next(iter(refused.items()))
            message = f"leaves {len(refused)} of the chosen layers alone, such as {name}: {reason}"
            self._notices.complain(UnsupportedLayerError(message), " (session.report().skipped lists them)")
        unmatched = unmatched_by(self._layers.kinds, self.policy.patterns)
        if unmatched:
            message = f"policy {self.policy.name!r} names layers that are not served here: {', '.join(unmatched)}"
            self._notices.complain(PolicyMismatchError(message))

    def _attach(self) -> None:
        self._attached = Attached(self.denoiser, before=Hook.of(self, "_before"), after=Hook.of(self, "_after"))
        setattr(self.denoiser, ATTRIBUTE, self)
        loops.listen(self, self.pipe)

    def disable(self) -> None:
        """Take the session off its denoiser, bit for bit.

        Layers that have a stock processor get the one found at :func:`attnreuse.enable`; those of other tools stay.
        """
        if getattr(self.denoiser, ATTRIBUTE, None) is not self:
            return
        self._attached.detach()
        delattr(self.denoiser, ATTRIBUTE)
        loops.stop(self)
        compiled.give_back(self)
        self._clock.reset()
        self._end(self._runs)
        self._layers.put_back()

    def __deepcopy__(self, memo: dict) -> None:
        """A copied denoiser has no session."""

    def __reduce__(self) -> tuple:
        """A pickled denoiser has no session either."""
        return nothing, ()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.disable()

    def loop_entered(self, loop: loops.Loop) -> None:
        """A pipeline enters its loop: if it is the enabled one and has another denoiser now, go over to that."""
        self._heard.add(loop)
        if self.pipe is None or loop.pipe is not self.pipe or unwrapped(self.pipe) is self.denoiser:
            return
        try:
            denoiser = find_denoiser(self.pipe)
            if getattr(denoiser, ATTRIBUTE, None) is not None:
                self._notices.warn(
                    "the pipeline has another denoiser now, which another session serves: this session ends"
                )
                self.disable()
                return
        except UnsupportedLayerError:  # a wrapper, it may be
            self._notices.warn(
                f"the pipeline's denoiser is a {type(part_of(self.pipe)).__name__} now; reuse stays on the model it had"
            )
            return
        self._shown = self.report()
        self.disable()
        try:
            self._bind(denoiser)
        except (AttnReuseError, ValueError) as error:
            self._notices.warn(
                f"the pipeline has another denoiser now, which cannot be served: {error}; nothing reuses"
            )
            return
        self._attach()
        self._notices.warn(
            "the pipeline has another denoiser now: reuse goes over to it, and the old one is stock again"
        )

    # -- the run

    @property
    def actions(self) -> dict[str, list]:
        """Per step, what each served layer does by the policy of the latest run, by layer name."""
        schedule = self._resolver.latest
        return {} if schedule is None else schedule.actions

    def step(self, step: int, steps: int) -> None:
        """For custom loops: say before the denoiser calls of each step that they are step `step` of `steps`."""
        self._clock.set(step, steps, loops.current(self.denoiser, self.pipe))

    @property
    def tick(self) -> Tick | None:
        """Where the denoiser call in progress stands in its run; None outside of one."""
        run = self._now[0] if self._now else None
        return run and Tick(run.step, run.steps, run.call)

    def report(self) -> Report:
        """What the run in progress, or else the last one, did."""
        if isinstance(self._shown, Run):
            self._layers.report(self._shown)
            return self._shown.report
        return self._shown

    def _before(self, args: tuple, kwargs: dict) -> None:
        """Runs before each denoiser call: place it, and tell the layers what to do."""
        self._guard.enter(self.denoiser)
        try:
            self._layers.disarm()  # after an interrupt that no hook heard
            self._now = None
            given = dict(zip(self._parameters, args, strict=False)) | kwargs
            if not given.keys() >= {self._layers.adapter.sample, "timestep"}:
                return  # the denoiser itself says what is missing
            loop = loops.current(self.denoiser, self.pipe)
            conditions = None if self._wants_gradient(given) else self._conditions(given)
            try:
                place = self._clock.place(given["timestep"], self._schedulers(loop), loop, conditions)
            except UnknownStepError as error:
                self._not_placed(error)
            else:
                self._placed(place, loop, given, conditions)
        except BaseException:
            self._failed()
            raise

    def _after(self, args: tuple, kwargs: dict, output: Any) -> None:
        """Runs after each denoiser call, also when it raised (then without output)."""
        if not self._guard.inside():
            return  # a call that `_before` refused
        try:
            self._layers.disarm()
            if output is None:
                self._failed()
            elif self._now is not None:
                self._done(*self._now)
            self._now = None
            self._guard.leave()
        except BaseException:
            self._failed()
            raise

    def _failed(self) -> None:
        """The call raised: nothing that its run holds is to be trusted."""
        self._layers.disarm()
        if self._now is not None:
            self._now[0].branches.clear()
        self._now = None
        self._clock.reset()
        self._guard.leave()

    def _schedulers(self, loop: loops.Loop | None) -> Schedulers:
        return functools.partial(loops.schedulers, self._scheduler, loop, self.pipe)

    def _not_placed(self, error: UnknownStepError) -> None:
        """Nothing is known of this call: every layer computes."""
        if self._notices.strict:
            raise error
        if not isinstance(self._shown, Report) or not self._shown.layers[0].computed:  # the first such call
            self._notices.warn(f"{error}; until then every layer computes")
            self._shown = self._layers.empty_report(self.policy, self.map_format)
            self._shown.skipped.update(dict.fromkeys(self._layers.modules, str(error)))
        for layer in self._shown.layers:
            layer.count(Action.COMPUTE, Action.COMPUTE, None)

    def _placed(
        self, place: Place, loop: loops.Loop | None, given: dict[str, Any], conditions: Conditions | None
    ) -> None:
        """Find the run and the branch of this call, and arm the layers."""
        # A loop of somebody's own may run within a pipeline's, in a callback: that announced its own walk alone.
        announced = loop is not None and self._walks.setdefault(loop, place.walk) == place.walk
        sample = given[self._layers.adapter.sample]
        call = None if conditions is None else Call(sample, conditions, keep=not announced)
        match = self._find(place, loop, announced, call, given["timestep"])
        run, branch = match.run, match.branch
        self._runs = [other for other in self._runs if other is not run] + [run]
        run.advance(match.step)
        self._now, self._shown = (run, None), run
        if call is not None and run.off is None:
            if branch is None:
                branch = run.begin_branch(call, self.map_format)
            elif branch.is_whole(match.rows):
                call.conditions.join(branch.call.conditions)
            else:
                branch.ring.keep_rows(match.rows, len(branch.call.sample))
            branch.call, branch.step, branch.number = call, run.step, run.call
            if branch.waits and run.step < run.schedule.last_reuse:
                self._memory.give(run, branch, given)
            self._now = (run, branch)
        self._layers.arm(run, branch if run.off is None else None, given, run.off or GRADIENT)
        self._complain(run)

    def _done(self, run: Run, branch: Branch | None) -> None:
        """The call is over: note what it did."""
        self._layers.note(run, branch)
        run.report.steps = max(run.report.steps, run.step + 1)
        self._complain(run)
        if branch is not None and run.step >= run.schedule.last_reuse:
            branch.release("the policy reuses no more")
        if run.complete and (run.loop is None or not run.begin.is_read):
            self._clock.reset()

    def _complain(self, run: Run) -> None:
        """Name the first layer of the run that does not reuse as planned."""
        message = None if run.off or (run.warned and not self._notices.strict) else self._layers.deviation(run)
        if message is not None:
            run.warned = True
            self._notices.complain(StaleMapError(message), " (session.report() counts such calls)")

    def _conditions(self, given: dict[str, Any]) -> Conditions:
        adapter = self._layers.adapter
        others = {name: value for name, value in given.items() if name not in (adapter.sample, "timestep")}
        return Conditions(others, len(given[adapter.sample]), adapter.each_step, self._layers.query_key_state())

    def _wants_gradient(self, given: dict[str, Any]) -> bool:
        if not torch.is_grad_enabled():
            return False
        tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
        return any(t.requires_grad for t in (*tensors, *self.denoiser.parameters()))

    def _find(self, place: Place, loop: loops.Loop | None, announced: bool, call: Call | None, timestep: Any) -> Match:
        """The run this call belongs to, its step, and the branch it continues, if it does."""
        walks = [run for run in reversed(self._runs) if run.begin.walk == place.walk and run.loop is loop]
        walks = [(run, step) for run in walks if (step := run.step_of(place)) >= 0]
        match = None if call is None else continued(call, walks, announced)
        if match is not None:
            return match
        for run, step in walks:
            more = announced or step > 0  # calls of step 0 that nobody announced may begin a run
            if call is None or step > run.step or (step == run.step and (more or not run.crowded)):
                return Match(run, step)
            if more:  # the loop goes back: what it holds is not of this step's past
                run.rewind(step)
                return continued(call, [(run, step)], announced) or Match(run, step)
        run = self._new_run(place, loop, timestep)
        return Match(run, run.step_of(place))

    def _new_run(self, place: Place, loop: loops.Loop | None, timestep: Any) -> Run:
        new = all(run.loop is not loop for run in self._runs)
        first = new and loop in self._heard
        if new and loop is not None:
            loop.on_exit(lambda: self._loop_left(loop))
        own = [run for run in self._runs if run.loop is None]
        for branch in (branch for run in own for branch in run.branches):  # their loops may have been given up
            branch.release("its memory went to another run")
        if loop is None:
            self._end(own[: 1 - RUNS])
        backward = loop is None and place.is_read and place.position == place.length - 1 > 0
        steps = place.length if backward or not place.is_read else executed(place, loop)
        begin = place if place.is_read else replace(place, position=0)  # what was told holds from the first step on
        schedule, off = self._resolver.schedule(
            place if place.is_read else None, steps, backward, timestep, self._schedulers(loop)
        )
        run = Run(begin, steps, schedule, loop, backward, self._layers.empty_report(schedule.policy, self.map_format))
        run.off = off
        self._notices.only_compute(run, self._layers.foreign())
        if len(self._layers.foreign()) < len(self._layers.modules):
            run.off = run.off or self._resolver.mismatch(
                run, self.pipe, first if loop is not None else place.position == 0
            )
        whole = self._given_compiled or hasattr(part_of(self.pipe), "_orig_mod")
        compiled.make_room(self, self.denoiser, whole, self._layers, schedule, self._notices.warn)
        return run

    def _end(self, runs: list[Run]) -> None:
        """These runs are over: their maps are let go of."""
        self._runs = [run for run in self._runs if run not in runs]
        for run in runs:
            run.branches.clear()

    def _loop_left(self, loop: loops.Loop) -> None:
        """The pipeline is done, or failed: nothing of its runs is needed any more."""
        if self._guard.inside():  # an interrupt within the denoiser, which no hook hears
            self._failed()
        self._end([run for run in self._runs if run.loop is loop])
        self._clock.reset()
        outer = [run for run in self._runs if run.loop is not None]
        if outer:
            self._shown = outer[-1]
