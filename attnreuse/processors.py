"""Attention processors for diffusers: compute, capture or reuse, as the session says before each call."""

from __future__ import annotations

import fnmatch
from typing import Any

from torch import Tensor

from attnreuse import ops
from attnreuse.formats import AttentionMap
from attnreuse.policy import Action

EXCLUDED = {
    "fuser": "GLIGEN's fuser attends over grounding tokens, not image tokens",
    "motion_modules": "motion modules attend over frames",
}


def stock_processors() -> tuple[type, ...]:
    """The processors of diffusers that :class:`ReuseAttnProcessor` stands in for."""
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    return AttnProcessor2_0, AttnProcessor


def attention_layers(denoiser: Any) -> dict[str, Any]:
    """Every attention module of `denoiser`, by name, in order of definition (not of execution)."""
    return {name: m for name, m in denoiser.named_modules() if hasattr(m, "set_processor") and hasattr(m, "to_q")}


def layer_kinds(denoiser: Any) -> dict[str, str]:
    """ "self" or "cross" of every attention layer, by name."""
    return {n: "cross" if m.is_cross_attention else "self" for n, m in attention_layers(denoiser).items()}


def select_layers(kinds: dict[str, str], layers: str | list[str]) -> list[str]:
    """Names that `layers` means: "self", "cross", "all", or ``fnmatch`` patterns of names.

    Raises:
        ValueError: a pattern that matches no layer.
    """
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


def unsupported(name: str, attn: Any) -> str | None:
    """Why this layer cannot be served, or None."""
    for part, reason in EXCLUDED.items():
        if part in name.split("."):
            return reason
    processor = stock_of(attn.processor)
    if type(processor) not in stock_processors():
        served = " and ".join(t.__name__ for t in stock_processors())
        return f"its processor is {type(processor).__name__}; only {served} are served"
    return None


def stock_of(processor: Any) -> Any:
    """The processor itself, or the one that ours stands in for (diffusers may have made a bare one of ours)."""
    return processor.original if isinstance(processor, ReuseAttnProcessor) else processor


class ReuseAttnProcessor:
    """Stands in for ``AttnProcessor2_0`` or ``AttnProcessor`` on one layer.

    compute calls the processor it replaced, untouched. capture and reuse repeat that processor's
    steps around :func:`attnreuse.ops.capture` and :func:`attnreuse.ops.reuse`; reuse never projects
    Q and K. Without a session (``load_ip_adapter`` constructs it bare) it only computes.

    Attributes:
        original: the processor it replaced.
        action: what the next call does.
        slot: the map of the next call, ``(B, H, M, N)``, when it captures or reuses.
    """

    def __init__(self, original: Any = None):
        self.original = original if original is not None else stock_processors()[0]()
        self.action = Action.COMPUTE
        self.slot: AttentionMap | None = None

    def __deepcopy__(self, memo: dict) -> Any:
        """A copied denoiser has no session: its layers get the stock processor back."""
        return self.original

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if self.action is Action.COMPUTE:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        residual, shape = hidden_states, hidden_states.shape
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)  # [B, M, C]
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states
        if encoder_hidden_states is not None:
            context = encoder_hidden_states
            if attn.norm_cross:
                context = attn.norm_encoder_hidden_states(context)

        value = _split_heads(attn.to_v(context), attn.heads)  # [B, H, N, D]
        if self.action is Action.CAPTURE:
            output = self._capture(attn, hidden_states, context, value, attention_mask)
        else:
            output = ops.reuse(self.slot, value)  # [B, H, M, D]

        output = attn.to_out[1](attn.to_out[0](output.transpose(1, 2).flatten(2)))
        if len(shape) == 4:
            output = output.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            output = output + residual
        return output / attn.rescale_output_factor

    def _capture(self, attn: Any, hidden_states: Tensor, context: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        query = _split_heads(attn.to_q(hidden_states), attn.heads)  # [B, H, M, D]
        key = _split_heads(attn.to_k(context), attn.heads)  # [B, H, N, D]
        scale = attn.scale
        if type(self.original) is stock_processors()[0]:  # it ignores attn.scale, the older one qk-norm
            scale = None
            query = query if attn.norm_q is None else attn.norm_q(query)
            key = key if attn.norm_k is None else attn.norm_k(key)
        if mask is not None:
            b, n, _ = context.shape
            mask = attn.prepare_attention_mask(mask, n, b).view(b, attn.heads, -1, n)
        return ops.capture(query, key, value, mask=mask, scale=scale, into=self.slot)[0]


class ShapeRecorder:
    """Notes the map shape ``(B, H, M, N)`` and head dim of each layer it is set on, then computes."""

    def __init__(self, name: str, shapes: dict[str, tuple[tuple[int, int, int, int], int]]):
        self.name, self.shapes, self.original = name, shapes, stock_processors()[0]()

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args, **kwargs):
        queries = hidden_states.flatten(2).shape[-1] if hidden_states.ndim == 4 else hidden_states.shape[1]
        keys = queries if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        shape = (hidden_states.shape[0], attn.heads, queries, keys)
        self.shapes[self.name] = (shape, attn.to_v.out_features // attn.heads)
        return self.original(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, N, H D]`` to ``[B, H, N, D]``, a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
