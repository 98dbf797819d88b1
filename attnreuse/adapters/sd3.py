"""Stable Diffusion 3 and 3.5: joint attention, in some blocks beside self-attention of the image tokens."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from attnreuse.adapters.adapter import Adapter, empty
from attnreuse.adapters.forms import Form
from attnreuse.adapters.joint import Joint, text_inputs


@functools.cache
def _forms() -> Mapping[type, Form]:
    from diffusers.models import attention_processor as stock

    return {
        stock.JointAttnProcessor2_0: Joint(image_first=True, fused=False),
        stock.FusedJointAttnProcessor2_0: Joint(image_first=True, fused=True, normed=False),
    }


class SD3(Adapter):
    models = ("SD3Transformer2DModel",)
    parts = ("transformer",)
    sample = "hidden_states"
    each_step = ("block_controlnet_hidden_states", "ip_hidden_states", "temb")
    tokens = 333  # 77 of CLIP, 256 of T5

    def forms(self) -> Mapping[type, Form]:
        return _forms()

    def latents(self, denoiser: Any, size: tuple[int, int], scale: int) -> tuple[int, int]:
        height, width = super().latents(denoiser, size, 2 * scale)
        return 2 * height, 2 * width

    def inputs(self, denoiser: Any, batch: int, size: tuple[int, int], tokens: int, frames: int) -> dict[str, Any]:
        config = denoiser.config
        return {"hidden_states": empty(batch, config["in_channels"], *size), **text_inputs(config, batch, tokens)}
