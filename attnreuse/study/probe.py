"""Processors that see attention maps, and may have others applied instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from attnreuse.adapters import Form, Inputs, adapter_of
from attnreuse.binding.denoiser import find_denoiser, form_of
from attnreuse.binding.enabling import enable
from attnreuse.binding.hooks import Attached
from attnreuse.binding.processors import ReuseAttnProcessor, attention_layers
from attnreuse.maps.formats import AttentionMap, format_named
from attnreuse.policy import Action, Policy
from attnreuse.study.evaluate import Evaluator

Visit = Callable[[int, str, Tensor], Tensor | None]  # (step, layer, map [B, H, M, N]) to the map to apply instead


class ProbeAttnProcessor(ReuseAttnProcessor):
    """Shows `visit` the layer's map at the steps wanted, and applies what it gives back, if anything."""

    def __init__(self, original: Any, form: Form, visit: Callable[[Tensor], Tensor | None]):
        super().__init__(original, form)
        self.visit = visit

    def _fits(self, attn: Any, hidden_states: Tensor, context: Tensor | None) -> bool:
        return True  # it makes a map as the layer comes

    def _capture(self, attn: Any, inputs: Inputs, value: Tensor) -> Tensor:
        shape = self.form.map_shape(attn, inputs.given, inputs.context)
        self.slot = AttentionMap.empty(format_named("fp32"), shape, value.device)
        output = super()._capture(attn, inputs, value)
        instead = self.visit(self.slot.dense())
        return output if instead is None else instead.to(value.dtype) @ value


@contextmanager
def probing(evaluator: Evaluator, steps: set[int], visit: Visit) -> Iterator[None]:
    """Within, `visit` sees every served layer's map at these executed steps, and may replace it."""
    denoiser = find_denoiser(evaluator.pipe)
    modules = {name: attention_layers(denoiser)[name] for name in evaluator.served()}
    adapter = adapter_of(denoiser)
    never = Policy(steps=evaluator.executed_steps, reuse=[False] * evaluator.executed_steps)

    def probe(name: str) -> ProbeAttnProcessor:
        attn = modules[name]

        def see(attn_map: Tensor) -> Tensor | None:
            return visit(session.tick.step, name, attn_map)

        return ProbeAttnProcessor(attn.processor, form_of(adapter, attn), see)

    probes = {module: probe(name) for name, module in modules.items()}

    def arm(*call: Any) -> None:
        for processor in probes.values():
            processor.did = None
            processor.action = (Action.CAPTURE if session.tick.step in steps else Action.COMPUTE).value

    # The session tells the step, and leaves the probes alone.
    with enable(evaluator.pipe, never) as session, Attached(denoiser, before=arm, processors=probes):
        yield


def noisy(size: float, seed: int) -> Visit:
    """Adds noise of relative Frobenius `size`, proportional to the map, that keeps the sums of its rows."""

    def visit(step: int, name: str, attn_map: Tensor) -> Tensor:
        g = torch.Generator().manual_seed(seed * 1_000 + step + sum(map(ord, name)))
        change = attn_map * torch.randn(attn_map.shape, generator=g).to(attn_map.device)
        change -= attn_map * change.sum(-1, keepdim=True)
        return attn_map + change * (size * attn_map.norm() / change.norm())

    return visit


def stale(place: int, age: int) -> Visit:
    """Keeps the maps of step `place - age`, and applies them at `place`."""
    held: dict[str, Tensor] = {}

    def visit(step: int, name: str, attn_map: Tensor) -> Tensor | None:
        if step == place:
            return held.pop(name)
        held[name] = attn_map.clone()
        return None

    return visit
