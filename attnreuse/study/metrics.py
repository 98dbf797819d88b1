"""How far pictures are from the full-step ones (paired), and how good they are as a set.

Pictures are ``[P, S, S, 3]`` arrays in [0, 1]. SSIM, LPIPS and FID go through torchmetrics (extra
``eval``); LPIPS, FID and CLIP score load their published weights, FID and CLIP score with ``tiny=True``
those of the shipped pipeline's own CLIP pair, which lie in the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attnreuse.errors import AttnReuseError

EVAL = "pip install 'attnreuse[eval]'"
IMAGES = "pip install 'torchmetrics[image]', from where your torch came from: its torchvision must match"
EQUAL_DB = 120.0  # PSNR that counts for equal pictures in a mean: fp32 rounding is about there
CLIP_MODEL = "openai/clip-vit-base-patch16"


def psnr(image: np.ndarray, target: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two pictures of one shape in [0, 1]; ``inf`` where equal.

    Raises:
        AttnReuseError: pictures that are not numbers, as half precision may make them.
    """
    if image.shape != target.shape:
        raise ValueError(f"pictures must have one shape, got {image.shape} and {target.shape}")
    error = float(np.mean((np.asarray(image, np.float64) - target) ** 2))
    if not math.isfinite(error):
        raise AttnReuseError("pictures hold values that are not numbers; if they are of half precision, try float32")
    return -10 * math.log10(error) if error else math.inf


def psnr_each(images: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """PSNR of each picture, at most ``EQUAL_DB``: ``[P]``; see :func:`psnr`."""
    return np.minimum(EQUAL_DB, [psnr(a, b) for a, b in zip(images, targets, strict=True)])


def ssim_each(images: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Structural similarity of each picture, 1 where equal: ``[P]``."""
    with _needing("SSIM"):
        from torchmetrics.functional.image import structural_similarity_index_measure
    pair = (_nchw(images).double(), _nchw(targets).double())  # in fp32 flat areas lose three digits
    return structural_similarity_index_measure(*pair, data_range=1.0, reduction="none").numpy()


def lpips_each(images: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """LPIPS distance (AlexNet) of each picture, 0 where equal: ``[P]``; needs torchvision and its weights."""
    model = _lpips_model()
    with torch.no_grad():
        return np.array([float(model(_nchw(a[None]), _nchw(b[None]))) for a, b in zip(images, targets, strict=True)])


PAIRED: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "psnr": psnr_each,
    "ssim": ssim_each,
    "lpips": lpips_each,
}


def try_out(paired: str) -> None:
    """Judge two blank pictures by one of ``PAIRED``.

    Raises:
        AttnReuseError: it needs what is not installed; the message says how to get it.
    """
    blank = np.zeros((1, 64, 64, 3), np.float32)
    PAIRED[paired](blank, blank)


HIGHER_IS_BETTER = {"psnr": True, "ssim": True, "lpips": False}


def half_width(values: np.ndarray) -> float:
    """Half of the 95 % confidence interval of the mean of values ``[P]``; NaN for a single one."""
    if len(values) < 2:
        return math.nan
    with _needing("a confidence interval"):
        from scipy.stats import t
    return float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))


def shown_psnr(mean: float, half: float | None = None) -> str:
    """A mean PSNR in dB and, where known, the half-width of its interval, as tables show them."""
    return f"{mean:.1f}" + ("" if half is None else f" ± {half:.1f}")


def fid(images: np.ndarray, targets: np.ndarray, *, tiny: bool = False) -> float:
    """Frechet distance of the pictures' features; biased upwards for few pictures, so compare equal counts.

    Args:
        tiny: features of the shipped pipeline's image tower (128 dims) instead of Inception's 2,048.
    """
    with _needing("FID", EVAL if tiny else IMAGES):
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(_TinyFeatures() if tiny else 2048, normalize=True)
    with torch.no_grad():
        for pictures, real in ((targets, True), (images, False)):
            for start in range(0, len(pictures), 64):
                metric.update(_nchw(pictures[start : start + 64]), real=real)
        return max(0.0, float(metric.compute()))


def clip_scores(images: np.ndarray, prompts: list[str], *, tiny: bool = False) -> np.ndarray:
    """100 times the cosine of each picture's and its prompt's CLIP embeddings, at least 0: ``[P]``.

    Written on transformers: torchmetrics 1.9 calls it in a way that transformers 5 no longer answers.
    """
    with _needing("CLIP score"):
        clip, processor = _tiny_pair() if tiny else _published_pair()
    pictures = list((_nchw(images) * 255).round().byte())
    given = processor(text=prompts, images=pictures, return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        seen = clip.visual_projection(clip.vision_model(given["pixel_values"]).pooler_output)
        read = clip.text_model(given["input_ids"], attention_mask=given["attention_mask"]).pooler_output
        cosine = nn.functional.cosine_similarity(seen, clip.text_projection(read))
    return (100 * cosine).clamp(min=0).numpy()


def obedience(images: np.ndarray, prompts: list[str]) -> dict[str, float]:
    """Shares of tiny-shapes captions whose background, first colour, first shape and relation are there."""
    with _needing("the caption oracle"):
        from attnreuse.demo.caption_oracle import judge
    from attnreuse.demo.tiny_shapes import parse

    pictures = (images * 255).round().astype(np.uint8)
    verdicts = [judge(picture, parse(prompt)) for picture, prompt in zip(pictures, prompts, strict=True)]
    return {
        key: float(np.mean([getattr(v, key) for v in verdicts])) for key in ("background", "color", "shape", "relation")
    }


class _TinyFeatures(nn.Module):
    """Embeddings ``[P, 128]`` of pictures ``[P, 3, S, S]`` in [0, 1] by the shipped pair's image tower."""

    num_features = 128

    def forward(self, pictures: Tensor) -> Tensor:
        clip, processor = _tiny_pair()
        pixels = processor.pixels(pictures.float())
        return clip.visual_projection(clip.vision_model(pixels).pooler_output)


class _TinyProcessor:
    """Prepares pictures and texts for the tiny pair, called like transformers' ``CLIPProcessor``."""

    def __init__(self, tokenizer: Any, side: int):
        self.tokenizer, self.side = tokenizer, side

    def __call__(self, text: list[str], images: list[Tensor], **ignored: Any) -> dict[str, Tensor]:
        found = dict(self.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt"))
        return found | {"pixel_values": self.pixels(torch.stack(images).float() / 255)}

    def pixels(self, pictures: Tensor) -> Tensor:
        """``[P, 3, S, S]`` in [0, 1] to the tower's size, in [-1, 1]."""
        size = (self.side, self.side)
        return nn.functional.interpolate(pictures, size, mode="bilinear", antialias=True) * 2 - 1


@lru_cache(maxsize=1)
def _published_pair() -> tuple[Any, Any]:
    from transformers import CLIPModel, CLIPProcessor

    return CLIPModel.from_pretrained(CLIP_MODEL).eval(), CLIPProcessor.from_pretrained(CLIP_MODEL)


@lru_cache(maxsize=1)
def _tiny_pair() -> tuple[Any, _TinyProcessor]:
    from attnreuse.demo.tiny_shapes import load_clip

    clip, tokenizer = load_clip()
    return clip, _TinyProcessor(tokenizer, clip.config.vision_config.image_size)


@lru_cache(maxsize=1)
def _lpips_model() -> Any:
    with _needing("LPIPS", IMAGES):
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)


@contextmanager
def _needing(what: str, remedy: str = EVAL) -> Iterator[None]:
    """Turns a missing package or unreachable weights into one clear error."""
    try:
        yield
    except ImportError as error:
        raise AttnReuseError(f"{what} needs more: {remedy} ({error})") from error
    except OSError as error:
        raise AttnReuseError(f"{what}: its weights could not be loaded ({error})") from error


def _nchw(pictures: np.ndarray) -> Tensor:
    """``[P, S, S, 3]`` to ``[P, 3, S, S]``."""
    return torch.from_numpy(np.ascontiguousarray(pictures, np.float32)).permute(0, 3, 1, 2)
