"""What a layer's queries, keys and outputs are made by: whether it is the same as at an earlier call."""

from __future__ import annotations

import functools
from typing import Any

from torch.nn import Module

from attnreuse.binding.conditions import writes


def add_state(projection: Any, found: list[Any]) -> None:
    """Add what a projection's output follows from: its modules, how often their weights were written to, its adapters.

    This runs for hundreds of projections before every call: `modules()` takes ten times as long.
    """
    modules = [projection]
    for part in projection._modules.values():
        modules += (part, *part._modules.values())
    for module in modules:
        if module._parameters:
            found.append(module)
            counts = [writes(weight) for weight in module._parameters.values() if weight is not None]
            found += [UNCOUNTED if count is None else count for count in counts]
    if hasattr(projection, "active_adapters"):  # of peft
        found += (projection.disable_adapters, *projection.active_adapters, *projection.merged_adapters)
        found += [_rounded(float(scale)) for scale in getattr(projection, "scaling", {}).values()]
        if hasattr(projection.base_layer, "active_adapters"):  # of another kind
            add_state(projection.base_layer, found)


@functools.lru_cache(1024)
def _rounded(scale: float) -> str:
    """A scale that is multiplied and divided by the same is not quite what it was."""
    return f"{scale:.6g}"


class _Uncounted:
    """How often a tensor of ``torch.inference_mode`` was written to: nothing tells, so as often as before."""

    def __eq__(self, other: object) -> bool:
        return other is self or isinstance(other, int)

    __hash__ = None


UNCOUNTED = _Uncounted()


class Weights:
    """The weights that a layer makes its output with, as they are now; equal as long as they are the same.

    They are kept alive, so that no others can come to lie at their addresses.
    """

    def __init__(self, makers: dict[str, Module]):
        self._tensors = [p for maker in makers.values() for p in maker.parameters()]
        self._marks = [(id(p), writes(p)) for p in self._tensors]
        self.moved()

    def moved(self) -> None:
        """They may lie elsewhere now, with the same values."""
        self._addresses = [p.data_ptr() for p in self._tensors]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Weights) and (self._marks, self._addresses) == (other._marks, other._addresses)

    __hash__ = None
