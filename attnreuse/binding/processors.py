"""Attention processors for diffusers: compute, capture, reuse or hold, as the run says before each call."""

from __future__ import annotations

import functools
import inspect
import itertools
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import DeviceContext

from attnreuse import ops
from attnreuse.adapters import Form, Inputs
from attnreuse.errors import UnsupportedLayerError
from attnreuse.maps.formats import AttentionMap
from attnreuse.maps.ring import OutputSlot
from attnreuse.policy import Action

COMPUTE, CAPTURE, REUSE, HOLD = (action.value for action in Action)
OTHER_SHAPE = "it attends over other tokens than its map is planned for (another tool merges, tiles or adds tokens)"
CALLED_AGAIN = "it was called several times in one denoiser call"
OVERRIDDEN = "another tool overrides its attention"
OTHER_CONTEXT = "it attends over another tensor than the denoiser was given (another tool changes it)"
ANY_CONTEXT: Any = object()
FIRST = ["attn", "hidden_states", "encoder_hidden_states", "attention_mask"]  # arguments of every processor
OTHER_OUTPUT = "its output has another size or dtype than planned"
OTHER_DEVICE = "it runs on another device than the denoiser's sample lies on"
GRADIENT = "a gradient is wanted, and reuse has none (call the denoiser under torch.no_grad())"


def attention_layers(denoiser: Any) -> dict[str, Any]:
    """Every attention module of `denoiser`, by name, in order of definition (not of execution)."""
    return {name: m for name, m in denoiser.named_modules() if hasattr(m, "set_processor") and hasattr(m, "to_q")}


def stock_of(processor: Any) -> Any:
    """The processor itself, or the one that ours stands in for."""
    return processor.original if type(processor) is ReuseAttnProcessor else processor


@functools.cache
def takes_extra(processor: type) -> bool:
    """Whether a processor takes one more argument: rotary embeddings, or the embedded timestep.

    Raises:
        UnsupportedLayerError: it does not take those before that one as ours does, or has others after it, which
            layers would not hand on.
    """
    taken = list(inspect.signature(processor.__call__).parameters.values())[1:]
    names = [p.name for p in taken if p.kind is p.POSITIONAL_OR_KEYWORD]
    hands_on = len(names) < len(FIRST) and any(p.kind is p.VAR_POSITIONAL for p in taken)
    misplaced = any(name in FIRST and name != expected for name, expected in itertools.zip_longest(names, FIRST))
    own = names[len(FIRST) + 1 :] + [p.name for p in taken if p.kind is p.KEYWORD_ONLY]
    if own:
        raise UnsupportedLayerError(
            f"{processor.__name__} takes {', '.join(own)} besides; expected a processor that takes "
            f"({', '.join(FIRST)}, ...) and at most one more argument"
        )
    if misplaced or not (hands_on or len(names) >= len(FIRST)):
        raise UnsupportedLayerError(
            f"{processor.__name__} takes ({', '.join(names)}); "
            f"expected a processor that takes ({', '.join(FIRST)}, ...)"
        )
    return hands_on or len(names) > len(FIRST)


class ReuseAttnProcessor:
    """Stands in for a stock processor on one layer, for one denoiser call.

    compute calls the processor it replaced, untouched. capture and reuse repeat that processor's
    steps, as its form says, around :func:`attnreuse.ops.capture` and :func:`attnreuse.ops.reuse`; reuse never
    projects Q and K. hold gives the output of an earlier call again. A layer that turns out to attend over other
    tokens than `slot` or `output` are for computes.

    Attributes:
        original: the processor it replaced.
        form: how that processor attends.
        takes_extra: that processor takes a fourth argument.
        action: what the next call is to do: "compute", "capture", "reuse" or "hold" (:class:`Action` by value:
            the compiler guards a string on every layer, but one and the same enum member on the first alone).
        slot: the map of the next call, ``(B, H, M, N)``, when it captures or reuses.
        outline: a tensor of the slot's shape; code compiled for any size takes its sizes as symbols.
        workspace: what a reuse works in; None where it needs none, or allocates it.
        output: what the next call gives when it holds, else where its output is kept; or None.
        context: what the next call attends over where that is the denoiser's, else None; checked for `output`, unless
            it is ANY_CONTEXT.
        did: what the layer did, likewise; None as long as it was not called.
        kept: it wrote its output to `output`.
        why: why it computed instead of what it was to do, or did not keep its output; or None.
    """

    def __init__(self, original: Any = None, form: Form | None = None):
        self.original, self.form = original, form
        self.takes_extra = original is not None and takes_extra(type(original))
        self.action = COMPUTE
        self.did: str | None = None
        self.why: str | None = None
        self.slot: AttentionMap | None = None
        self.outline: Tensor | None = None
        self.workspace: Tensor | None = None
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
        temb: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        action, keep = self.action, self.output is not None and self.action != HOLD
        context = None if encoder_hidden_states is hidden_states else encoder_hidden_states
        if action != COMPUTE or keep:
            why = self._misfit(attn, hidden_states, context)
            if why is not None:
                action, keep, self.why, self.kept = COMPUTE, False, why, False
        self.did = action
        if action == HOLD:
            return self.form.unflat(self.output.read(self.output.shape), hidden_states, context)
        if action == COMPUTE:
            extra = (temb, *args) if self.takes_extra else args
            output = self.original(attn, hidden_states, encoder_hidden_states, attention_mask, *extra, **kwargs)
        else:
            output = self._with_map(attn, self.form.inputs(attn, hidden_states, context, attention_mask, temb))
        if keep:
            self._keep(self.form.flat(output))
        return output

    def _with_map(self, attn: Any, inputs: Inputs) -> Any:
        """Capture or reuse: the original's steps around our kernels."""
        value = self.form.value(attn, inputs)  # [B, H, N, D]
        if self.action == CAPTURE:
            output = self._capture(attn, inputs, value)
        else:
            _, _, m, _ = self.outline.shape
            stored = (self.slot.storage, m, value, self.slot.format.name)
            output = ops.reuse_into(*stored, workspace=self.workspace)  # [B, H, M, D]
        return self.form.finish(attn, inputs, output)

    def _misfit(self, attn: Any, hidden_states: Tensor, context: Tensor | None) -> str | None:
        """Why this call cannot do what it is to do, or None."""
        if self.did is not None:
            return CALLED_AGAIN
        if torch.is_grad_enabled() and (hidden_states.requires_grad or (context is not None and context.requires_grad)):
            return GRADIENT
        kept = self.output if self.slot is None else self.slot
        if kept is not None and kept.storage.device != hidden_states.device:
            return OTHER_DEVICE
        if not self._fits(attn, hidden_states, context):
            return OTHER_SHAPE
        if self.output is not None and self.context is not ANY_CONTEXT and context is not self.context:
            return OTHER_CONTEXT
        return OVERRIDDEN if _overridden() else None

    def _fits(self, attn: Any, hidden_states: Tensor, context: Tensor | None) -> bool:
        """Whether this call has the shapes of `slot` and of `output`."""
        shape, fits = self.form.map_shape(attn, hidden_states, context), True
        if self.outline is not None:
            fits = shape == self.outline.shape
        if self.output is not None:
            fits = fits and (shape[0], shape[2]) == self.output.shape[:2]
        return fits

    def _keep(self, output: Tensor) -> None:
        if output.dtype != self.output.dtype or output.numel() != self.output.outline.numel():
            self.why = OTHER_OUTPUT
            return
        self.output.write(output)
        self.kept = True

    def _capture(self, attn: Any, inputs: Inputs, value: Tensor) -> Tensor:
        query, key, mask, scale = self.form.query(attn, inputs)
        return ops.capture_into(self.slot.storage, query, key, value, mask, scale, self.slot.format.name)


class ShapeRecorder(ReuseAttnProcessor):
    """Notes the map shape ``(B, H, M, N)`` of the layer it is set on, then computes as `original` does."""

    def __init__(self, name: str, shapes: dict[str, tuple[int, int, int, int]], original: Any, form: Form):
        super().__init__(original, form)
        self.name, self.shapes, self.action = name, shapes, CAPTURE

    def _misfit(self, attn: Any, hidden_states: Tensor, context: Tensor | None) -> str:
        self.shapes[self.name] = self.form.map_shape(attn, hidden_states, context)
        return "it only notes shapes"


def _overridden() -> bool:
    """Whether a torch function mode (guiders perturb attention by one) is in force around the layer."""
    if torch.compiler.is_compiling():
        return False
    modes = torch.overrides._get_current_function_mode_stack()
    return any(not isinstance(mode, DeviceContext) for mode in modes)
