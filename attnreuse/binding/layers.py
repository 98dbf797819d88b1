"""The attention layers that a policy speaks of: chosen once, told before each denoiser call what to do.

A policy is advice, a map is evidence: a layer reuses only what the branch of this call holds of it, and
computes exactly otherwise. Its processor stands in for the stock one during the call alone, so that
whoever reads, sets, saves or copies processors finds their own; what the layer then really did is noted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnreuse.adapters import adapter_of
from attnreuse.binding.denoiser import KINDS, diverted, foreign, layer_kinds, never_served, opaque, select_layers
from attnreuse.binding.processors import (
    ANY_CONTEXT,
    CAPTURE,
    COMPUTE,
    OTHER_SHAPE,
    ReuseAttnProcessor,
    attention_layers,
    stock_of,
    takes_extra,
)
from attnreuse.binding.report import LayerReport, Report
from attnreuse.binding.run import Branch, Run
from attnreuse.binding.schedule import CACHED, NOTHING
from attnreuse.binding.weights import Weights, add_state
from attnreuse.errors import UnsupportedLayerError
from attnreuse.maps.formats import MapFormat
from attnreuse.policy import Action, Policy, Rule

QUERY_AND_KEY = {"to_q", "to_k", "to_qkv", "to_kv", "add_q_proj", "add_k_proj", "to_added_qkv", "norm_q", "norm_k"}
NOT_CALLED = "it was not called (the model or another tool skipped it)"
IDLE = "the model did not call it in such calls before"
CHANGED = "its weights have changed since its output was kept"
NO_CONTEXT = "the denoiser was given nothing that it attends over"


class Layers:
    """The layers of one denoiser that `layers` means and that can be served.

    Args:
        denoiser: the model.
        layers, named: as in :func:`~attnreuse.binding.denoiser.select_layers`.

    Attributes:
        denoiser, adapter: the model, and what serves it.
        all: every attention layer of the denoiser, by name.
        modules: those to serve, by name.
        kinds: "self", "cross" or "joint", by name.
        around: the layers and the blocks they lie in.
        refused: layers that cannot be served, with the reason; those whose processor is another tool's are
            in `modules` all the same, since it may be taken off again.
        unexpected: those of `refused` but what the family leaves alone, which only patterns of names ask for.

    Raises:
        UnsupportedLayerError: there is none to serve.
    """

    def __init__(self, denoiser: Any, layers: str | Sequence[str] | None, named: Sequence[str] = ()):
        modules, kinds = attention_layers(denoiser), layer_kinds(denoiser)
        self.denoiser, self.adapter = denoiser, adapter_of(denoiser)
        wanted = select_layers(kinds, layers, named)
        never = {name: reason for name in wanted if (reason := never_served(self.adapter, name, modules[name]))}
        self.refused = never | {n: r for n in wanted if n not in never and (r := self._foreign(modules[n]))}
        if len(self.refused) == len(wanted):
            name, reason = next(iter(self.refused.items()), ("", "it has no attention layer to serve"))
            count = f"{len(wanted)} of {len(wanted)} layers cannot be served: {name}: " if wanted else ""
            raise UnsupportedLayerError(f"{type(denoiser).__name__}: {count}{reason}")
        by_kind = layers is None or layers in KINDS
        aside = set(self.adapter.left_alone.values()) if by_kind else set()
        self.unexpected = {name: reason for name, reason in self.refused.items() if reason not in aside}
        self.all = modules
        self.modules = {name: modules[name] for name in wanted if name not in never}
        self.kinds = {name: kinds[name] for name in self.modules}
        self._forms = self.adapter.forms()
        self._found = {attn: stock_of(attn.processor) for attn in modules.values() if self._has_default(attn)}
        parents = [name.split(".") for name in self.modules]
        paths = {".".join(parts[:i]) for parts in parents for i in range(1, len(parts) + 1)}
        self.around = [module for name, module in denoiser.named_modules() if name in paths]
        self._entries = [(name, module.__dict__, ReuseAttnProcessor()) for name, module in self.modules.items()]
        self._in_place = False  # our processors
        # Of this call: the action, and the weights of an output that is kept.
        self._armed: list[tuple[str, ReuseAttnProcessor, str, Weights | None]] = []
        self._others: list[ReuseAttnProcessor] = []  # that another tool's stands in the place of, in this call
        self._reasons: dict[str, str] = {}  # why layers do not do what the policy says, in this call

    def foreign(self) -> dict[str, str]:
        """Layers whose processor is another tool's now, with the reason why they are left alone."""
        return {name: reason for name, module in self.modules.items() if (reason := self._foreign(module))}

    def _foreign(self, module: Any) -> str | None:
        return foreign(self.adapter, module)

    def query_key_state(self) -> tuple:
        """What queries and keys are made by: equal as long as it is the same, in the same state."""
        found: list[Any] = []
        for module in self.modules.values():
            for name, projection in module._modules.items():
                if name in QUERY_AND_KEY and projection is not None:
                    add_state(projection, found)
        return tuple(found)

    def empty_report(self, policy: Policy | Rule, map_format: MapFormat) -> Report:
        """Of a run of which nothing is done yet."""
        skipped = {name: reason for name, reason in self.refused.items() if name not in self.modules}
        skipped |= {name: reason for name, reason in self.foreign().items() if self.refused.get(name) == reason}
        layers = [LayerReport(name=name, kind=kind) for name, kind in self.kinds.items()]
        return Report(policy=str(policy), map_format=map_format.name, layers=layers, skipped=skipped)

    def put_back(self) -> None:
        """Every layer that has a default processor, then and now, gets the one found at first, bit for bit."""
        self.disarm()
        for attn, processor in self._found.items():
            if self._has_default(attn):
                attn.set_processor(processor)
        for attn in self.all.values():  # another tool may have put ours back
            if isinstance(attn.processor, ReuseAttnProcessor):
                attn.set_processor(stock_of(attn.processor))

    def _has_default(self, attn: Any) -> bool:
        """Whether the processor is one that diffusers sets by itself: of torch's attention, or written out."""
        default, now = self.adapter.stock(attn).__name__, type(stock_of(attn.processor)).__name__
        return now.removesuffix("2_0") == default.removesuffix("2_0") and not self._foreign(attn)

    # -- a call

    def arm(self, run: Run, branch: Branch | None, given: dict[str, Any], off: str | None = None) -> None:
        """Before a call with the arguments `given`: tell every layer what to do.

        Without a branch all compute, for the reason `off`.
        """
        self._reasons, self._armed, self._others, self._in_place = {}, [], [], True
        forms = self._forms
        for (name, attributes, processor), planned in zip(self._entries, run.schedule.at(run.step), strict=True):
            current = stock_of(attributes.get("processor"))  # another tool may have put ours back
            processor.did = processor.why = None
            action, reason = Action.COMPUTE, off
            form = forms.get(type(current))
            if form is None or (form.dispatched and diverted(current)):
                self._others.append(processor)
                self._reasons[name] = self._foreign(self.modules[name])
                continue
            processor.original, processor.form = current, form
            processor.takes_extra = takes_extra(type(current))
            attributes["processor"] = processor
            if branch is not None and planned != NOTHING:
                action, reason = self._arm_layer(name, processor, *planned, run, branch, given)
            processor.action = action._value_  # `.value` costs a call a layer
            if reason is not None:
                self._reasons[name] = reason

    def _arm_layer(
        self,
        name: str,
        processor: ReuseAttnProcessor,
        planned: Action,
        keep: bool,
        run: Run,
        branch: Branch,
        given: dict[str, Any],
    ) -> tuple[Action, str | None]:
        """Tell a layer what to do; gives that, and why it is not as planned, if it is not."""
        ring = branch.ring
        if name in branch.idle:
            return Action.COMPUTE, None
        if name not in ring.plan.requests:
            return Action.COMPUTE, run.report.skipped.get(name) or branch.why or "it has no memory for a map"
        is_cross = self.kinds[name] == "cross"
        context = given.get("encoder_hidden_states") if is_cross else None
        unfit = None
        if keep or planned is Action.HOLD:
            unfit = NO_CONTEXT if is_cross and context is None else opaque(processor.form, self.modules[name])
        action, reason = planned, self._missing(name, planned, processor.form, unfit, run, branch)
        if reason is not None:
            action = Action.CAPTURE if run.schedule.reuses_after(name, run.step) else Action.COMPUTE
            keep = run.schedule.planned(name, run.step + 1) is Action.HOLD
        keep = keep and unfit is None
        if action in (Action.CAPTURE, Action.REUSE):
            processor.slot, processor.outline = ring.places[name], ring.outlines[name]
            processor.workspace = ring.workspace
        if keep or action is Action.HOLD:
            processor.output, processor.kept = ring.outputs[name], False
            processor.context = ANY_CONTEXT if self.kinds[name] == "joint" else context
        if keep or action is not Action.COMPUTE:
            weights = Weights(processor.form.makers(self.modules[name])) if keep else None
            self._armed.append((name, processor, action._value_, weights))
        return action, reason

    def _missing(
        self, name: str, planned: Action, form: Any, unfit: str | None, run: Run, branch: Branch
    ) -> str | None:
        """Why the branch does not hold what layer `name` is to reuse or hold; None if it does."""
        if planned not in CACHED:
            return None
        if planned is Action.HOLD and unfit is not None:
            return unfit
        due = run.schedule.due(name, run.step)
        if planned is Action.REUSE:
            lost = f"its map of step {due} was not captured"
            at = branch.ring.captured_at.get(name, -1)
        else:
            lost = f"its output of step {due} was not kept"
            at, made_with = branch.ring.kept_at.get(name, (-1, None))
            if made_with is not None and made_with != Weights(form.makers(self.modules[name])):
                return CHANGED
        return None if at >= due else branch.missed.get(name) or branch.why or lost

    def disarm(self) -> None:
        """After a call: the layers get their processors back, and let go of the maps."""
        if not self._in_place:
            return
        self._in_place = False
        for _, attributes, processor in self._entries:
            processor.action = COMPUTE
            if attributes.get("processor") is processor:
                attributes["processor"] = processor.original
        for _, processor, *_ in self._armed:
            processor.slot = processor.outline = processor.workspace = processor.output = processor.context = None

    def note(self, run: Run, branch: Branch | None) -> None:
        """After a call: keep what the layers did, and which maps they wrote.

        Raises:
            UnsupportedLayerError: every layer with a map attends over other tokens than the map is for.
        """
        for name, processor, action, weights in self._armed:
            if processor.why:
                self._reasons[name] = processor.why
            missed = None
            if action == CAPTURE:
                wrote = processor.did == CAPTURE
                branch.ring.captured(name, run.step) if wrote else branch.ring.captured_at.pop(name, None)
                missed = None if wrote else "map"
            if weights is not None:
                if processor.kept:  # offloaded weights come to lie where they are read within the call
                    weights.moved()
                    branch.ring.kept(name, run.step, weights)
                else:
                    branch.ring.kept_at.pop(name, None)
                    missed = "output"
            if missed is not None:
                branch.missed[name] = f"it wrote no {missed} at step {run.step}: {processor.why or NOT_CALLED}"
            elif weights is not None or action == CAPTURE:
                branch.missed.pop(name, None)
        for processor in self._others:
            processor.did = COMPUTE
        run.calls.append((run.step, [processor.did for _, _, processor in self._entries], self._reasons))
        first = run.step == run.schedule.first_kept
        if first and self._armed and all(processor.why is OTHER_SHAPE for _, processor, *_ in self._armed):
            name, count = self._armed[0][0], len(self._armed)
            raise UnsupportedLayerError(f"none of the {count} layers can reuse, such as {name}: {OTHER_SHAPE}")

    def report(self, run: Run) -> None:
        """Bring the run's report up to date."""
        for step, dids, reasons in run.calls:
            for layer, did in zip(run.report.layers, dids, strict=True):
                reason = NOT_CALLED if did is None else reasons.get(layer.name, IDLE)
                layer.count(run.schedule.planned(layer.name, step), None if did is None else Action(did), reason)
        run.calls.clear()

    def deviation(self, run: Run) -> str | None:
        """The first layer that is to reuse in this call by the policy and does not, with the reason."""
        for name, reason in self._reasons.items():
            planned = run.schedule.planned(name, run.step)
            if planned in CACHED and name not in run.report.skipped:
                doing = "reusing" if planned is Action.REUSE else "holding"
                return f"layer {name} computes at step {run.step} instead of {doing}: {reason}"
        return None
