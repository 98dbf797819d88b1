"""Before the run: map shapes at a resolution, the ring they need, and what each step should cost.

Shapes come from the model itself: a copy of its architecture on the meta device (no weights, no
memory) is called once with tensors of the run's shapes. The copy is stock: what other tools patched
into the model (merged, tiled or skipped tokens) is not in it, so a patched layer shows by its shape.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pydantic import ByteSize, TypeAdapter, ValidationError
from torch import Tensor
from torch.utils._pytree import tree_map_only

from attnreuse import ops
from attnreuse.adapters import adapter_of, parameters
from attnreuse.binding.denoiser import form_of
from attnreuse.binding.processors import ShapeRecorder, attention_layers
from attnreuse.binding.schedule import Schedule, kept_outputs
from attnreuse.errors import UnsupportedLayerError
from attnreuse.maps.formats import MapFormat
from attnreuse.maps.ring import MapRequest
from attnreuse.policy import Action


class LayerShape(NamedTuple):
    """Sizes of an attention layer in a run: of its map ``(B, H, M, N)``, of a head, and of its output's channels."""

    map: tuple[int, int, int, int]
    head_dim: int
    channels: int


Shapes = dict[str, LayerShape]  # by layer name
_shapes: dict[str, Shapes] = {}  # by model config and inputs


def parse_bytes(budget: int | str | None) -> int | None:
    """``"4GiB"``, ``"500 MB"``, ``"2G"`` or a number of bytes; None stays None.

    Raises:
        ValueError: anything else.
    """
    if budget is None or isinstance(budget, int):
        return budget
    try:
        return int(TypeAdapter(ByteSize).validate_python(budget))
    except ValidationError:
        raise ValueError(f"memory_budget must be bytes or like '4GiB', '500MB' or '2G', got {budget!r}") from None


def map_shapes(denoiser: Any, inputs: dict[str, Any], layers: dict[str, Any] | None = None) -> Shapes:
    """Sizes of every attention layer, in order of execution.

    Args:
        denoiser: the model; its config counts, or its modules where they are no longer the config's.
        inputs: arguments of its forward, by name; only shapes and Python values are used.
        layers: its attention layers, where they are at hand.

    Raises:
        UnsupportedLayerError: they cannot be told; the message holds the reason.
    """
    accepted = set(parameters(denoiser)) - {"cross_attention_kwargs"}
    given = {name: _without_scale(inputs[name]) for name in sorted(accepted & inputs.keys())}
    given = tree_map_only(Tensor, _on_meta, given)
    layers = layers or attention_layers(denoiser)
    adapter = adapter_of(denoiser)
    forms = {name: form_of(adapter, attn) for name, attn in layers.items()}
    sizes = {n: (attn.heads, forms[n].head_dim(attn), forms[n].channels(attn)) for n, attn in layers.items()}
    key = f"{type(denoiser).__name__} {denoiser.to_json_string()} {sizes} {given}"
    if key not in _shapes:
        if len(_shapes) >= 256:
            _shapes.clear()
        _shapes[key] = {
            name: LayerShape((b, sizes[name][0], m, n), *sizes[name][1:])
            for name, (b, _, m, n) in _record(denoiser, given, set(layers)).items()
        }
    return _shapes[key]


def _record(denoiser: Any, given: dict[str, Any], layers: set[str]) -> dict[str, tuple[int, int, int, int]]:
    """Map shapes ``(B, H, M, N)`` of the layers of a stock twin of `denoiser`."""
    adapter, said = adapter_of(denoiser), ""
    for make in (_twin_of_config, _twin_of_modules):
        try:
            twin = make(denoiser)
            if set(attention_layers(twin)) != layers:
                continue  # blocks were taken out or put in
            shapes: dict[str, tuple[int, int, int, int]] = {}
            for name, attn in attention_layers(twin).items():
                stock = adapter.stock(attn)
                attn.set_processor(ShapeRecorder(name, shapes, stock(), adapter.forms()[stock]))
            with torch.no_grad():
                twin(**{**given, adapter.sample: adapter.resized(given[adapter.sample], twin)})
            return shapes
        except Exception as error:  # whatever a changed model raises
            said = f": {type(error).__name__}: {error}"
    raise UnsupportedLayerError(f"the map shapes of this {type(denoiser).__name__} cannot be told{said}")


def _twin_of_config(denoiser: Any) -> Any:
    """The model of this config, without weights."""
    with torch.device("meta"):
        return type(denoiser).from_config(adapter_of(denoiser).config(denoiser)).eval()


def _twin_of_modules(denoiser: Any) -> Any:
    """The modules of this model, without weights, hooks and patches."""
    weights = itertools.chain(denoiser.parameters(), denoiser.buffers())
    memo = {id(w): torch.empty_like(w, device="meta", requires_grad=False) for w in weights}
    for p in denoiser.parameters():
        memo[id(p)] = torch.nn.Parameter(memo[id(p)], requires_grad=False)
    twin = copy.deepcopy(denoiser, memo)
    for module in twin.modules():
        module.__dict__.pop("forward", None)
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
        stock = next(c for c in type(module).__mro__ if c.__module__.split(".")[0] in ("diffusers", "torch"))
        if stock is not torch.nn.Module:
            module.__class__ = stock
    return twin.float().eval()


def map_requests(
    schedule: Schedule,
    layers: list[str],
    shapes: Shapes,
    map_format: MapFormat,
    dtype: torch.dtype,
    device: torch.device,
) -> list[MapRequest]:
    """What the ring must hold for `schedule`: one request per layer that ever reuses or holds.

    Args:
        dtype, device: of the layers' outputs, in a run.
    """
    requests = []
    for name in layers:
        actions = schedule.actions[name]
        mapped = {step for step, action in enumerate(actions) if action in (Action.CAPTURE, Action.REUSE)}
        held = {step for step, action in enumerate(actions) if action is Action.HOLD}
        held |= {step for step, keeps in enumerate(kept_outputs(actions)) if keeps}
        used = mapped | held
        if used:
            (b, _, m, _), channels = shapes[name].map, shapes[name].channels
            reuses = actions.count(Action.REUSE) + actions.count(Action.HOLD)
            output = (b, m, channels) if held else None
            shape = shapes[name].map if mapped else None
            work = shape and ops.workspace_bytes(map_format, shape, device, dtype, shapes[name].head_dim)
            requests.append(MapRequest(name, shape, min(used), max(used), reuses, output, dtype, work or 0))
    return requests


@dataclass(frozen=True)
class LayerCost:
    """Median seconds of one attention layer at one step, by action, with its projections."""

    compute: float
    capture: float
    reuse: float
    hold: float

    def total(self, actions: list[Action]) -> float:
        """Seconds of a run with these actions."""
        return sum(getattr(self, action.value) for action in actions)


def _without_scale(given: Any) -> Any:
    """A table of arguments for attention, without the strength of adapters, which changes no shape."""
    return {name: value for name, value in given.items() if name != "scale"} if isinstance(given, dict) else given


def _on_meta(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype, device="meta")
