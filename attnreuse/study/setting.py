"""What is sampled, and how a pipeline is called for it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from attnreuse.binding.denoiser import find_denoiser
from attnreuse.errors import check_finite

MEDIA = {"image", "mask_image", "control_image", "init_image", "video", "mask", "audio"}  # beside a prompt
WHATEVER = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Setting:
    """What is sampled, and how; two schedules are comparable only under one setting.

    Attributes:
        prompts: one picture each.
        steps: ``num_inference_steps``.
        seed: of the first picture; the next ones count up.
        guidance: ``guidance_scale``; None: the pipeline's default.
        eta: share of the noise that the scheduler adds anew (DDIM, TCD); None: the pipeline's default.
        size: (height, width) in pixels; None: the pipeline's default.
        map_format, layers: as in :func:`attnreuse.enable`.
        batch: pictures sampled at once.
    """

    prompts: tuple[str, ...]
    steps: int = 20
    seed: int = 0
    guidance: float | None = None
    eta: float | None = None
    size: tuple[int, int] | None = None
    map_format: str = "u8"
    layers: str | tuple[str, ...] | None = None
    batch: int = 4

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("prompts must hold at least one prompt")
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_finite(guidance=self.guidance)

    def batches(self) -> Iterator[tuple[int, list[str]]]:
        """First picture and prompts of each batch."""
        for start in range(0, len(self.prompts), self.batch):
            yield start, list(self.prompts[start : start + self.batch])

    def call(self, start: int, count: int) -> dict[str, Any]:
        """Arguments of the pipeline for `count` pictures from `start` on, but for the prompts."""
        generators = [torch.Generator().manual_seed(self.seed + start + i) for i in range(count)]
        given: dict[str, Any] = {"num_inference_steps": self.steps, "generator": generators, "output_type": "np"}
        if self.guidance is not None:
            given["guidance_scale"] = self.guidance
        if self.eta is not None:
            given["eta"] = self.eta
        if self.size is not None:
            given["height"], given["width"] = self.size
        return given


def not_of_prompts(pipeline: type) -> str | None:
    """Why a class of pipelines cannot be sampled by prompts alone, as far as its call tells; or None."""
    taken = list(inspect.signature(pipeline.__call__).parameters.values())[1:]
    names = {p.name for p in taken}
    if "prompt" not in names:
        return None if takes_whatever(taken) else f"{pipeline.__name__} takes no prompt"
    needed = {p.name for p in taken if p.default is p.empty and p.kind not in WHATEVER} - {"prompt"}
    # Those that are pictures and nothing else, although no picture is the default.
    needed |= {p.name for p in taken if p.name in MEDIA and p.annotation is not p.empty and not _optional(p)}
    return f"{pipeline.__name__} is given {' and '.join(sorted(needed))} beside a prompt" if needed else None


def _optional(parameter: inspect.Parameter) -> bool:
    return any(word in str(parameter.annotation) for word in ("None", "Optional"))


def takes_whatever(parameters: Iterable[inspect.Parameter]) -> bool:
    return any(p.kind in WHATEVER for p in parameters)


def guided(pipe: Any, call: dict[str, Any], count: int) -> dict[str, Any]:
    """The arguments of a call, guidance by a second call where the denoiser has no guidance embedded (FLUX.1)."""
    taken = inspect.signature(type(pipe).__call__).parameters
    if "guidance_scale" not in call or "true_cfg_scale" not in taken or find_denoiser(pipe).config.guidance_embeds:
        return call
    scale = call.pop("guidance_scale")
    return call | {"true_cfg_scale": scale, "negative_prompt": [""] * count}
