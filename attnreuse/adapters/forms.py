"""Forms: how the layers of a stock processor make queries, keys and values, and what they make of an attention output.

A form holds no state. It repeats the steps of its processor around the attention itself, so that maps can be
captured and reused between them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import Linear, Module
from torch.nn.functional import linear


class Inputs(NamedTuple):
    """What one call of a layer attends with.

    Attributes:
        given: what the layer was given: ``[B, M, C]`` or ``[B, C, Y, X]``.
        tokens: the same as its queries are made from, ``[B, M, C]``, normalised.
        context: what it was given to attend over, ``[B, N, C']``, normalised; or None.
        mask: as it was given, or None.
        extra: a fourth argument: rotary embeddings, or the embedded timestep; or None.
    """

    given: Tensor
    tokens: Tensor
    context: Tensor | None
    mask: Tensor | None
    extra: Any


class Query(NamedTuple):
    """``query`` ``[B, H, M, D]``, ``key`` ``[B, H, N, D]``, ``mask`` as of :func:`attnreuse.ops.capture`, ``scale``."""

    query: Tensor
    key: Tensor
    mask: Tensor | None = None
    scale: float | None = None


class Form(Protocol):
    """How the layers of a stock processor attend; `attn` is the layer's module.

    Attributes:
        dispatched: the processor attends through diffusers' attention backends, which a user may change.
    """

    dispatched: bool

    def kind(self, attn: Any) -> str:
        """ "self": over its tokens; "cross": over the context alone; "joint": over both."""

    def head_dim(self, attn: Any) -> int:
        """Channels of a head's values."""

    def channels(self, attn: Any) -> int:
        """Channels of the layer's output."""

    def map_shape(self, attn: Any, given: Tensor, context: Tensor | None) -> tuple[int, int, int, int]:
        """``(B, H, M, N)`` of a call's map."""

    def inputs(self, attn: Any, given: Tensor, context: Tensor | None, mask: Tensor | None, extra: Any) -> Inputs:
        """What a call attends with."""

    def value(self, attn: Any, inputs: Inputs) -> Tensor:
        """``[B, H, N, D]``; projects no query and no key."""

    def query(self, attn: Any, inputs: Inputs) -> Query:
        """What the map follows from."""

    def finish(self, attn: Any, inputs: Inputs, output: Tensor) -> Any:
        """What the layer gives for an attention output ``[B, H, M, D]``."""

    def flat(self, given: Any) -> Tensor:
        """What a layer gave, as one tensor ``[B, M, C]``, or with as many elements in another order."""

    def unflat(self, flat: Tensor, given: Tensor, context: Tensor | None) -> Any:
        """Undo :meth:`flat` for a call with the same arguments."""

    def makers(self, attn: Any) -> dict[str, Module] | None:
        """The layers that make its output, by name; None where its output depends on more than them and its inputs."""


class Projected:
    """What the forms here have in common: projections ``to_q`` and ``to_out``, and an output of one tensor."""

    dispatched = False

    def head_dim(self, attn: Any) -> int:
        return attn.to_q.out_features // attn.heads

    def channels(self, attn: Any) -> int:
        return attn.to_out[0].out_features

    def flat(self, given: Any) -> Tensor:
        return given


class Plain(Projected):
    """``AttnProcessor2_0`` and its kin: one stream of tokens, which attends over itself or over a context.

    Args:
        scaled: it honours ``attn.scale`` and knows no norms of queries and keys, as ``AttnProcessor`` does;
            ``AttnProcessor2_0`` does the reverse.
    """

    def __init__(self, scaled: bool = False):
        self._scaled = scaled

    def kind(self, attn: Any) -> str:
        return "cross" if attn.is_cross_attention else "self"

    def map_shape(self, attn: Any, given: Tensor, context: Tensor | None) -> tuple[int, int, int, int]:
        queries = given.shape[1] if given.ndim == 3 else given.shape[2] * given.shape[3]
        return given.shape[0], attn.heads, queries, queries if context is None else context.shape[1]

    def inputs(self, attn: Any, given: Tensor, context: Tensor | None, mask: Tensor | None, extra: Any) -> Inputs:
        tokens = given if attn.spatial_norm is None else attn.spatial_norm(given, extra)
        if tokens.ndim == 4:
            tokens = tokens.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            tokens = attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
        if context is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        return Inputs(given, tokens, context, mask, extra)

    def value(self, attn: Any, inputs: Inputs) -> Tensor:
        value = self._project_value(attn, inputs.tokens if inputs.context is None else inputs.context)
        return _grouped_heads(value, attn.heads, self.head_dim(attn))

    def query(self, attn: Any, inputs: Inputs) -> Query:
        over = inputs.tokens if inputs.context is None else inputs.context
        query, key = self._project_query(attn, inputs.tokens, inputs.context)
        query = split_heads(query, attn.heads)
        key = split_heads(key, key.shape[-1] // self.head_dim(attn))
        if not self._scaled:
            query = query if attn.norm_q is None else attn.norm_q(query)
            key = key if attn.norm_k is None else attn.norm_k(key)
        key = _repeated_heads(key, attn.heads)
        return Query(query, key, self._mask(attn, inputs.mask, over), attn.scale if self._scaled else None)

    def finish(self, attn: Any, inputs: Inputs, output: Tensor) -> Tensor:
        output = attn.to_out[1](attn.to_out[0](output.transpose(1, 2).flatten(2)))
        if inputs.given.ndim == 4:
            output = output.transpose(-1, -2).reshape(inputs.given.shape)
        if attn.residual_connection:
            output = output + inputs.given
        return output / attn.rescale_output_factor

    def unflat(self, flat: Tensor, given: Tensor, context: Tensor | None) -> Tensor:
        return flat if given.ndim == 3 else flat.view(len(given), -1, *given.shape[2:])

    def makers(self, attn: Any) -> dict[str, Module] | None:
        if attn.residual_connection or attn.spatial_norm is not None or attn.norm_cross:
            return None
        projections = {name: getattr(attn, name) for name in ("to_q", "to_k", "to_v")}
        return projections | {"to_out": attn.to_out[0], "to_out's dropout": attn.to_out[1]}

    def _project_value(self, attn: Any, over: Tensor) -> Tensor:
        return attn.to_v(over)

    def _project_query(self, attn: Any, tokens: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return attn.to_q(tokens), attn.to_k(tokens if context is None else context)

    def _mask(self, attn: Any, mask: Tensor | None, over: Tensor) -> Tensor | None:
        if mask is None:
            return None
        b, n, _ = over.shape
        return attn.prepare_attention_mask(mask, n, b).view(b, attn.heads, -1, n)


class Dispatched(Plain):
    """A plain layer whose processor attends through diffusers' attention backends."""

    dispatched = True


class Fused(Plain):
    """``FusedAttnProcessor2_0``: queries, keys and values are one projection, or keys and values are."""

    def makers(self, attn: Any) -> dict[str, Module] | None:
        makers = super().makers(attn)
        fused = {"to_kv": attn.to_kv} if attn.is_cross_attention else {"to_qkv": attn.to_qkv}
        apart = ("to_k", "to_v") if attn.is_cross_attention else ("to_q", "to_k", "to_v")
        return makers and {**fused, **{name: maker for name, maker in makers.items() if name not in apart}}

    def _project_value(self, attn: Any, over: Tensor) -> Tensor:
        return last_part(attn.to_kv, over, 2) if attn.is_cross_attention else last_part(attn.to_qkv, over, 3)

    def _project_query(self, attn: Any, tokens: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if context is None:
            query, key, _ = attn.to_qkv(tokens).chunk(3, dim=-1)
            return query, key
        return attn.to_q(tokens), attn.to_kv(context).chunk(2, dim=-1)[0]


class AddedKV(Projected):
    """``AttnAddedKVProcessor2_0`` and its kin: keys and values of a context stand before those of the tokens.

    Args:
        scaled: as of :class:`Plain`.
        spatial: it applies ``attn.spatial_norm``, as ``SlicedAttnAddedKVProcessor`` does.
    """

    def __init__(self, scaled: bool = False, spatial: bool = False):
        self._scaled, self._spatial = scaled, spatial

    def kind(self, attn: Any) -> str:
        return "cross" if attn.only_cross_attention else "joint"

    def map_shape(self, attn: Any, given: Tensor, context: Tensor | None) -> tuple[int, int, int, int]:
        queries = given[0, 0].numel()
        added = queries if context is None else context.shape[1]
        return given.shape[0], attn.heads, queries, added if attn.only_cross_attention else added + queries

    def inputs(self, attn: Any, given: Tensor, context: Tensor | None, mask: Tensor | None, extra: Any) -> Inputs:
        tokens = attn.spatial_norm(given, extra) if self._spatial and attn.spatial_norm is not None else given
        tokens = tokens.flatten(2).transpose(1, 2)
        if context is None:
            context = tokens  # before its norm
        elif attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        tokens = attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
        return Inputs(given, tokens, context, mask, extra)

    def value(self, attn: Any, inputs: Inputs) -> Tensor:
        return self._keyed(attn, inputs, attn.add_v_proj, attn.to_v)

    def query(self, attn: Any, inputs: Inputs) -> Query:
        mask, (b, m, _) = inputs.mask, inputs.tokens.shape
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, m, b).unflatten(0, (b, attn.heads))
        query = split_heads(attn.to_q(inputs.tokens), attn.heads)
        key = self._keyed(attn, inputs, attn.add_k_proj, attn.to_k)
        return Query(query, key, mask, attn.scale if self._scaled else None)

    def finish(self, attn: Any, inputs: Inputs, output: Tensor) -> Tensor:
        output = attn.to_out[1](attn.to_out[0](output.transpose(1, 2).flatten(2)))
        return output.transpose(-1, -2).reshape(inputs.given.shape) + inputs.given

    def unflat(self, flat: Tensor, given: Tensor, context: Tensor | None) -> Tensor:
        return flat.view(given.shape)

    def makers(self, attn: Any) -> dict[str, Module] | None:
        return None  # it adds what it was given

    def _keyed(self, attn: Any, inputs: Inputs, added: Module, own: Module | None) -> Tensor:
        """Keys or values ``[B, H, N, D]`` of the context, then of the tokens."""
        projected = added(inputs.context)
        if not attn.only_cross_attention:
            projected = torch.cat([projected, own(inputs.tokens)], dim=1)
        return split_heads(projected, attn.heads)


@functools.cache
def attention_forms() -> Mapping[type, Form]:
    """Of the processors of the class ``Attention`` that image models use."""
    from diffusers.models import attention_processor as stock

    plain, older = Plain(), Plain(scaled=True)
    return {
        stock.AttnProcessor2_0: plain,
        stock.AttnProcessor: older,
        stock.SlicedAttnProcessor: older,
        stock.XFormersAttnProcessor: older,
        stock.FusedAttnProcessor2_0: Fused(),
        stock.AttnAddedKVProcessor2_0: AddedKV(),
        stock.AttnAddedKVProcessor: AddedKV(scaled=True),
        stock.XFormersAttnAddedKVProcessor: AddedKV(scaled=True),
        stock.SlicedAttnAddedKVProcessor: AddedKV(scaled=True, spatial=True),
    }


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, N, H D]`` to ``[B, H, N, D]``, a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def is_hooked(module: Module) -> bool:
    """Whether another tool takes part in the module's calls: by hooks, or a forward of its own."""
    return bool("forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks)


def last_part(projection: Module, x: Tensor, parts: int) -> Tensor:
    """The last of `parts` that a fused projection of `x` gives; the others are not computed where it is plain."""
    if type(projection) is not Linear or is_hooked(projection):  # offloaded weights come with the call alone
        return projection(x).chunk(parts, dim=-1)[-1]
    size = projection.out_features // parts
    return linear(x, projection.weight[-size:], None if projection.bias is None else projection.bias[-size:])


def _grouped_heads(x: Tensor, heads: int, head_dim: int) -> Tensor:
    """``[B, N, H' D]`` of H' heads to ``[B, H, N, D]``: each head of a group sees the group's own."""
    return _repeated_heads(split_heads(x, x.shape[-1] // head_dim), heads)


def _repeated_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
