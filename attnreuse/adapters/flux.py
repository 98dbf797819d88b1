"""FLUX.1: joint attention with rotary positions; later blocks have text and image tokens in one stream."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnreuse.adapters.adapter import Adapter, empty
from attnreuse.adapters.forms import Form, Inputs, Query
from attnreuse.adapters.joint import Joint, text_inputs


class FluxJoint(Joint):
    """``FluxAttnProcessor``."""

    dispatched = True

    def kind(self, attn: Any) -> str:
        return "joint"

    def _placed(self, made: Query, inputs: Inputs) -> Query:
        query, key = made.query, made.key
        if inputs.extra is not None:
            from diffusers.models.embeddings import apply_rotary_emb

            query, key = (apply_rotary_emb(x, inputs.extra, sequence_dim=2) for x in (query, key))
        mask = inputs.mask
        if mask is not None and mask.ndim == 2:  # of keys, [B, N], as diffusers' native backend takes it
            mask = mask[:, None, None]
        return Query(query, key, mask)


@functools.cache
def _forms() -> Mapping[type, Form]:
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    return {FluxAttnProcessor: FluxJoint(image_first=False)}


class Flux(Adapter):
    models = ("FluxTransformer2DModel",)
    parts = ("transformer",)
    sample = "hidden_states"
    each_step = ("controlnet_block_samples", "controlnet_single_block_samples", "ip_hidden_states")
    tokens = 512
    beside = ("FluxKontextPipeline", "FluxKontextInpaintPipeline")
    second_call = "true_cfg_scale"

    def forms(self) -> Mapping[type, Form]:
        return _forms()

    def rows(self, denoiser: Any, pipeline: str, guidance: bool) -> int:
        return 1  # guidance is embedded

    def latents(self, denoiser: Any, size: tuple[int, int], scale: int) -> tuple[int, int]:
        return 2 * (size[0] // (2 * scale)), 2 * (size[1] // (2 * scale))

    def inputs(self, denoiser: Any, batch: int, size: tuple[int, int], tokens: int, frames: int) -> dict[str, Any]:
        config = denoiser.config
        patches = (size[0] // 2) * (size[1] // 2)
        given = {
            "hidden_states": empty(batch, patches, config["in_channels"]),
            **text_inputs(config, batch, tokens),
            "txt_ids": empty(tokens, 3),
            "img_ids": empty(patches, 3),
        }
        return given | {"guidance": empty(batch)} if config["guidance_embeds"] else given

    def as_given(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        return timesteps.to(dtype) / 1000
