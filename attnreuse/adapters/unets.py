"""UNets of diffusers: layers of the class ``Attention``, plain ones or ones with added keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from attnreuse.adapters.adapter import Adapter
from attnreuse.adapters.forms import Dispatched, Form, attention_forms


class UNet(Adapter):
    """Stable Diffusion 1, 2 and XL, Kolors, Kandinsky 2, DeepFloyd, unCLIP, and models without conditions."""

    models = ("UNet2DConditionModel", "UNet2DModel")
    parts = ("unet", "decoder")  # of unCLIP
    left_alone: ClassVar = {"fuser": "GLIGEN's fuser attends over grounding tokens, not image tokens"}

    def forms(self) -> Mapping[type, Form]:
        return attention_forms()

    def stock(self, attn: Any) -> type:
        from diffusers.models.attention_processor import AttnAddedKVProcessor2_0, AttnProcessor2_0

        return AttnProcessor2_0 if attn.added_kv_proj_dim is None else AttnAddedKVProcessor2_0

    def hands_on_context(self, denoiser: Any) -> bool:
        return getattr(denoiser, "encoder_hid_proj", None) is None

    def config(self, denoiser: Any) -> dict[str, Any]:
        # IP-Adapters change this entry; image embeddings do not change the shapes of self-attention.
        config = dict(denoiser.config)
        return config | {"encoder_hid_dim_type": None} if "encoder_hid_dim_type" in config else config

    def resized(self, sample: Tensor, twin: Any) -> Tensor:
        # A widened conv_in, as inpainting models have it, changes no map.
        b, _, *size = sample.shape
        return sample.new_empty(b, twin.conv_in.in_channels, *size)


class AnimateDiff(UNet):
    """AnimateDiff: spatial layers see each frame as a picture of the batch."""

    models = ("UNetMotionModel",)
    left_alone: ClassVar = {"motion_modules": "motion modules attend over frames"}


class VideoUNet(UNet):
    """I2VGen-XL and ModelScope: the same, with temporal layers of other names."""

    models = ("UNet3DConditionModel", "I2VGenXLUNet")
    left_alone: ClassVar = {
        "temp_attentions": "temporal layers attend over frames",
        "transformer_in": "temporal layers attend over frames",
        "image_latents_temporal_encoder": "temporal layers attend over frames",
    }

    def hands_on_context(self, denoiser: Any) -> bool:
        return False  # it is repeated for every frame

    def resized(self, sample: Tensor, twin: Any) -> Tensor:
        return sample


class SpatioTemporalUNet(VideoUNet):
    """Stable Video Diffusion."""

    models = ("UNetSpatioTemporalConditionModel",)
    left_alone: ClassVar = {"temporal_transformer_blocks": "temporal layers attend over frames"}


class Kandinsky3(UNet):
    """Kandinsky 3, whose self-attention layers are given their own tokens as a context."""

    models = ("Kandinsky3UNet",)
    left_alone: ClassVar = {"add_time_condition": "it pools the text, and has one query"}

    def kind(self, name: str, attn: Any) -> str:
        return "self" if name.endswith("attentions.0.attention") else "cross"


class DreamLite(UNet):
    """DreamLite: groups of heads share keys and values."""

    models = ("DreamLiteUNetModel",)

    def forms(self) -> Mapping[type, Form]:
        from diffusers.models.unets.unet_dreamlite import DreamLiteAttnProcessor2_0

        return {DreamLiteAttnProcessor2_0: Dispatched()}

    def stock(self, attn: Any) -> type:
        return next(iter(self.forms()))
