"""The denoiser of a pipeline: which model it is, its attention layers, and which of them can be served."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch.nn import Dropout, Linear, Module

from attnreuse import ops
from attnreuse.adapters import Adapter, Form, adapter_of, parts
from attnreuse.adapters.forms import is_hooked
from attnreuse.binding.processors import attention_layers, stock_of, takes_extra
from attnreuse.errors import UnsupportedLayerError

KINDS = ("all", "self", "cross")  # of layers, by name


def part_of(pipe: Any) -> Any:
    """The denoiser of a pipeline as it stands there, or None for a denoiser alone."""
    if isinstance(pipe, Module):
        return None
    return next((part for name in parts() if (part := getattr(pipe, name, None)) is not None), None)


def find_denoiser(pipe: Any) -> Any:
    """The denoiser of a pipeline (or the denoiser itself), out of its ``torch.compile`` wrapper.

    Raises:
        UnsupportedLayerError: it has none, or one that no adapter serves.
    """
    denoiser = unwrapped(pipe)
    if not isinstance(denoiser, Module):
        without = "".join(f" whose {name} is None" for name in parts() if hasattr(pipe, name))
        raise UnsupportedLayerError(
            f"expected a pipeline with a {' or '.join(parts())}, or such a model, got {type(pipe).__name__}{without}"
        )
    adapter_of(denoiser)
    return denoiser


def unwrapped(pipe: Any) -> Any:
    """The denoiser of a pipeline, or what it is given, out of its ``torch.compile`` wrapper."""
    part = part_of(pipe)
    denoiser = pipe if part is None else part
    return getattr(denoiser, "_orig_mod", denoiser)


def model_name(pipe: Any) -> str:
    """The name a policy file knows the model by: its hub name, or the last part of its folder."""
    path = getattr(pipe.config, "_name_or_path", "") or type(pipe).__name__
    return Path(path).name if os.path.isdir(path) else path


def layer_kinds(denoiser: Any) -> dict[str, str]:
    """ "self", "cross" or "joint" of every attention layer, by name."""
    adapter = adapter_of(denoiser)
    return {name: adapter.kind(name, attn) for name, attn in attention_layers(denoiser).items()}


def select_layers(kinds: dict[str, str], layers: str | Sequence[str] | None, named: Sequence[str] = ()) -> list[str]:
    """Names that `layers` means: "self" (joint attention, too), "cross", "all", or ``fnmatch`` patterns of names.

    None means "self", and what a policy speaks of by its full name, which is in `named`.

    Raises:
        ValueError: a pattern that matches no layer.
    """
    if layers is None:
        return [name for name, kind in kinds.items() if kind != "cross" or name in named]
    if layers in KINDS:
        return [name for name, kind in kinds.items() if layers == "all" or (layers == "cross") == (kind == "cross")]
    patterns = [layers] if isinstance(layers, str) else list(layers)
    for pattern in unmatched_by(kinds, patterns):
        raise ValueError(
            f"layers must be 'self', 'cross', 'all' or patterns of layer names; {pattern!r} matches none "
            f"of the {len(kinds)} layers (such as {next(iter(kinds), None)!r})"
        )
    return [name for name in kinds if any(fnmatch.fnmatchcase(name, p) for p in patterns)]


def unmatched_by(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Those of the `patterns` that match none of these names of layers."""
    return [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]


def form_of(adapter: Adapter, attn: Any) -> Form:
    """How a layer attends with its processor, or, where that is another tool's, with the stock one."""
    forms = adapter.forms()
    return forms.get(type(stock_of(attn.processor))) or forms[adapter.stock(attn)]


def never_served(adapter: Adapter, name: str, attn: Any) -> str | None:
    """Why this layer cannot be served, whatever its processor; or None."""
    for part in name.split("."):
        if part in adapter.left_alone:
            return adapter.left_alone[part]
    head_dim = form_of(adapter, attn).head_dim(attn)
    if head_dim > ops.MAX_HEAD_DIM:
        return f"its heads have {head_dim} channels; at most {ops.MAX_HEAD_DIM} are served"
    return None


def holding_layers(denoiser: Any, layers: dict[str, Any] | None = None) -> list[str]:
    """Those of its `layers` (None: all) whose values depend on its context alone: they hold their output, not a map."""
    adapter = adapter_of(denoiser)
    if not adapter.hands_on_context(denoiser):  # what they attend over is made anew at each call
        return []
    layers = attention_layers(denoiser) if layers is None else layers
    return [n for n, m in layers.items() if adapter.kind(n, m) == "cross" and opaque(form_of(adapter, m), m) is None]


def opaque(form: Form, attn: Any) -> str | None:
    """Why it cannot be told whether a layer would give the same output again, or None.

    Its values and output are made by plain layers, whose weights say all. Adapters, quantised layers, hooks and patches
    have a state of their own.
    """
    makers = form.makers(attn)
    if makers is None:
        return "its output depends on more than its map and values"
    for name, module in makers.items():
        if type(module) not in (Linear, Dropout):
            return f"its {name} is a {type(module).__name__}, not a plain layer"
        if is_hooked(module):
            return f"another tool hooks into its {name}"
    return None


def foreign(adapter: Adapter, attn: Any) -> str | None:
    """Why the processor that this layer has now cannot be stood in for; or None.

    Raises:
        UnsupportedLayerError: an adapter serves it, and it is not called as processors are.
    """
    processor, forms = stock_of(attn.processor), adapter.forms()
    form = forms.get(type(processor))
    if form is None:
        usual = adapter.stock(attn).__name__
        own = type(processor).__name__
        return f"its processor is {own}; {usual} and its kin are served, others by an adapter (docs/adapters.md)"
    takes_extra(type(processor))
    if type(getattr(attn.to_q, "weight", None)).__name__ == "DTensor":
        return "tensor parallelism splits its heads between devices"
    return diverted(processor) if form.dispatched else None


def diverted(processor: Any) -> str | None:
    """Why a processor that attends through diffusers' attention backends does it otherwise than torch; or None."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    if processor._parallel_config is not None:
        return "context parallelism splits its tokens between devices"
    active, _ = _AttentionBackendRegistry.get_active_backend()
    backend = str(getattr(processor._attention_backend or active, "value", processor._attention_backend or active))
    return None if backend == "native" else f"its attention backend is {backend!r}; only 'native' is served"


def unsupported(adapter: Adapter, name: str, attn: Any) -> str | None:
    """Why this layer cannot be served as it is now, or None."""
    return never_served(adapter, name, attn) or foreign(adapter, attn)
