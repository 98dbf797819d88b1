"""`enable` and `disable`: put a policy to work on a diffusers denoiser, and take it off again.

The session places every denoiser call on the clock, tells each layer what to do, keeps the maps of
one run in one buffer per call of a step, and forgets them when the run ends or another begins.
"""

from __future__ import annotations

import fnmatch
import inspect
import os
import threading
import warnings
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnreuse import ops, planner
from attnreuse.clock import StepClock, Tick
from attnreuse.errors import AttnReuseError, PolicyMismatchError, StaleMapError, UnsupportedLayerError
from attnreuse.formats import MapFormat
from attnreuse.formats import map_format as format_named
from attnreuse.policy import Action, Policy, load_policy
from attnreuse.processors import ReuseAttnProcessor, attention_layers, layer_kinds, select_layers, stock_of, unsupported
from attnreuse.report import LayerReport, Report
from attnreuse.ring import MapRing, plan_ring

MASKS = ("attention_mask", "encoder_attention_mask")
ATTRIBUTE = "_attnreuse_session"  # of an enabled denoiser


@dataclass
class _Branch:
    """One denoiser call of each step (some loops make several): its inputs' shapes, ring and masks."""

    signature: dict[str, str]
    ring: MapRing
    masks: dict[str, tuple[int, Tensor | None]] = field(default_factory=dict)  # name to (step of capture, mask)


class Session:
    """Reuse on one denoiser, from :func:`enable` to :func:`disable`; also a context manager.

    Attributes:
        actions: per step, what each served layer does by the policy, by layer name.
    """

    def __init__(
        self,
        denoiser: Any,
        pipe: Any,
        scheduler: Any,
        policy: Policy,
        map_format: MapFormat,
        memory_budget: int | None,
        layers: str | list[str],
        strict: bool,
    ):
        self.denoiser, self.policy, self.map_format = denoiser, policy, map_format
        self._pipe, self._budget, self._strict = pipe, memory_budget, strict
        self._scheduler = (lambda: pipe.scheduler) if pipe is not None else (lambda: scheduler)
        self._clock = StepClock(self._scheduler, pipe)
        self._signature = inspect.signature(type(denoiser).forward)
        self._kinds, self._skipped = self._select(layers)
        self._modules = {name: m for name, m in attention_layers(denoiser).items() if name in self._kinds}
        self._processors = {name: ReuseAttnProcessor(stock_of(m.processor)) for name, m in self._modules.items()}
        self.actions = {name: policy.actions(name) for name in self._modules}
        self._check_patterns()
        self._branches: dict[int, _Branch] = {}  # by number of the call within its step
        self._door = threading.Lock()
        self._owner = self._busy = None  # threads: that began the run; that is inside the denoiser
        self._report = self._empty_report()
        self._hooks: list[Any] = []

    def __deepcopy__(self, memo: dict) -> None:
        """A copied denoiser has no session."""

    # -- binding

    def _attach(self) -> None:
        for name, module in self._modules.items():
            module.set_processor(self._processors[name])
        session = weakref.ref(self)  # a deep-copied denoiser copies its hooks, which then do nothing

        def before(module: Any, args: tuple, kwargs: dict) -> None:
            active = session()
            if active is not None and module is active.denoiser:
                active._before(args, kwargs)

        def after(module: Any, args: tuple, output: Any) -> None:
            active = session()
            if active is not None and module is active.denoiser:
                active._after(output)

        disable = torch.compiler.disable
        self._hooks = [
            self.denoiser.register_forward_pre_hook(disable(before), with_kwargs=True),
            self.denoiser.register_forward_hook(disable(after), always_call=True),
        ]
        setattr(self.denoiser, ATTRIBUTE, self)
        self.denoiser._reset_stateful_cache = _EndOfRun(session)  # pipelines call it, where it exists

    def disable(self) -> None:
        """Restore every processor this session replaced and still finds in place; bit-exact."""
        if getattr(self.denoiser, ATTRIBUTE, None) is not self:
            return
        for name, module in self._modules.items():
            if module.processor is self._processors[name]:
                module.set_processor(self._processors[name].original)
        for hook in self._hooks:
            hook.remove()
        delattr(self.denoiser, "_reset_stateful_cache")
        delattr(self.denoiser, ATTRIBUTE)
        self._end_run()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.disable()

    def _select(self, layers: str | list[str]) -> tuple[dict[str, str], dict[str, str]]:
        """Layers to serve (name to kind), and those left alone (name to reason)."""
        modules, kinds = attention_layers(self.denoiser), layer_kinds(self.denoiser)
        wanted = select_layers(kinds, layers)
        reasons = {name: unsupported(name, modules[name]) for name in wanted}
        refused = {name: reason for name, reason in reasons.items() if reason}
        served = {name: kinds[name] for name in wanted if name not in refused}
        if refused and (self._strict or not served):
            name, reason = next(iter(refused.items()))
            raise UnsupportedLayerError(f"{len(refused)} of {len(wanted)} layers cannot be served: {name}: {reason}")
        if not served:
            raise UnsupportedLayerError(f"{type(self.denoiser).__name__} has no attention layer to serve")
        if refused:
            name, reason = next(iter(refused.items()))
            warnings.warn(
                f"attnreuse leaves {len(refused)} of {len(wanted)} layers alone, such as {name}: {reason} "
                "(session.report().skipped lists them)",
                stacklevel=4,
            )
        return served, refused

    def _check_patterns(self) -> None:
        """Every layer pattern of the policy should match a layer that is served."""
        patterns = list(self.policy.reuse) if isinstance(self.policy.reuse, dict) else []
        unmatched = [p for p in patterns if not fnmatch.filter(self._kinds, p)]
        if unmatched:
            message = f"policy {self.policy.name!r} names layers that are not served here: {', '.join(unmatched)}"
            if self._strict:
                raise PolicyMismatchError(message)
            warnings.warn(message, stacklevel=4)

    # -- the run

    def step(self, step: int, steps: int) -> None:
        """For custom loops: say before the denoiser calls of each step that they are step `step` of `steps`."""
        self._clock.set(step, steps)

    @property
    def tick(self) -> Tick | None:
        """Where the latest denoiser call stands in its run; None outside of one."""
        return self._clock.last

    def report(self) -> Report:
        """What the run in progress, or else the last one, did."""
        return self._report

    def _before(self, args: tuple, kwargs: dict) -> None:
        """Runs before each denoiser call: place it in the run and set every layer's action and map."""
        self._enter()
        try:
            given = self._signature.bind(None, *args, **kwargs).arguments
            given.pop("self")
            tick = self._clock.place(given["timestep"])
            self._own(tick)
            self._clock.last = tick
            if tick.new_run:
                self._begin_run(tick)
            branch = self._branch(tick, given)
            self._check_maps(tick, branch, given)
            self._arm(tick, branch, given)
        except _OtherThreadError:
            self._busy = None  # the other thread's run goes on
            raise
        except BaseException:
            self._abort()
            raise

    def _after(self, output: Any) -> None:
        """Runs after each denoiser call, also when it raised (then without output)."""
        if self._busy != threading.get_ident():
            return  # a call that `_before` refused
        self._busy = None
        if output is None:
            self._abort()
            return
        tick = self._clock.last
        for layer in self._report.layers:
            action = self._processors[layer.name].action
            layer.computed += action is Action.COMPUTE
            layer.captured += action is Action.CAPTURE
            layer.reused += action is Action.REUSE
        self._report.steps = tick.step + 1
        if tick.step == tick.steps - 1 and tick.call == len(self._branches) - 1:
            self._release()
            self._clock.finish()

    def _enter(self) -> None:
        me = threading.get_ident()
        with self._door:
            inside, self._busy = self._busy, self._busy or me
        if inside not in (None, me):
            raise _OtherThreadError(
                f"thread {me} calls a denoiser that thread {inside} is inside of: give each thread its own pipeline"
            )

    def _own(self, tick: Tick) -> None:
        me = threading.get_ident()
        if tick.new_run:
            self._owner = me
        elif self._owner != me:
            raise _OtherThreadError(
                f"thread {me} calls a denoiser at step {tick.step} of a run that thread {self._owner} began: "
                "give each thread its own pipeline"
            )

    def _begin_run(self, tick: Tick) -> None:
        self._release()
        self._report = self._empty_report()
        self._check_policy(tick.steps)
        self._only_compute(
            {
                name: f"replaced by {type(module.processor).__name__} after enable"
                for name, module in self._modules.items()
                if module.processor is not self._processors[name]
            }
        )

    def _check_policy(self, steps: int) -> None:
        policy, scheduler = self.policy, self._scheduler()
        scheduler = None if scheduler is None else type(scheduler).__name__
        if policy.steps != steps:
            raise PolicyMismatchError(
                f"policy {policy.name!r} is for {policy.steps} executed steps, this run executes {steps} "
                f"({scheduler}; Heun executes 2 N - 1, PNDM N + 1, img2img N * strength): make the policy for {steps}"
            )
        differences = [
            f"{what}: policy {made_for!r}, run {here!r}"
            for what, made_for, here in (
                ("scheduler", policy.scheduler, scheduler),
                ("model", policy.model, model_name(self._pipe or self.denoiser)),
            )
            if None not in (made_for, here) and made_for != here
        ]
        if differences:
            message = f"policy {policy.name!r} was made for something else: {'; '.join(differences)}"
            if self._strict:
                raise PolicyMismatchError(message)
            warnings.warn(message, stacklevel=2)

    def _branch(self, tick: Tick, given: dict[str, Any]) -> _Branch:
        """The state of call `tick.call` of each step; made, with its ring, when first seen."""
        tensors = {k: v for k, v in given.items() if isinstance(v, Tensor) and k not in ("timestep", *MASKS)}
        signature = {k: f"{list(v.shape)} {v.dtype} {v.device}" for k, v in tensors.items()}
        if tick.call not in self._branches:
            self._branches[tick.call] = _Branch(signature, self._allocate(given))
        branch = self._branches[tick.call]
        if branch.signature != signature:
            raise StaleMapError(
                f"call {tick.call} of step {tick.step} differs from the run's first: expected {branch.signature}, got "
                f"{signature}; maps cannot be carried over (dynamic guidance changes the batch: turn it off)"
            )
        return branch

    def _allocate(self, given: dict[str, Any]) -> MapRing:
        """Plan and allocate this run's maps for inputs of these shapes."""
        active = [name for name in self._modules if name not in self._report.skipped]
        shapes, sample = planner.map_shapes(self.denoiser, given), given["sample"]
        if self._strict:
            for name in active:
                reason = ops.fallback_reason(self.map_format, sample.device, sample.dtype, shapes[name][1])
                if reason:
                    raise UnsupportedLayerError(f"layer {name} would run through plain torch: {reason}")
        requests = planner.map_requests(self.policy, active, shapes)
        plan = plan_ring(requests, self.map_format, self._budget)
        ring = MapRing(plan, sample.device)
        self._report.predicted_bytes += plan.nbytes
        self._report.allocated_bytes += ring.nbytes
        for layer in self._report.layers:
            layer.map_bytes += ring.slots[layer.name].nbytes if layer.name in ring.slots else 0
            layer.shape, layer.head_dim = shapes.get(layer.name, (None, None))
        self._only_compute(
            {
                name: f"its map of {nbytes:,} bytes does not fit the memory budget of {self._budget:,}"
                for name, nbytes in plan.dropped.items()
            }
        )
        return ring

    def _only_compute(self, reasons: dict[str, str]) -> None:
        """Report layers that will not reuse in this run, and warn."""
        if reasons:
            name, reason = next(iter(reasons.items()))
            warnings.warn(f"attnreuse: {len(reasons)} layers only compute, such as {name}: {reason}", stacklevel=2)
        self._report.skipped.update(reasons)

    def _check_maps(self, tick: Tick, branch: _Branch, given: dict[str, Any]) -> None:
        """Every layer that will reuse must hold the map of the step its policy means."""
        for name in branch.ring.slots:
            actions = self.actions[name]
            if actions[tick.step] is not Action.REUSE:
                continue
            expected = max(s for s in range(tick.step) if actions[s] is Action.CAPTURE)
            actual = branch.ring.captured_at.get(name)
            if actual != expected:
                held = "none was captured" if actual is None else f"the one held is of step {actual}"
                raise StaleMapError(
                    f"layer {name} reuses the map of step {expected} at step {tick.step}, but {held}: "
                    "a run must execute its steps in order, each with the same number of denoiser calls"
                )
        for name in MASKS:
            if name not in branch.masks or not self._anyone(Action.REUSE, tick.step):
                continue
            step, mask = branch.masks[name]
            if not _same_mask(mask, given.get(name)):
                raise StaleMapError(
                    f"{name} at step {tick.step} is not the one the maps of step {step} were captured with: "
                    f"expected {_described(mask)}, got {_described(given.get(name))} with other values or shape"
                )

    def _anyone(self, action: Action, step: int) -> bool:
        return any(actions[step] is action for actions in self.actions.values())

    def _arm(self, tick: Tick, branch: _Branch, given: dict[str, Any]) -> None:
        for name, processor in self._processors.items():
            processor.slot = branch.ring.slots.get(name)
            processor.action = Action.COMPUTE if processor.slot is None else self.actions[name][tick.step]
            if processor.action is Action.CAPTURE:
                branch.ring.captured(name, tick.step)
        if self._anyone(Action.CAPTURE, tick.step):
            for name in MASKS:
                mask = given.get(name)
                branch.masks[name] = (tick.step, None if mask is None else mask.clone())

    def _release(self) -> None:
        """Drop the maps and their memory; every layer computes until a run begins."""
        self._branches = {}
        for processor in self._processors.values():
            processor.action, processor.slot = Action.COMPUTE, None

    def _abort(self) -> None:
        """After an exception nothing of the run is to be trusted."""
        self._busy = None
        self._end_run()

    def _end_run(self, *args: Any, **kwargs: Any) -> None:
        self._release()
        self._clock.reset()

    def _empty_report(self) -> Report:
        layers = [LayerReport(name, kind) for name, kind in self._kinds.items()]
        return Report(str(self.policy), self.map_format.name, layers=layers, skipped=dict(self._skipped))


class _OtherThreadError(AttnReuseError):
    """A call from a thread that does not own the run."""


class _EndOfRun:
    """Ends a session's run when a pipeline is done; inert on a deep-copied denoiser."""

    def __init__(self, session: Any):
        self._session = session

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        session = self._session()
        if session is not None:
            session._end_run()

    def __deepcopy__(self, memo: dict) -> _EndOfRun:
        return _EndOfRun(lambda: None)


def enable(
    pipe: Any,
    policy: Policy | str | Path,
    *,
    map_format: str = "u8",
    memory_budget: int | str | None = None,
    layers: str | list[str] = "self",
    scheduler: Any = None,
    strict: bool = False,
) -> Session:
    """Reuse attention maps in `pipe` as `policy` says, until :func:`disable`.

    Args:
        pipe: a diffusers pipeline with a ``UNet2DConditionModel``, or such a denoiser.
        policy: which executed steps reuse; a :class:`Policy`, a policy file, or ``"user/name"`` on
            the Hugging Face Hub.
        map_format: "fp32", "fp16", "bf16", "u8", "u7" or "u4".
        memory_budget: most bytes the maps of a denoiser call may take, a number or like "4GiB"; layers
            that do not fit only compute, and are reported. None: whatever the policy needs.
        layers: "self", "cross", "all", or ``fnmatch`` patterns of layer names.
        scheduler: for a denoiser without its pipeline; or call :meth:`Session.step` in your loop.
        strict: an unsupported layer, a layer that no kernel of the device serves, or a policy made for
            another model or scheduler, is an error instead of a warning.

    Returns:
        The session: ``.report()`` after a run, ``.disable()``, usable in ``with``. A session already
        on this denoiser is disabled first.

    Raises:
        UnsupportedLayerError: no layer can be served, or under `strict` one cannot.
        ValueError: unknown format, layer pattern or budget, or a broken policy file.
    """
    denoiser = find_denoiser(pipe)
    is_pipe = hasattr(pipe, "unet")
    chosen = (format_named(map_format), planner.parse_bytes(memory_budget), layers, strict)
    policy = load_policy(policy)
    disable(denoiser)
    session = Session(denoiser, pipe if is_pipe else None, scheduler, policy, *chosen)
    session._attach()
    return session


def disable(pipe: Any) -> None:
    """Undo :func:`enable` on a pipeline or denoiser; nothing happens where nothing was enabled."""
    session = getattr(find_denoiser(pipe), ATTRIBUTE, None)
    if session is not None:
        session.disable()


def find_denoiser(pipe: Any) -> Any:
    """The UNet of a pipeline (or the UNet itself), out of its ``torch.compile`` wrapper."""
    from diffusers import UNet2DConditionModel

    found = getattr(pipe, "unet", pipe)
    found = getattr(found, "_orig_mod", found)
    if not isinstance(found, UNet2DConditionModel):
        raise UnsupportedLayerError(
            f"expected a pipeline with a UNet2DConditionModel, or such a model, got {type(pipe).__name__}"
            + (f" with a {type(found).__name__}" if found is not pipe else "")
        )
    return found


def model_name(pipe: Any) -> str:
    """The name a policy file knows the model by: its hub name, or the last part of its folder."""
    path = getattr(pipe.config, "_name_or_path", "") or type(pipe).__name__
    return Path(path).name if os.path.isdir(path) else path


def _same_mask(captured: Tensor | None, given: Tensor | None) -> bool:
    if captured is None or given is None:
        return captured is given
    return captured.shape == given.shape and captured.dtype == given.dtype and torch.equal(captured, given)


def _described(mask: Tensor | None) -> str:
    return "no mask" if mask is None else f"{list(mask.shape)} {mask.dtype}"
