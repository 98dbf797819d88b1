"""Reads colour, shape and relation off the pixels of a tiny-shapes picture, and judges it by its caption."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from attnreuse.demo.tiny_shapes import BACKGROUNDS, COLORS, Caption

CLEAR = 50  # RGB distance from the background at which a pixel belongs to an object
SMALLEST = 0.008  # share of the picture below which a patch of colour is no object


@dataclass(frozen=True)
class Seen:
    """One object: its colour, shape, centre (x, y) and area, in fractions of the picture."""

    color: str
    shape: str
    center: tuple[float, float]
    area: float


@dataclass(frozen=True)
class Verdict:
    """Is the caption's background there, its first colour, in the first shape, and the relation?"""

    background: bool
    color: bool
    shape: bool
    relation: bool


def read(picture: np.ndarray) -> tuple[str, list[Seen]]:
    """Background and objects, largest first, of a uint8 picture ``[S, S, 3]``."""
    pixels = picture.astype(float)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    background = str(_nearest(ground[None], BACKGROUNDS)[0])
    clear = np.linalg.norm(pixels - ground, axis=-1) > CLEAR
    names = _nearest(pixels.reshape(-1, 3), COLORS).reshape(clear.shape)
    objects = []
    for color in COLORS:
        labels, _ = ndimage.label(ndimage.binary_opening(clear & (names == color)))
        for i, box in enumerate(ndimage.find_objects(labels), start=1):
            inside = labels[box] == i
            area = inside.sum() / clear.size
            if area < SMALLEST:
                continue
            y, x = ndimage.center_of_mass(labels == i)
            center = (float(x / clear.shape[1]), float(y / clear.shape[0]))
            objects.append(Seen(color, _shape(ndimage.binary_fill_holes(inside)), center, area))
    return background, sorted(objects, key=lambda seen: -seen.area)


def judge(picture: np.ndarray, caption: Caption) -> Verdict:
    """Compare what :func:`read` sees among the two largest objects with the caption."""
    background, objects = read(picture)
    by_color = {seen.color: seen for seen in reversed(objects[:2])}
    (color, shape), *others = caption.objects
    first = by_color.get(color)
    second = by_color.get(others[0][0]) if others else None
    relation = not others or bool(first and second and _holds(caption.relation, first.center, second.center))
    return Verdict(
        background == caption.background,
        first is not None,
        first is not None and first.shape == shape,
        relation,
    )


def _nearest(pixels: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> np.ndarray:
    distances = np.linalg.norm(pixels[:, None] - np.array(list(palette.values()), float), axis=-1)
    return np.array(list(palette))[distances.argmin(axis=1)]


def _shape(inside: np.ndarray) -> str:
    """By the share of the bounding box that is filled: a triangle 1/2, a circle pi/4, a square 1."""
    filled = inside.mean()
    return "triangle" if filled < 0.65 else "circle" if filled < 0.89 else "square"


def _holds(relation: str, first: tuple[float, float], second: tuple[float, float]) -> bool:
    dx, dy = second[0] - first[0], second[1] - first[1]
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return along > abs(across)
