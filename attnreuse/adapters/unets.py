"""UNets of diffusers: layers of the class ``Attention``, plain ones or ones with added keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from attnreuse.adapters.adapter import Adapter, empty
from attnreuse.adapters.forms import Dispatched, Form, attention_forms


class UNet(Adapter):
    """Stable Diffusion 1, 2 and XL, Kolors, Kandinsky 2, DeepFloyd, unCLIP, AudioLDM."""

    models = ("UNet2DConditionModel",)
    parts = ("unet", "decoder")  # of unCLIP
    each_step = (
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
    )
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
        return (
            config | {"encoder_hid_dim_type": None} if config.get("encoder_hid_dim_type") == "ip_image_proj" else config
        )

    def latents(self, denoiser: Any, size: tuple[int, int], scale: int) -> tuple[int, int]:
        if denoiser.config.get("encoder_hid_dim_type") in ("image_proj", "text_image_proj"):  # Kandinsky 2
            return _whole_squares(size, scale)
        return super().latents(denoiser, size, scale)

    def inputs(self, denoiser: Any, batch: int, size: tuple[int, int], tokens: int, frames: int) -> dict[str, Any]:
        config = denoiser.config
        given: dict[str, Any] = {"sample": empty(batch, config["in_channels"], *size), "timestep": 1}
        width, hidden = config.get("cross_attention_dim"), config.get("encoder_hid_dim")
        kind, added = config.get("encoder_hid_dim_type"), {}
        widths = {width} if width is None or isinstance(width, int) else set(width)
        width = widths.pop() if len(widths) == 1 else None
        if widths:  # AudioLDM: each level attends over its own tokens
            given["encoder_hidden_states"] = None
        elif kind == "image_proj":
            given["encoder_hidden_states"], added = None, {"image_embeds": empty(batch, hidden)}
        elif width is not None:
            of_text = hidden if kind in ("text_proj", "text_image_proj") else width
            given["encoder_hidden_states"] = empty(batch, tokens, of_text)
        addition = config.get("addition_embed_type")
        if addition == "text_time":  # SDXL
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            added |= {"text_embeds": empty(batch, pooled), "time_ids": empty(batch, 6)}
        elif addition == "text_image":  # Kandinsky 2.1
            added |= {"text_embeds": empty(batch, width), "image_embeds": empty(batch, width)}
        elif addition == "image_hint":  # Kandinsky 2.2's ControlNet: a picture of 8 pixels a latent
            added |= {"hint": empty(batch, 3, 8 * size[0], 8 * size[1])}
        if config.get("num_class_embeds") or config.get("class_embed_type"):
            given["class_labels"] = self._labels(config, batch)
        return given | {"added_cond_kwargs": added} if added else given

    def _labels(self, config: Mapping[str, Any], batch: int) -> Tensor:
        """Classes by number, or whatever the model embeds instead."""
        kind = config.get("class_embed_type")
        if kind == "identity":  # unCLIP
            return empty(batch, config.get("time_embedding_dim") or 4 * config["block_out_channels"][0])
        if kind in ("projection", "simple_projection"):
            return empty(batch, config["projection_class_embeddings_input_dim"])
        return empty(batch) if kind == "timestep" else empty(batch).long()

    def resized(self, sample: Tensor, twin: Any) -> Tensor:
        # A widened conv_in, as inpainting models have it, changes no map.
        b, _, *size = sample.shape
        return sample.new_empty(b, twin.conv_in.in_channels, *size)


def _whole_squares(size: tuple[int, int], scale: int) -> tuple[int, int]:
    """Latents of Kandinsky's pipelines, which round up to squares of so many latents as a latent has pixels."""
    return scale * -(-size[0] // scale**2), scale * -(-size[1] // scale**2)


class Unconditional(UNet):
    """Models without a prompt."""

    models = ("UNet2DModel",)

    def latents(self, denoiser: Any, size: tuple[int, int], scale: int) -> tuple[int, int]:
        halved = len(denoiser.config["block_out_channels"]) - 1
        super().latents(denoiser, size, scale * 2**halved)  # evenly at each level
        return size[0] // scale, size[1] // scale


class AnimateDiff(UNet):
    """AnimateDiff: spatial layers see each frame as a picture of the batch."""

    models = ("UNetMotionModel",)
    makes_videos = True
    left_alone: ClassVar = {"motion_modules": "motion modules attend over frames"}

    def inputs(self, denoiser: Any, batch: int, size: tuple[int, int], tokens: int, frames: int) -> dict[str, Any]:
        config = denoiser.config
        given = super().inputs(denoiser, batch, size, tokens, frames)
        text = empty(batch * frames, tokens, config["cross_attention_dim"])
        return given | {"sample": empty(batch, config["in_channels"], frames, *size), "encoder_hidden_states": text}


class VideoUNet(UNet):
    """I2VGen-XL and ModelScope: the same, with temporal layers of other names."""

    models = ("UNet3DConditionModel", "I2VGenXLUNet")
    makes_videos = True
    left_alone: ClassVar = {
        "temp_attentions": "temporal layers attend over frames",
        "transformer_in": "temporal layers attend over frames",
        "image_latents_temporal_encoder": "temporal layers attend over frames",
    }

    def hands_on_context(self, denoiser: Any) -> bool:
        return False  # it is repeated for every frame

    def inputs(self, denoiser: Any, batch: int, size: tuple[int, int], tokens: int, frames: int) -> dict[str, Any]:
        config = denoiser.config
        sample, width = empty(batch, config["in_channels"], frames, *size), config["cross_attention_dim"]
        given = {"sample": sample, "timestep": 1, "encoder_hidden_states": empty(batch, tokens, width)}
        if type(denoiser).__name__ == "I2VGenXLUNet":
            given |= {"image_latents": sample, "image_embeddings": empty(batch, width), "fps": empty(batch).long()}
        return given

    def resized(self, sample: Tensor, twin: Any) -> Tensor:
        return sample


class SpatioTemporalUNet(VideoUNet):
    """Stable Video Diffusion."""

    models = ("UNetSpatioTemporalConditionModel",)
    left_alone: ClassVar = {"temporal_transformer_blocks": "temporal layers attend over frames"}

    def inputs(self, denoiser: Any, batch: int, size: tuple[int, int], tokens: int, frames: int) -> dict[str, Any]:
        config = denoiser.config
        return {
            "sample": empty(batch, frames, config["in_channels"], *size),
            "timestep": 1,
            "encoder_hidden_states": empty(batch, 1, config["cross_attention_dim"]),
            "added_time_ids": empty(batch, 3),
        }


class AudioLDM2(UNet):
    """AudioLDM 2: layers attend over one of two texts, or over their own tokens alone."""

    models = ("AudioLDM2UNet2DConditionModel",)

    def hands_on_context(self, denoiser: Any) -> bool:
        return False  # a layer may see the other text

    def inputs(self, denoiser: Any, batch: int, size: tuple[int, int], tokens: int, frames: int) -> dict[str, Any]:
        config = denoiser.config
        widths = config["cross_attention_dim"]  # by level, and there by layer
        widths = widths if isinstance(widths, int) else widths[0]
        widths = [widths] if isinstance(widths, int) else widths
        texts = {"encoder_hidden_states": widths[:2], "encoder_hidden_states_1": widths[2:]}
        seen = {name: empty(batch, tokens, max(filter(None, of))) for name, of in texts.items() if any(of)}
        sample = empty(batch, config["in_channels"], *size)
        return {"sample": sample, "timestep": 1, "encoder_hidden_states": None} | seen


class Kandinsky3(UNet):
    """Kandinsky 3, whose self-attention layers are given their own tokens as a context."""

    models = ("Kandinsky3UNet",)
    left_alone: ClassVar = {"add_time_condition": "it pools the text, and has one query"}

    def kind(self, name: str, attn: Any) -> str:
        return "self" if name.endswith("attentions.0.attention") else "cross"

    def latents(self, denoiser: Any, size: tuple[int, int], scale: int) -> tuple[int, int]:
        return _whole_squares(size, scale)

    def inputs(self, denoiser: Any, batch: int, size: tuple[int, int], tokens: int, frames: int) -> dict[str, Any]:
        config = denoiser.config
        return {
            "sample": empty(batch, config["in_channels"], *size),
            "timestep": 1,
            "encoder_hidden_states": empty(batch, tokens, config["encoder_hid_dim"]),
            "encoder_attention_mask": empty(batch, tokens),
        }


class DreamLite(UNet):
    """DreamLite: groups of heads share keys and values."""

    models = ("DreamLiteUNetModel",)

    def forms(self) -> Mapping[type, Form]:
        from diffusers.models.unets.unet_dreamlite import DreamLiteAttnProcessor2_0

        return {DreamLiteAttnProcessor2_0: Dispatched()}

    def stock(self, attn: Any) -> type:
        return Adapter.stock(self, attn)

    def rows(self, denoiser: Any, pipeline: str, guidance: bool) -> int:
        return 1 if "Mobile" in pipeline else 2

    def latents(self, denoiser: Any, size: tuple[int, int], scale: int) -> tuple[int, int]:
        height, width = super().latents(denoiser, size, scale)
        return height, 2 * width  # the picture to edit, or nothing, is on the right
