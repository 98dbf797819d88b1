"""Models whose maps do not fit, or whose attention is a small share of the work: refused with both figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.nn import Linear, Module

from attnreuse.maps.formats import format_named

ELSEWHERE = ("norm", "mod", "ada", "time", "txt", "text", "context", "add", "refiner")  # in names of such layers


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


GRIDS = {  # defaults of the pipelines of diffusers 0.42
    "Flux2Transformer2DModel": Grid(16),
    "QwenImageTransformer2DModel": Grid(16),
    "ZImageTransformer2DModel": Grid(16),
    "HiDreamImageTransformer2DModel": Grid(16),
    "WanTransformer3DModel": Grid(16, 4, (480, 832), 81),
    "HunyuanVideoTransformer3DModel": Grid(16, 4, (720, 1280), 129),
    "CogVideoXTransformer3DModel": Grid(16, 4, (480, 720), 49),
    "LTXVideoTransformer3DModel": Grid(32, 8, (512, 704), 161),
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
    layers = [
        attn
        for name, attn in denoiser.named_modules()
        if hasattr(attn, "set_processor") and hasattr(attn, "heads") and not name.endswith("attn2")  # over text
    ]
    nbytes = sum(u8.nbytes((1, attn.heads, n, n)) for attn in layers)
    attention = sum(4 * n * n * attn.inner_dim for attn in layers)
    others = 2 * n * sum(m.weight.numel() for name, m in denoiser.named_modules() if _meets_tokens(name, m))
    at = f"{size[0]}x{size[1]}" + (f" and {frames} frames" if frames > 1 else "")
    share = attention / (attention + others)
    return (
        f"at {at} its attention maps take {nbytes / 2**30:.1f} GiB in u8, and attention makes about {share:.0%} of a "
        "step's multiplications"
    )


def _meets_tokens(name: str, module: Module) -> bool:
    """Whether every image token meets this layer: it lies in a block, and neither sees text nor modulates."""
    parts = name.split(".")
    in_block = any(part.isdigit() for part in parts)
    return isinstance(module, Linear) and in_block and not any(w in p for p in parts for w in ELSEWHERE)
