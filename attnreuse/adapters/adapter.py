"""What a family of denoisers is to the rest of the package, and which families there are."""

from __future__ import annotations

import contextlib
import difflib
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnreuse.adapters.forms import Form
from attnreuse.adapters.unserved import entry_of, figures
from attnreuse.errors import UnsupportedLayerError


class Adapter:
    """A family of denoisers: subclass it, and :func:`register` an instance.

    The forward of its models names the noisy sample as `sample` says and the timestep ``timestep``; what
    cross-attention attends over it is given as ``encoder_hidden_states``. Stock processors are made without arguments
    and called with ``(attn, hidden_states, encoder_hidden_states, attention_mask, ...)``: what follows is given by
    position or by name, as the layer does.

    Attributes:
        models: names of the classes that it serves.
        parts: attributes of a pipeline that may hold such a model.
        sample: argument of its forward with the noisy sample; the first axis is the batch.
        each_step: arguments of its forward, and keys in tables of such, that are made anew at each step: residuals of
            side networks. All other tensors are conditions: a layer reuses as long as they stay the same.
        left_alone: why layers only compute, by a part of their name.
        tokens: of a prompt; None: as many as the text encoder takes.
        beside: pipelines that show the model a picture they are given beside the one they make.
        second_call: argument of its pipelines that turns on guidance by a call of its own, with maps of its own.
        makes_videos: its pipelines give frames instead of pictures.
    """

    models: ClassVar[tuple[str, ...]] = ()
    parts: ClassVar[tuple[str, ...]] = ("unet",)
    sample: ClassVar[str] = "sample"
    each_step: ClassVar[tuple[str, ...]] = ()
    left_alone: ClassVar[Mapping[str, str]] = {}
    tokens: ClassVar[int | None] = None
    beside: ClassVar[tuple[str, ...]] = ()
    second_call: ClassVar[str | None] = None
    makes_videos: ClassVar[bool] = False

    def forms(self) -> Mapping[type, Form]:
        """By stock processor, exactly: how layers that have it attend."""
        raise NotImplementedError

    def stock(self, attn: Any) -> type:
        """The stock processor of a layer that nobody has changed: the first of :meth:`forms`, unless told otherwise."""
        return next(iter(self.forms()))

    def kind(self, name: str, attn: Any) -> str:
        """What a layer attends over: see :meth:`Form.kind`."""
        return self.forms()[self.stock(attn)].kind(attn)

    def hands_on_context(self, denoiser: Any) -> bool:
        """Whether cross-attention layers attend over the very ``encoder_hidden_states`` that the denoiser is given."""
        return True

    def as_given(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """What a denoiser is given for the scheduler's `timesteps`, where that is a tensor of `dtype`."""
        return timesteps.to(dtype) if dtype.is_floating_point else timesteps

    def rows(self, denoiser: Any, pipeline: str, guidance: bool) -> int:
        """Of the batch for each picture, where a pipeline of this class makes it, with or without guidance."""
        perturbed, given = "PAG" in pipeline, guidance and "InstructPix2Pix" in pipeline  # rows of their own
        embedded = denoiser.config.get("time_cond_proj_dim") is not None  # guidance, as in LCM's models
        return 1 + (guidance and not embedded) + perturbed + given

    def config(self, denoiser: Any) -> dict[str, Any]:
        """Config of a denoiser whose layers see the same numbers of tokens, and that is called without adapters."""
        return dict(denoiser.config)

    def latents(self, denoiser: Any, size: tuple[int, int], scale: int) -> tuple[int, int]:
        """Height and width of the latents of pictures of `size` pixels, with `scale` pixels a latent.

        Raises:
            ValueError: its pipelines refuse that size.
        """
        if size[0] % scale or size[1] % scale:
            raise ValueError(f"height and width must be multiples of {scale} for this model, got {size[0]}x{size[1]}")
        return size[0] // scale, size[1] // scale

    def inputs(self, denoiser: Any, batch: int, size: tuple[int, int], tokens: int, frames: int) -> dict[str, Any]:
        """Arguments of the denoiser's forward, on meta: `batch` samples of `size` (height, width) latents.

        Args:
            tokens: of a prompt.
            frames: of a video; else ignored.
        """
        raise NotImplementedError

    def resized(self, sample: Tensor, twin: Any) -> Tensor:
        """A sample of the same size for `twin`, which may take other channels."""
        return sample


_adapters: dict[str, Adapter] = {}  # by class name


def register(adapter: Adapter) -> None:
    """Serve the models of `adapter` from now on, instead of what served them before."""
    for model in adapter.models:
        _adapters[model] = adapter


def adapter_of(denoiser: Any, size: tuple[int, int] | None = None, frames: int | None = None) -> Adapter:
    """The adapter of a denoiser's class, or of the nearest of its base classes.

    Raises:
        UnsupportedLayerError: there is none; the message says what reuse would meet in runs of `size` (height, width
            in pixels) and `frames`, where that is known, and names the nearest model that is served.
    """
    adapter = entry_of(denoiser, _adapters)
    if adapter is not None:
        return adapter
    name = type(denoiser).__name__
    known = figures(denoiser, size, frames)
    if known is not None:
        raise UnsupportedLayerError(f"{name} is not served: {known} (docs/adapters.md says how to serve a model)")
    raise UnsupportedLayerError(
        f"{name} is not served; the nearest model that is served is {_nearest(denoiser)}. To serve it, subclass "
        "attnreuse.adapters.Adapter (docs/adapters.md says how) and attnreuse.adapters.register it"
    )


def _nearest(denoiser: Any) -> str:
    """The model whose layers attend by the same processors, or else the one of the likeliest name."""
    attends, kin = {type(getattr(module, "processor", None)) for module in denoiser.modules()}, []
    for model, adapter in _adapters.items():
        with contextlib.suppress(ImportError):  # an older diffusers does not have every model
            kin += [model] if attends & adapter.forms().keys() else []
    name = type(denoiser).__name__
    return (difflib.get_close_matches(name, kin or _adapters, 1, 0.0) or [next(iter(_adapters))])[0]


def parameters(denoiser: Any) -> list[str]:
    """Names of the arguments of a denoiser's forward, in order.

    A class may hand on whatever it is given: of it and its base classes the first counts that names the sample and the
    timestep.

    Raises:
        UnsupportedLayerError: none does.
    """
    needed = {adapter_of(denoiser).sample, "timestep"}
    for cls in type(denoiser).__mro__:
        names = list(inspect.signature(cls.forward).parameters)[1:] if hasattr(cls, "forward") else []
        if needed <= set(names):
            return names
    raise UnsupportedLayerError(
        f"{type(denoiser).__name__}: expected a forward with arguments {' and '.join(sorted(needed))}"
    )


def empty(*shape: int) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, device="meta")


def parts() -> list[str]:
    """Attributes of pipelines that may hold a denoiser."""
    return list(dict.fromkeys(part for adapter in _adapters.values() for part in adapter.parts))
