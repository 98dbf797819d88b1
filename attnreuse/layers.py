"""The attention layers that a policy speaks of: chosen once, told before each denoiser call what to do.

A policy is advice, a map is evidence: a layer reuses only what the branch of this call holds of it, and
computes exactly otherwise. Its processor stands in for the stock one during the call alone, so that
whoever reads, sets, saves or copies processors finds their own; what the layer then really did is noted.
"""

from __future__ import annotations

import fnmatch
from typing import Any

from attnreuse.denoiser import foreign, layer_kinds, never_served, select_layers
from attnreuse.errors import UnsupportedLayerError
from attnreuse.policy import Action
from attnreuse.processors import CAPTURE, COMPUTE, OTHER_SHAPE, ReuseAttnProcessor, attention_layers, stock_processors
from attnreuse.report import LayerReport
from attnreuse.run import Branch, Run

NOT_CALLED = "it was not called (another tool skipped it)"


class Layers:
    """The layers of one denoiser that `layers` means and that can be served.

    Args:
        denoiser: the model.
        layers: "self", "cross", "all", or ``fnmatch`` patterns of names.

    Attributes:
        all: every attention layer of the denoiser, by name.
        modules: those to serve, by name.
        kinds: "self" or "cross", by name.
        around: the layers and the blocks they lie in.
        refused: layers that cannot be served, with the reason; those whose processor is another tool's are
            in `modules` all the same, since it may be taken off again.

    Raises:
        UnsupportedLayerError: there is none to serve.
    """

    def __init__(self, denoiser: Any, layers: str | list[str]):
        modules, kinds = attention_layers(denoiser), layer_kinds(denoiser)
        wanted = select_layers(kinds, layers)
        never = {name: reason for name in wanted if (reason := never_served(name, modules[name]))}
        self.refused = never | {n: r for n in wanted if n not in never and (r := foreign(modules[n]))}
        if len(self.refused) == len(wanted):
            name, reason = next(iter(self.refused.items()), ("", "it has no attention layer to serve"))
            count = f"{len(wanted)} of {len(wanted)} layers cannot be served: {name}: " if wanted else ""
            raise UnsupportedLayerError(f"{type(denoiser).__name__}: {count}{reason}")
        self.all = modules
        self.modules = {name: modules[name] for name in wanted if name not in never}
        self.kinds = {name: kinds[name] for name in self.modules}
        self._stock = set(stock_processors())
        self._found = {module: module.processor for module in modules.values() if not foreign(module)}
        parents = [name.split(".") for name in self.modules]
        paths = {".".join(parts[:i]) for parts in parents for i in range(1, len(parts) + 1)}
        self.around = [module for name, module in denoiser.named_modules() if name in paths]
        self._entries = [(name, module.__dict__, ReuseAttnProcessor()) for name, module in self.modules.items()]
        self._in_place = False  # our processors
        self._armed: list[tuple[str, ReuseAttnProcessor]] = []  # in this call
        self._others: list[ReuseAttnProcessor] = []  # that another tool's stands in the place of, in this call
        self._reasons: dict[str, str] = {}  # why layers do not do what the policy says, in this call

    def unmatched(self, patterns: list[str]) -> list[str]:
        """Those of these layer patterns that match no layer here."""
        return [p for p in patterns if not fnmatch.filter(self.kinds, p)]

    def foreign(self) -> dict[str, str]:
        """Layers whose processor is another tool's now, with the reason why they are left alone."""
        return {name: reason for name, module in self.modules.items() if (reason := foreign(module))}

    def reports(self) -> list[LayerReport]:
        """Empty reports of the layers."""
        return [LayerReport(name, kind) for name, kind in self.kinds.items()]

    def put_back(self) -> None:
        """Every layer that has a stock processor gets the one found at first, bit for bit."""
        self.disarm()
        for module, processor in self._found.items():
            if not foreign(module):
                module.set_processor(processor)

    # -- a call

    def arm(self, run: Run, branch: Branch | None, off: str | None = None) -> None:
        """Before a call: tell every layer what to do; all compute without a branch, for the reason `off`."""
        self._reasons, self._armed, self._others, self._in_place = {}, [], [], True
        stock, places, outlines = self._stock, {}, {}
        if branch is not None:
            places, outlines = branch.ring.places, branch.ring.outlines
        for (name, attributes, processor), planned in zip(self._entries, run.schedule.at(run.step), strict=True):
            current = attributes.get("processor")
            processor.did = processor.why = None
            action, reason = Action.COMPUTE, off
            if type(current) not in stock:
                self._others.append(processor)
                self._reasons[name] = foreign(self.modules[name])
                continue
            processor.original = current
            attributes["processor"] = processor
            if branch is not None and planned is not Action.COMPUTE:
                action, reason = self._action(name, planned, run, branch)
                if action is not Action.COMPUTE:
                    processor.slot, processor.outline = places[name], outlines[name]
                    self._armed.append((name, processor))
            processor.action = action._value_  # `.value` costs a call a layer
            if reason is not None:
                self._reasons[name] = reason

    def _action(self, name: str, planned: Action, run: Run, branch: Branch) -> tuple[Action, str | None]:
        """What layer `name` does where the policy says capture or reuse, and why, if that is something else."""
        if name not in branch.ring.places:
            return Action.COMPUTE, run.report.skipped.get(name) or branch.why or "it has no memory for a map"
        if planned is Action.CAPTURE:
            return planned, None
        due = run.schedule.due(name, run.step)
        if branch.ring.captured_at.get(name, -1) >= due:
            return planned, None
        reason = branch.missed.get(name) or branch.why or f"its map of step {due} was not captured"
        goes_on = run.schedule.planned(name, run.step + 1) is Action.REUSE
        return Action.CAPTURE if goes_on else Action.COMPUTE, reason

    def disarm(self) -> None:
        """After a call: the layers get their processors back, and let go of the maps."""
        if not self._in_place:
            return
        self._in_place = False
        for _, attributes, processor in self._entries:
            if attributes.get("processor") is processor:
                attributes["processor"] = processor.original
        for _, processor in self._armed:
            processor.slot = processor.outline = None

    def note(self, run: Run, branch: Branch | None) -> None:
        """After a call: keep what the layers did, and which maps they wrote.

        Raises:
            UnsupportedLayerError: every layer with a map attends over other tokens than the map is for.
        """
        for name, processor in self._armed:
            if processor.why:
                self._reasons[name] = processor.why
            if processor.did == CAPTURE:
                branch.ring.captured(name, run.step)
                branch.missed.pop(name, None)
            elif processor.action == CAPTURE:
                branch.ring.captured_at.pop(name, None)
                branch.missed[name] = f"it wrote no map at step {run.step}: {processor.why or NOT_CALLED}"
        for processor in self._others:
            processor.did = COMPUTE
        run.calls.append((run.step, [processor.did for _, _, processor in self._entries], self._reasons))
        first = run.step == run.schedule.first_capture
        if first and self._armed and all(processor.why is OTHER_SHAPE for _, processor in self._armed):
            name, count = self._armed[0][0], len(self._armed)
            raise UnsupportedLayerError(f"none of the {count} layers can reuse, such as {name}: {OTHER_SHAPE}")

    def report(self, run: Run) -> None:
        """Bring the run's report up to date."""
        for step, dids, reasons in run.calls:
            for layer, did in zip(run.report.layers, dids, strict=True):
                reason = NOT_CALLED if did is None else reasons.get(layer.name)
                layer.count(run.schedule.planned(layer.name, step), None if did is None else Action(did), reason)
        run.calls.clear()

    def deviation(self, run: Run) -> str | None:
        """The first layer that is to reuse in this call by the policy and does not, with the reason."""
        for name, reason in self._reasons.items():
            if run.schedule.planned(name, run.step) is Action.REUSE and name not in run.report.skipped:
                return f"layer {name} computes at step {run.step} instead of reusing: {reason}"
        return None
