"""Models that are not served, with the figures that tell whether it would pay: bytes of maps, share of attention."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.nn import Linear, Module

from attnreuse.maps.formats import format_named

# In names of layers: those that image tokens do not meet, those of attention where no two image tokens meet, and linear
# ones that not every image token meets.
OTHERS = ("text", "txt", "caption", "audio")
CROSS = (*OTHERS, "attn2", "cross")
NOT_EACH = (*OTHERS, "norm", "mod", "ada", "time", "add", "attn2.to_k", "attn2.to_v")


@dataclass(frozen=True)
class Grid:
    """How a model parts a picture or a video into tokens.

    Attributes:
        side: pixels of a token, along a side.
        depth: frames of a token; the first frame is one of its own.
        size, frames: what its pipeline makes by default: (height, width) in pixels.
    """

    side: int
    depth: int = 1
    size: tuple[int, int] = (1024, 1024)
    frames: int = 1

    def tokens(self, size: tuple[int, int], frames: int) -> int:
        return (size[0] // self.side) * (size[1] // self.side) * (1 + (frames - 1) // self.depth)


# Defaults of the pipelines of diffusers 0.42. Left out: attention that is linear, windowed, sparse, per frame or over
# chunks, experts of which a token meets some, and tokens that depend on the VAE or on pictures that are given.
GRIDS = {
    "AuraFlowTransformer2DModel": Grid(16),
    "BriaFibo2Transformer2DModel": Grid(16),
    "BriaFiboTransformer2DModel": Grid(16),
    "BriaTransformer2DModel": Grid(16),
    "ChromaTransformer2DModel": Grid(16),
    "CogView3PlusTransformer2DModel": Grid(16),
    "CogView4Transformer2DModel": Grid(16),
    "DiTTransformer2DModel": Grid(16, size=(256, 256)),
    "ErnieImageTransformer2DModel": Grid(16),
    "Flux2Transformer2DModel": Grid(16),
    "GlmImageTransformer2DModel": Grid(16),
    "HunyuanDiT2DModel": Grid(16),
    "HunyuanImageTransformer2DModel": Grid(32, size=(2048, 2048)),
    "Ideogram4Transformer2DModel": Grid(16, size=(2048, 2048)),
    "Krea2Transformer2DModel": Grid(16),
    "LongCatImageTransformer2DModel": Grid(16),
    "Lumina2Transformer2DModel": Grid(16),
    "LuminaNextDiT2DModel": Grid(16),
    "OmniGenTransformer2DModel": Grid(16),
    "OvisImageTransformer2DModel": Grid(16),
    "QwenImage21Transformer2DModel": Grid(16),
    "QwenImageTransformer2DModel": Grid(16),
    "ZImageTransformer2DModel": Grid(16),
    "AllegroTransformer3DModel": Grid(16, 4, (720, 1280), 88),
    "AnyFlowTransformer3DModel": Grid(16, 4, (480, 832), 81),
    "ChronoEditTransformer3DModel": Grid(16, 4, (480, 832), 5),
    "CogVideoXTransformer3DModel": Grid(16, 4, (480, 720), 49),
    "ConsisIDTransformer3DModel": Grid(16, 4, (480, 720), 49),
    "EasyAnimateTransformer3DModel": Grid(16, 4, (512, 512), 49),
    "HunyuanVideo15Transformer3DModel": Grid(16, 4, (480, 848), 121),
    "HunyuanVideoTransformer3DModel": Grid(16, 4, (720, 1280), 129),
    "LTX2VideoTransformer3DModel": Grid(32, 8, (512, 768), 121),
    "LTXVideoTransformer3DModel": Grid(32, 8, (512, 704), 161),
    "MochiTransformer3DModel": Grid(16, 6, (480, 848), 19),
    "MotifVideoTransformer3DModel": Grid(16, 4, (736, 1280), 121),
    "SkyReelsV2Transformer3DModel": Grid(16, 4, (544, 960), 97),
    "WanTransformer3DModel": Grid(16, 4, (480, 832), 81),
    "WanVACETransformer3DModel": Grid(16, 4, (480, 832), 81),
}


def entry_of(denoiser: Any, table: Mapping[str, Any]) -> Any:
    """What `table` has for a denoiser's class by name, or else for the nearest of its base classes; or None."""
    return next((table[cls.__name__] for cls in type(denoiser).__mro__ if cls.__name__ in table), None)


def figures(denoiser: Any, size: tuple[int, int] | None = None, frames: int | None = None) -> str | None:
    """What reuse would meet in one call for one picture or video; None for a model that is not known.

    Args:
        size: (height, width) in pixels; None: the pipeline's own.
        frames: of a video, likewise.
    """
    grid = entry_of(denoiser, GRIDS)
    if grid is None:
        return None
    size, frames = size or grid.size, (frames or grid.frames) if grid.frames > 1 else 1
    n, u8 = grid.tokens(size, frames), format_named("u8")
    layers = self_attention(denoiser)
    nbytes = sum(u8.nbytes((1, _heads(attn), n, n)) for attn in layers)
    attention = sum(4 * n * n * _width(attn) for attn in layers)
    others = 2 * n * sum(m.weight.numel() for m in _in_blocks(denoiser, NOT_EACH) if isinstance(m, Linear))
    at = f"{size[0]}x{size[1]}" + (f" and {frames} frames" if frames > 1 else "")
    share = attention / (attention + others)
    return (
        f"at {at} its attention maps take {nbytes / 2**30:.1f} GiB in u8, and attention makes about {share:.0%} of a "
        "step's multiplications"
    )


def self_attention(denoiser: Module) -> list[Any]:
    """Layers that attend over all image tokens, alone or along with text."""
    return [attn for attn in _in_blocks(denoiser, CROSS) if hasattr(attn, "processor")]


def _in_blocks(denoiser: Module, but: tuple[str, ...]) -> Iterator[Module]:
    """What lies in a list of blocks, such as ``blocks.0.attn``, but for names that have one of `but` in them."""
    for name, module in denoiser.named_modules():
        if re.match(r"\w+\.\d+\.", name) and not any(word in name for word in but):
            yield module


def _heads(attn: Any) -> int:
    return attn.heads if hasattr(attn, "heads") else attn.num_heads


def _width(attn: Any) -> int:
    return attn.inner_dim if hasattr(attn, "inner_dim") else attn.to_q.out_features
