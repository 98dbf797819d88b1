"""The shipped pipeline's world: captions, scenes and their pictures, its folder and its CLIP pair.

Grammar: "a COLOR SHAPE on BACKGROUND" or "a COLOR SHAPE RELATION a COLOR SHAPE on BACKGROUND".
Foreground and background colours are disjoint, so every word has one meaning.
"""

import itertools
import random
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "assets" / "tiny-shapes"
GUIDANCE = 2.5  # guidance_scale that suits the shipped pipeline

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 205, 40),
    "purple": (145, 50, 190),
    "cyan": (60, 205, 220),
}
BACKGROUNDS = {
    "gray": (128, 128, 128),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
    "pink": (250, 180, 200),
}
SHAPES = ("circle", "square", "triangle")
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Caption:
    """What a caption says: one or two (color, shape) objects, their relation, the background."""

    objects: tuple[tuple[str, str], ...]
    relation: str | None
    background: str

    def __str__(self) -> str:
        named = [f"a {color} {shape}" for color, shape in self.objects]
        return f" {self.relation} ".join(named) + f" on {self.background}"

    @property
    def held_out(self) -> bool:
        """True for the tenth of all captions that no training stage ever sees."""
        return zlib.crc32(str(self).encode()) % 10 == 0


def all_captions() -> list[Caption]:
    """Every caption of the grammar, singles first; two objects never share a colour."""
    objects = list(itertools.product(COLORS, SHAPES))
    singles = [Caption((one,), None, ground) for one in objects for ground in BACKGROUNDS]
    pairs = [
        Caption((one, two), relation, ground)
        for one, two in itertools.product(objects, objects)
        if one[0] != two[0]
        for relation in RELATIONS
        for ground in BACKGROUNDS
    ]
    return singles + pairs


def parse(text: str) -> Caption:
    """Read a caption of the grammar back; ValueError for any other text."""
    head, _, background = text.rpartition(" on ")
    relation = next((r for r in RELATIONS if f" {r} " in head), None)
    parts = head.split(f" {relation} ") if relation else [head]
    objects = tuple(tuple(part.split()[1:]) for part in parts)
    known = background in BACKGROUNDS and all(len(o) == 2 and o[0] in COLORS and o[1] in SHAPES for o in objects)
    if not known or str(Caption(objects, relation, background)) != text:
        raise ValueError(f"not a tiny-shapes caption: {text!r}")
    return Caption(objects, relation, background)


@dataclass(frozen=True)
class Scene:
    """A caption with geometry: one (x, y, radius) per object, in fractions of the picture."""

    caption: Caption
    places: tuple[tuple[float, float, float], ...]


def place(caption: Caption, rng: random.Random) -> Scene:
    """Draw geometry that agrees with the caption's relation.

    Places and sizes vary little: what a caption means for a pixel is then learned soon, since at high
    noise the network can already predict most of the picture from the caption.
    """

    def about(value: float, spread: float) -> float:
        return value + rng.uniform(-spread, spread)

    if caption.relation is None:
        return Scene(caption, ((about(0.5, 0.04), about(0.5, 0.04), about(0.26, 0.03)),))
    near, far = about(0.27, 0.03), about(0.73, 0.03)
    first, second = (near, far) if caption.relation in ("left of", "above") else (far, near)
    along = [(first, about(0.5, 0.04)), (second, about(0.5, 0.04))]
    horizontal = caption.relation in ("left of", "right of")
    centers = along if horizontal else [(x, y) for y, x in along]
    return Scene(caption, tuple((x, y, about(0.19, 0.015)) for x, y in centers))


def sample_scenes(count: int, seed: int, single: float = 0.3) -> list[Scene]:
    """`count` training scenes (never a held-out caption); `single` is the share of one-object ones."""
    rng = random.Random(seed)
    captions = [c for c in all_captions() if not c.held_out]
    ones = [c for c in captions if c.relation is None]
    twos = [c for c in captions if c.relation is not None]
    return [place(rng.choice(ones if rng.random() < single else twos), rng) for _ in range(count)]


def held_out_prompts(count: int, seed: int = 0, single: float = 0.1) -> list[str]:
    """`count` different held-out captions, the same for the same seed; `single` is the share of one-object ones."""
    return _prompts([c for c in all_captions() if c.held_out], count, seed, single)


def search_prompts(count: int, seed: int = 0, single: float = 0.1) -> list[str]:
    """`count` different captions of the training set: to search and analyse with, and never to judge with."""
    return _prompts([c for c in all_captions() if not c.held_out], count, seed, single)


def all_known(prompts: list[str]) -> bool:
    """Are all of these captions of the grammar, which the pipeline's own CLIP and the oracle can judge?"""
    try:
        for prompt in prompts:
            parse(prompt)
    except ValueError:
        return False
    return True


def _prompts(captions: list[Caption], count: int, seed: int, single: float) -> list[str]:
    rng = random.Random(seed)
    ones = [str(c) for c in captions if c.relation is None]
    twos = [str(c) for c in captions if c.relation is not None]
    n_single = min(len(ones), round(count * single))
    return rng.sample(ones, n_single) + rng.sample(twos, count - n_single)


def _signed_distance(shape: str, dx: Tensor, dy: Tensor, radius: float) -> Tensor:
    """Distance to the shape's edge, positive inside; all shapes have about the same area."""
    if shape == "circle":
        return radius - (dx**2 + dy**2).sqrt()
    if shape == "square":
        return 0.89 * radius - torch.maximum(dx.abs(), dy.abs())
    # Equilateral, point up: three half-planes at distance `inner` from the centroid.
    inner = 0.7 * radius
    slanted = 0.5 * -dy + 0.75**0.5 * dx.abs()
    return inner - torch.maximum(dy, slanted)


def draw(scenes: list[Scene], size: int) -> Tensor:
    """Render scenes, anti-aliased.

    Returns:
        ``[len(scenes), 3, size, size]`` fp32 in [-1, 1].
    """
    axis = (torch.arange(size) + 0.5) / size
    y, x = axis[:, None], axis[None, :]
    images = torch.empty(len(scenes), 3, size, size)
    for image, scene in zip(images, scenes, strict=True):
        image[:] = torch.tensor(BACKGROUNDS[scene.caption.background])[:, None, None]
        for (color, shape), (cx, cy, r) in zip(scene.caption.objects, scene.places, strict=True):
            inside = _signed_distance(shape, x - cx, y - cy, r)
            cover = (inside * size + 0.5).clamp(0, 1)  # [size, size], share of the pixel covered
            image.lerp_(torch.tensor(COLORS[color], dtype=torch.float32)[:, None, None], cover)
    return images / 127.5 - 1


def load_clip(folder: Path = FOLDER) -> tuple[Any, Any]:
    """The CLIP pair of an exported pipeline (transformers' ``CLIPModel``, fp32), and its tokenizer."""
    from safetensors.torch import load_file
    from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

    clip = CLIPModel(CLIPConfig.from_pretrained(folder / "clip"))
    text = CLIPTextModel.from_pretrained(folder / "text_encoder")
    state = load_file(folder / "clip" / "model.safetensors")
    state |= {f"text_model.{key.removeprefix('text_model.')}": value for key, value in text.state_dict().items()}
    clip.load_state_dict(state)
    return clip.float().eval(), CLIPTokenizer.from_pretrained(folder / "tokenizer")
