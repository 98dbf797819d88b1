"""A small denoiser of random weights for every family that is served, and arguments to call it with."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.models import attention_processor as stock
from tiny_random import TOKENS, WIDTH, random_unet

B, S, FRAMES = 2, 8, 3  # batch, side of the sample, frames of a video
CROSS_2D = dict(
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")
)
SMALL = dict(
    sample_size=S,
    layers_per_block=1,
    block_out_channels=(16, 32),
    norm_num_groups=4,
)


@dataclass
class Animal:
    """A model, what else it is given besides its sample and timestep, and how its layers come out.

    Attributes:
        sample: shape of what it denoises.
        given: shapes of further arguments.
        constants: further arguments that are no tensors of noise.
        left_alone: parts of the names of layers that only compute.
        rows_told: rows of the batch can be told apart by their conditions.
    """

    model: Any
    sample: tuple[int, ...]
    given: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    left_alone: tuple[str, ...] = ()
    rows_told: bool = True


def _noise(shapes: Any, g: torch.Generator) -> Any:
    if isinstance(shapes, dict):
        return {name: _noise(shape, g) for name, shape in shapes.items()}
    return torch.randn(shapes, generator=g)


def conditions(animal: Animal, seed: int = 0) -> dict[str, Any]:
    """Arguments besides the sample and the timestep."""
    return {**_noise(animal.given, torch.Generator().manual_seed(seed)), **animal.constants}


TEXT = (B, TOKENS, WIDTH)


def plain(processor: Any = None) -> Animal:
    unet = random_unet()
    if processor is not None:
        unet.set_attn_processor(processor)
    return Animal(unet, (B, 4, S, S), {"encoder_hidden_states": TEXT})


def fused() -> Animal:
    animal = plain()
    animal.model.fuse_qkv_projections()
    return animal


def added(processor: Any = None, **changes: Any) -> Animal:
    """As DeepFloyd and unCLIP have it."""
    unet = random_unet(
        down_block_types=("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("UpBlock2D", "SimpleCrossAttnUpBlock2D"),
        encoder_hid_dim=24,
        encoder_hid_dim_type="text_proj",
        attention_head_dim=8,
        **changes,
    )
    if processor is not None:
        unet.set_attn_processor(processor)
    return Animal(unet, (B, 4, S, S), {"encoder_hidden_states": (B, TOKENS, 24)})


def kandinsky2() -> Animal:
    unet = random_unet(
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        encoder_hid_dim=24,
        encoder_hid_dim_type="image_proj",
        addition_embed_type="image",
        attention_head_dim=8,
        resnet_time_scale_shift="scale_shift",
    )
    return Animal(unet, (B, 4, S, S), {"added_cond_kwargs": {"image_embeds": (B, 24)}}, {"encoder_hidden_states": None})


def kandinsky21() -> Animal:
    animal = kandinsky2()
    unet = random_unet(
        **{k: animal.model.config[k] for k in ("down_block_types", "mid_block_type", "up_block_types")},
        encoder_hid_dim=24,
        encoder_hid_dim_type="text_image_proj",
        addition_embed_type="text_image",
        attention_head_dim=8,
        resnet_time_scale_shift="scale_shift",
    )
    given = {"encoder_hidden_states": (B, TOKENS, 24)}
    return Animal(
        unet, (B, 4, S, S), {**given, "added_cond_kwargs": {"text_embeds": (B, WIDTH), "image_embeds": (B, WIDTH)}}
    )


def unclip() -> Animal:
    animal = added(class_embed_type="identity")
    animal.given["class_labels"] = (B, 64)
    return animal


def kandinsky3() -> Animal:
    torch.manual_seed(0)
    unet = diffusers.Kandinsky3UNet(
        time_embedding_dim=16,
        groups=4,
        attention_head_dim=8,
        layers_per_block=3,
        block_out_channels=(16, 32),
        cross_attention_dim=WIDTH,
        encoder_hid_dim=24,
    )
    mask = torch.ones(B, TOKENS)
    mask[1, -2:] = 0
    given = {"encoder_hidden_states": (B, TOKENS, 24)}
    return Animal(unet.eval(), (B, 4, S, S), given, {"encoder_attention_mask": mask}, ("add_time_condition",))


def unconditional(processor: Any = None) -> Animal:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        **SMALL,
        in_channels=3,
        out_channels=3,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    for attn in unet.modules() if processor else ():
        if hasattr(attn, "set_processor"):
            attn.set_processor(processor)
    return Animal(unet.eval(), (B, 3, S, S), rows_told=False)


def motion() -> Animal:
    torch.manual_seed(0)
    unet = diffusers.UNetMotionModel(
        **SMALL,
        cross_attention_dim=WIDTH,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    )
    return Animal(
        unet.eval(),
        (B, 4, FRAMES, S, S),
        {"encoder_hidden_states": (B * FRAMES, TOKENS, WIDTH)},
        left_alone=("motion_modules",),
        rows_told=False,
    )


def audioldm2() -> Animal:
    """Its layers attend over their own tokens, one text, or another with a mask."""
    torch.manual_seed(0)
    unet = diffusers.AudioLDM2UNet2DConditionModel(
        **SMALL, **CROSS_2D, cross_attention_dim=[[None, WIDTH, 24]] * 2, attention_head_dim=2
    )
    mask = torch.ones(B, TOKENS)
    mask[1, -2:] = 0
    given = {"encoder_hidden_states": TEXT, "encoder_hidden_states_1": (B, TOKENS, 24)}
    return Animal(unet.eval(), (B, 4, S, S), given, {"encoder_attention_mask_1": mask})


def modelscope() -> Animal:
    torch.manual_seed(0)
    unet = diffusers.UNet3DConditionModel(
        **SMALL,
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )
    left_alone = ("temp_attentions", "transformer_in")
    return Animal(unet.eval(), (B, 4, FRAMES, S, S), {"encoder_hidden_states": TEXT}, left_alone=left_alone)


def i2vgen() -> Animal:
    torch.manual_seed(0)
    unet = diffusers.I2VGenXLUNet(
        **SMALL,
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )
    given = {
        "encoder_hidden_states": TEXT,
        "image_latents": (B, 4, FRAMES, S, S),
        "image_embeddings": (B, WIDTH),
    }
    left_alone = ("temp_attentions", "transformer_in", "image_latents_temporal_encoder")
    return Animal(unet.eval(), (B, 4, FRAMES, S, S), given, {"fps": torch.full((B,), 8)}, left_alone)


def stable_video() -> Animal:
    torch.manual_seed(0)
    unet = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=S,
        layers_per_block=1,
        block_out_channels=(32, 64),  # of 32 groups
        cross_attention_dim=WIDTH,
        num_attention_heads=(2, 4),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    )
    given = {"encoder_hidden_states": (B, 1, WIDTH), "added_time_ids": (B, 3)}
    return Animal(unet.eval(), (B, FRAMES, 8, S, S), given, left_alone=("temporal_transformer_blocks",))


def dreamlite() -> Animal:
    torch.manual_seed(0)
    unet = diffusers.DreamLiteUNetModel(
        **SMALL,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        num_kv_heads=2,
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteCrossAttnNoSelfAttnUpBlock2D"),
    )
    return Animal(unet.eval(), (B, 4, S, S), {"encoder_hidden_states": TEXT})


def pixart() -> Animal:
    torch.manual_seed(0)
    model = diffusers.PixArtTransformer2DModel(
        sample_size=S,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=72,
        in_channels=4,
        cross_attention_dim=144,
        caption_channels=24,
    )
    mask = torch.ones(B, TOKENS)
    mask[1, -2:] = 0
    given = {"encoder_hidden_states": (B, TOKENS, 24)}
    constants = {"encoder_attention_mask": mask, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return Animal(_alive(model), (B, 4, S, S), given, constants)


def sd3(fuse: bool = False, **changes: Any) -> Animal:
    torch.manual_seed(0)
    config = dict(
        sample_size=S,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        pos_embed_max_size=S,
    )
    model = diffusers.SD3Transformer2DModel(**{**config, **changes})
    if fuse:
        model.fuse_qkv_projections()
    given = {"encoder_hidden_states": (B, TOKENS, 24), "pooled_projections": (B, 20)}
    return Animal(_alive(model), (B, 4, S, S), given)


def flux(fuse: bool = False) -> Animal:
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    if fuse:
        model.fuse_qkv_projections()
    places = torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(4)).float()
    given = {"encoder_hidden_states": (B, TOKENS, 24), "pooled_projections": (B, 20)}
    constants = {"txt_ids": torch.zeros(TOKENS, 3), "img_ids": places, "guidance": torch.full((B,), 3.5)}
    return Animal(_alive(model), (B, 16, 4), given, constants)


def _alive(model: Any) -> Any:
    """The model, whose gates and norms are not those of a model before its first training step."""
    with torch.no_grad():
        for p in model.parameters():
            if not p.any() or bool((p == 1).all()):
                p.add_(0.1 * torch.randn(p.shape))
    return model.eval()


def fake_xformers(monkeypatch: Any) -> None:
    """xFormers' attention, written out: it has no wheel for every machine."""

    def attention(q, k, v, attn_bias=None, op=None, scale=None):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, scale=scale)

    monkeypatch.setattr(
        stock, "xformers", SimpleNamespace(ops=SimpleNamespace(memory_efficient_attention=attention)), raising=False
    )


ZOO = {
    "UNet2DConditionModel": plain,
    "with AttnProcessor": lambda: plain(stock.AttnProcessor()),
    "sliced": lambda: plain(stock.SlicedAttnProcessor(1)),
    "xFormers": lambda: plain(stock.XFormersAttnProcessor()),
    "fused": fused,
    "added keys": added,
    "added keys alone": lambda: added(only_cross_attention=True),
    "added keys, sliced": lambda: added(stock.SlicedAttnAddedKVProcessor(1)),
    "added keys, xFormers": lambda: added(stock.XFormersAttnAddedKVProcessor()),
    "added keys, AttnAddedKVProcessor": lambda: added(stock.AttnAddedKVProcessor()),
    "Kandinsky 2.1": kandinsky21,
    "Kandinsky 2.2": kandinsky2,
    "unCLIP": unclip,
    "Kandinsky 3": kandinsky3,
    "UNet2DModel": unconditional,
    "UNet2DModel, sliced": lambda: unconditional(stock.SlicedAttnProcessor(1)),
    "AnimateDiff": motion,
    "ModelScope": modelscope,
    "I2VGen-XL": i2vgen,
    "Stable Video Diffusion": stable_video,
    "AudioLDM 2": audioldm2,
    "DreamLite": dreamlite,
    "PixArt": pixart,
    "SD3": sd3,
    "SD3, fused": lambda: sd3(fuse=True),
    "SD3.5": lambda: sd3(dual_attention_layers=(0,), qk_norm="rms_norm"),
    "Flux": flux,
    "Flux, fused": lambda: flux(fuse=True),
}
