"""The denoiser of a pipeline: which model it is, its attention layers, and which of them can be served."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.nn import Dropout, Linear

from attnreuse import ops
from attnreuse.binding.processors import attention_layers, stock_of, stock_processors
from attnreuse.errors import UnsupportedLayerError

EXCLUDED = {
    "fuser": "GLIGEN's fuser attends over grounding tokens, not image tokens",
    "motion_modules": "motion modules attend over frames",
}


def find_denoiser(pipe: Any) -> Any:
    """The UNet of a pipeline (or the UNet itself), out of its ``torch.compile`` wrapper."""
    from diffusers import UNet2DConditionModel

    denoiser = unwrapped(pipe)
    if not isinstance(denoiser, UNet2DConditionModel):
        raise UnsupportedLayerError(
            f"expected a pipeline with a UNet2DConditionModel, or such a model, got {type(pipe).__name__}"
            + (f" with a {type(denoiser).__name__}" if denoiser is not pipe else "")
        )
    return denoiser


def unwrapped(pipe: Any) -> Any:
    """The ``unet`` of a pipeline, or what it is given, out of its ``torch.compile`` wrapper."""
    denoiser = getattr(pipe, "unet", pipe)
    return getattr(denoiser, "_orig_mod", denoiser)


def model_name(pipe: Any) -> str:
    """The name a policy file knows the model by: its hub name, or the last part of its folder."""
    path = getattr(pipe.config, "_name_or_path", "") or type(pipe).__name__
    return Path(path).name if os.path.isdir(path) else path


def layer_kinds(denoiser: Any) -> dict[str, str]:
    """ "self" or "cross" of every attention layer, by name."""
    return {n: "cross" if m.is_cross_attention else "self" for n, m in attention_layers(denoiser).items()}


def select_layers(kinds: dict[str, str], layers: str | Sequence[str] | None, named: Sequence[str] = ()) -> list[str]:
    """Names that `layers` means: "self", "cross", "all", or ``fnmatch`` patterns of names.

    None means self-attention, and what a policy speaks of by its full name, which is in `named`.

    Raises:
        ValueError: a pattern that matches no layer.
    """
    if layers is None:
        return [name for name, kind in kinds.items() if kind == "self" or name in named]
    if layers in ("all", "self", "cross"):
        return [name for name, kind in kinds.items() if layers in ("all", kind)]
    patterns = [layers] if isinstance(layers, str) else list(layers)
    for pattern in patterns:
        if not fnmatch.filter(kinds, pattern):
            raise ValueError(
                f"layers must be 'self', 'cross', 'all' or patterns of layer names; {pattern!r} matches none "
                f"of the {len(kinds)} layers (such as {next(iter(kinds), None)!r})"
            )
    return [name for name in kinds if any(fnmatch.fnmatchcase(name, p) for p in patterns)]


def head_dim(attn: Any) -> int:
    """Channels of a head's values."""
    return attn.to_v.out_features // attn.heads


def never_served(name: str, attn: Any) -> str | None:
    """Why this layer cannot be served, whatever its processor; or None."""
    for part, reason in EXCLUDED.items():
        if part in name.split("."):
            return reason
    if head_dim(attn) > ops.MAX_HEAD_DIM:
        return f"its heads have {head_dim(attn)} channels; at most {ops.MAX_HEAD_DIM} are served"
    return None


def holding_layers(denoiser: Any, layers: dict[str, Any] | None = None) -> list[str]:
    """Those of its `layers` (None: all) whose values depend on its context alone: they hold their output, not a map."""
    if getattr(denoiser, "encoder_hid_proj", None) is not None:  # what they attend over is made anew at each call
        return []
    layers = attention_layers(denoiser) if layers is None else layers
    return [n for n, m in layers.items() if m.is_cross_attention and opaque(m) is None]


def opaque(attn: Any) -> str | None:
    """Why it cannot be told whether a layer would give the same output again, or None.

    Its values and output are made by plain layers, whose weights say all. Adapters, quantised layers, hooks and patches
    have a state of their own.
    """
    if attn.residual_connection or attn.spatial_norm is not None or attn.norm_cross:
        return "its output depends on more than its map and values"
    for name, module, plain in (
        ("to_v", attn.to_v, Linear),
        ("to_out", attn.to_out[0], Linear),
        ("to_out", attn.to_out[1], Dropout),
    ):
        if type(module) is not plain:
            return f"its {name} is a {type(module).__name__}, not a plain layer"
        if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
            return f"another tool hooks into its {name}"
    return None


def foreign(attn: Any) -> str | None:
    """Why the processor that this layer has now cannot be stood in for; or None."""
    processor = type(stock_of(attn.processor))
    if processor in stock_processors():
        return None
    served = " and ".join(t.__name__ for t in stock_processors())
    return f"its processor is {processor.__name__}; only {served} are served"


def unsupported(name: str, attn: Any) -> str | None:
    """Why this layer cannot be served as it is now, or None."""
    return never_served(name, attn) or foreign(attn)
