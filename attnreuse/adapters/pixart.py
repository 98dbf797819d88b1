"""PixArt-alpha and PixArt-Sigma: plain self-attention and cross-attention over projected text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnreuse.adapters.adapter import Adapter, empty
from attnreuse.adapters.forms import Form, attention_forms


class PixArt(Adapter):
    """Text is projected anew at each call, so cross-attention reuses maps and holds nothing."""

    models = ("PixArtTransformer2DModel",)
    parts = ("transformer",)
    sample = "hidden_states"
    tokens = 300

    def forms(self) -> Mapping[type, Form]:
        return attention_forms()

    def stock(self, attn: Any) -> type:
        from diffusers.models.attention_processor import AttnProcessor2_0

        return AttnProcessor2_0

    def latents(self, denoiser: Any, size: tuple[int, int], scale: int) -> tuple[int, int]:
        # Its pipelines refuse odd sizes, and take the nearest of their own resolutions.
        from diffusers.image_processor import PixArtImageProcessor
        from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha as alpha
        from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma as sigma

        bins = {
            32: alpha.ASPECT_RATIO_256_BIN,
            64: alpha.ASPECT_RATIO_512_BIN,
            128: alpha.ASPECT_RATIO_1024_BIN,
            256: sigma.ASPECT_RATIO_2048_BIN,
        }.get(denoiser.config["sample_size"])
        latents = super().latents(denoiser, size, scale)
        if bins is None:
            return latents
        return super().latents(denoiser, PixArtImageProcessor.classify_height_width_bin(*size, ratios=bins), scale)

    def inputs(self, denoiser: Any, batch: int, size: tuple[int, int], tokens: int, frames: int) -> dict[str, Any]:
        config = denoiser.config
        additional = config["use_additional_conditions"]
        if additional is None:
            additional = config["sample_size"] == 128
        known = {"resolution": empty(batch, 2), "aspect_ratio": empty(batch, 1)}
        return {
            "hidden_states": empty(batch, config["in_channels"], *size),
            "timestep": empty(batch),
            "encoder_hidden_states": empty(batch, tokens, config["caption_channels"] or config["cross_attention_dim"]),
            "encoder_attention_mask": empty(batch, tokens),
            "added_cond_kwargs": known if additional else dict.fromkeys(known),
        }

    def hands_on_context(self, denoiser: Any) -> bool:
        return denoiser.caption_projection is None
