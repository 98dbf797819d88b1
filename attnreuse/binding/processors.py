"""Attention processors for diffusers: compute, capture, reuse or hold, as the run says before each call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._device import DeviceContext

from attnreuse import ops
from attnreuse.maps.formats import AttentionMap
from attnreuse.maps.ring import OutputSlot
from attnreuse.policy import Action

COMPUTE, CAPTURE, REUSE, HOLD = (action.value for action in Action)
OTHER_SHAPE = "it attends over other tokens than its map is planned for (another tool merges, tiles or adds tokens)"
CALLED_AGAIN = "it was called several times in one denoiser call"
OVERRIDDEN = "another tool overrides its attention"
OTHER_CONTEXT = "it attends over another tensor than the denoiser was given (another tool changes it)"
OTHER_OUTPUT = "its output has another size or dtype than planned"


def stock_processors() -> tuple[type, ...]:
    """The processors of diffusers that :class:`ReuseAttnProcessor` stands in for."""
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    return AttnProcessor2_0, AttnProcessor


def attention_layers(denoiser: Any) -> dict[str, Any]:
    """Every attention module of `denoiser`, by name, in order of definition (not of execution)."""
    return {name: m for name, m in denoiser.named_modules() if hasattr(m, "set_processor") and hasattr(m, "to_q")}


def stock_of(processor: Any) -> Any:
    """The processor itself, or the one that ours stands in for."""
    return processor.original if type(processor) is ReuseAttnProcessor else processor


class ReuseAttnProcessor:
    """Stands in for ``AttnProcessor2_0`` or ``AttnProcessor`` on one layer, for one denoiser call.

    compute calls the processor it replaced, untouched. capture and reuse repeat that processor's
    steps around :func:`attnreuse.ops.capture` and :func:`attnreuse.ops.reuse`; reuse never projects
    Q and K. hold gives the output of an earlier call again. A layer that turns out to attend over other
    tokens than `slot` or `output` are for computes.

    Attributes:
        original: the processor it replaced.
        action: what the next call is to do: "compute", "capture", "reuse" or "hold" (:class:`Action` by value:
            the compiler guards a string on every layer, but one and the same enum member on the first alone).
        slot: the map of the next call, ``(B, H, M, N)``, when it captures or reuses.
        outline: a tensor of the slot's shape; code compiled for any size takes its sizes as symbols.
        output: what the next call gives when it holds, else where its output is kept; or None.
        context: what the next call attends over where that is the denoiser's, else None; checked for `output`.
        did: what the layer did, likewise; None as long as it was not called.
        kept: it wrote its output to `output`.
        why: why it computed instead of what it was to do, or did not keep its output; or None.
    """

    def __init__(self, original: Any = None):
        self.original = original if original is not None else stock_processors()[0]()
        self.action = COMPUTE
        self.did: str | None = None
        self.why: str | None = None
        self.slot: AttentionMap | None = None
        self.outline: Tensor | None = None
        self.output: OutputSlot | None = None
        self.context: Tensor | None = None
        self.kept = False

    def __deepcopy__(self, memo: dict) -> Any:
        """A copied denoiser has no session: its layers get the stock processor back."""
        return self.original

    def __reduce__(self) -> tuple:
        """A pickled denoiser has no session either."""
        return stock_of, (self.original,)

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
        action, keep = self.action, self.output is not None and self.action != HOLD
        if action != COMPUTE or keep:
            why = self._misfit(attn, hidden_states, encoder_hidden_states)
            if why is not None:
                action, keep, self.why, self.kept = COMPUTE, False, why, False
        self.did = action
        if action == HOLD:
            return self.output.read(_output_shape(hidden_states, self.output))
        if action == COMPUTE:
            output = self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        else:
            output = self._with_map(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if keep:
            self._keep(hidden_states, output)
        return output

    def _with_map(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None, mask: Tensor | None, temb: Any
    ) -> Tensor:
        """Capture or reuse: the original's steps around our kernels."""
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
        if self.action == CAPTURE:
            output = self._capture(attn, hidden_states, context, value, mask)
        else:
            output = ops.reuse_into(
                self.slot.storage, hidden_states.shape[1], value, self.slot.format.name
            )  # [B, H, M, D]

        output = attn.to_out[1](attn.to_out[0](output.transpose(1, 2).flatten(2)))
        if len(shape) == 4:
            output = output.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            output = output + residual
        return output / attn.rescale_output_factor

    def _misfit(self, attn: Any, hidden_states: Tensor, context: Tensor | None) -> str | None:
        """Why this call cannot do what it is to do, or None."""
        if not self._fits(attn, hidden_states, context):
            return OTHER_SHAPE
        if self.did is not None:
            return CALLED_AGAIN
        if self.output is not None and context is not self.context:
            return OTHER_CONTEXT
        return OVERRIDDEN if _overridden() else None

    def _fits(self, attn: Any, hidden_states: Tensor, context: Tensor | None) -> bool:
        """Whether this call has the shapes of `slot` and of `output`."""
        queries = hidden_states.shape[1] if hidden_states.ndim == 3 else hidden_states.shape[2] * hidden_states.shape[3]
        fits = True
        if self.outline is not None:
            b, h, m, n = self.outline.shape
            keys = queries if context is None else context.shape[1]
            fits = hidden_states.shape[0] == b and attn.heads == h and queries == m and keys == n
        if self.output is not None:
            fits = fits and hidden_states.shape[0] == self.output.shape[0] and queries == self.output.shape[1]
        return fits

    def _keep(self, hidden_states: Tensor, output: Tensor) -> None:
        if output.dtype != self.output.dtype or output.shape != _output_shape(hidden_states, self.output):
            self.why = OTHER_OUTPUT
            return
        self.output.write(output)
        self.kept = True

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
        return ops.capture_into(self.slot.storage, query, key, value, mask, scale, self.slot.format.name)


class ShapeRecorder:
    """Notes the queries and keys ``(B, M, N)`` of each layer it is set on, then computes."""

    def __init__(self, name: str, shapes: dict[str, tuple[int, int, int]]):
        self.name, self.shapes, self.original = name, shapes, stock_processors()[0]()

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args, **kwargs):
        queries = hidden_states.flatten(2).shape[-1] if hidden_states.ndim == 4 else hidden_states.shape[1]
        keys = queries if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        self.shapes[self.name] = (hidden_states.shape[0], queries, keys)
        return self.original(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


def _output_shape(hidden_states: Tensor, output: OutputSlot) -> tuple[int, ...]:
    """Shape in which a layer gives its output: as its input, ``[B, M, C]`` or ``[B, C, Y, X]``."""
    b, m, c = output.shape
    return (b, m, c) if hidden_states.ndim == 3 else (b, c, *hidden_states.shape[2:])


def _overridden() -> bool:
    """Whether a torch function mode (guiders perturb attention by one) is in force around the layer."""
    if torch.compiler.is_compiling():
        return False
    modes = torch.overrides._get_current_function_mode_stack()
    return any(not isinstance(mode, DeviceContext) for mode in modes)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, N, H D]`` to ``[B, H, N, D]``, a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
