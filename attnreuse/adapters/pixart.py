"""PixArt-alpha and PixArt-Sigma: plain self-attention and cross-attention over projected text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnreuse.adapters.adapter import Adapter
from attnreuse.adapters.forms import Form, attention_forms


class PixArt(Adapter):
    """Text is projected anew at each call, so cross-attention reuses maps and holds nothing."""

    models = ("PixArtTransformer2DModel",)
    parts = ("transformer",)
    sample = "hidden_states"

    def forms(self) -> Mapping[type, Form]:
        return attention_forms()

    def stock(self, attn: Any) -> type:
        from diffusers.models.attention_processor import AttnProcessor2_0

        return AttnProcessor2_0

    def hands_on_context(self, denoiser: Any) -> bool:
        return denoiser.caption_projection is None
