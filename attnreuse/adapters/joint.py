"""Joint attention: image and text tokens in two streams, which attend over both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from attnreuse.adapters.adapter import empty
from attnreuse.adapters.forms import Inputs, Projected, Query, last_part, split_heads


def text_inputs(config: Any, batch: int, tokens: int) -> dict[str, Any]:
    """Arguments on meta that models of joint attention take besides their pictures."""
    return {
        "timestep": empty(batch),
        "encoder_hidden_states": empty(batch, tokens, config["joint_attention_dim"]),
        "pooled_projections": empty(batch, config["pooled_projection_dim"]),
    }


class Joint(Projected):
    """Layers of two streams, each with projections of its own, or of one stream without a context.

    Args:
        image_first: image tokens stand before those of the text.
        fused: queries, keys and values of a stream are one projection; None: as the layer says.
        normed: queries and keys have norms, where the layer has them.
    """

    def __init__(self, image_first: bool, fused: bool | None = None, normed: bool = True):
        self._image_first, self._fuses, self._normed = image_first, fused, normed

    def kind(self, attn: Any) -> str:
        return "self" if attn.added_kv_proj_dim is None else "joint"

    def channels(self, attn: Any) -> int:
        return attn.to_q.out_features if attn.pre_only else super().channels(attn)

    def map_shape(self, attn: Any, given: Tensor, context: Tensor | None) -> tuple[int, int, int, int]:
        tokens = given.shape[1] + (0 if context is None else context.shape[1])
        return given.shape[0], attn.heads, tokens, tokens

    def inputs(self, attn: Any, given: Tensor, context: Tensor | None, mask: Tensor | None, extra: Any) -> Inputs:
        return Inputs(given, given, context, mask, extra)

    def value(self, attn: Any, inputs: Inputs) -> Tensor:
        fused, image, text = self._fused(attn), inputs.tokens, inputs.context
        values = [last_part(attn.to_qkv, image, 3) if fused else attn.to_v(image)]
        if text is not None:
            values.append(last_part(attn.to_added_qkv, text, 3) if fused else attn.add_v_proj(text))
        return self._joined(*(split_heads(v, attn.heads) for v in values))

    def query(self, attn: Any, inputs: Inputs) -> Query:
        streams = [(inputs.tokens, "to_qkv", ("to_q", "to_k"), ("norm_q", "norm_k"))]
        if inputs.context is not None:
            names = ("add_q_proj", "add_k_proj"), ("norm_added_q", "norm_added_k")
            streams.append((inputs.context, "to_added_qkv", *names))
        made = [self._projected(attn, *stream) for stream in streams]
        query, key = (self._joined(*parts) for parts in zip(*made, strict=True))
        return self._placed(Query(query, key), inputs)

    def finish(self, attn: Any, inputs: Inputs, output: Tensor) -> Any:
        image, text = self._parted(output.transpose(1, 2).flatten(2), inputs.given, inputs.context)
        if not attn.pre_only:
            image = attn.to_out[1](attn.to_out[0](image))
        if text is None:
            return image
        return image, text if attn.context_pre_only else attn.to_add_out(text)

    def flat(self, given: Any) -> Tensor:
        return given if isinstance(given, Tensor) else self._joined(*given, dim=1)

    def unflat(self, flat: Tensor, given: Tensor, context: Tensor | None) -> Any:
        image, text = self._parted(flat, given, context)
        return image if text is None else (image, text)

    def makers(self, attn: Any) -> dict[str, Module] | None:
        apart = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
        names = ("to_qkv", "to_added_qkv") if self._fused(attn) else apart
        made = {name: getattr(attn, name, None) for name in (*names, "to_add_out")}
        if not attn.pre_only:
            made |= {"to_out": attn.to_out[0], "to_out's dropout": attn.to_out[1]}
        return {name: module for name, module in made.items() if module is not None}

    def _fused(self, attn: Any) -> bool:
        return attn.fused_projections if self._fuses is None else self._fuses

    def _projected(
        self, attn: Any, tokens: Tensor, fused: str, projections: tuple[str, str], norms: tuple[str, str]
    ) -> list[Tensor]:
        """Query and key ``[B, H, N, D]`` of one stream."""
        if self._fused(attn):
            made = getattr(attn, fused)(tokens).chunk(3, dim=-1)[:2]
        else:
            made = [getattr(attn, name)(tokens) for name in projections]
        made = [split_heads(x, attn.heads) for x in made]
        if not self._normed:
            return made
        return [x if (norm := getattr(attn, name)) is None else norm(x) for x, name in zip(made, norms, strict=True)]

    def _placed(self, made: Query, inputs: Inputs) -> Query:
        """Queries and keys with what else the processor makes of them."""
        return made

    def _joined(self, image: Tensor, text: Tensor | None = None, dim: int = 2) -> Tensor:
        if text is None:
            return image
        return torch.cat([image, text] if self._image_first else [text, image], dim=dim)

    def _parted(self, x: Tensor, given: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The streams of ``[B, N, C]``."""
        if context is None:
            return x, None
        sizes = [given.shape[1], context.shape[1]]
        if self._image_first:
            return x.split(sizes, dim=1)
        text, image = x.split(sizes[::-1], dim=1)
        return image, text
