"""attnreuse: compute an attention map once, keep it compressed, apply it to fresh values later."""

from pathlib import Path

from attnreuse import ops
from attnreuse.errors import (
    AttnReuseError,
    MemoryBudgetError,
    PolicyMismatchError,
    StaleMapError,
    UnsupportedLayerError,
)
from attnreuse.formats import AttentionMap, MapFormat
from attnreuse.policy import Policy, hurry, periodic
from attnreuse.report import Report
from attnreuse.session import Session, disable, enable

TINY_SHAPES_GUIDANCE = 2.5  # guidance_scale that suits the shipped pipeline

__all__ = [
    "TINY_SHAPES_GUIDANCE",
    "AttentionMap",
    "AttnReuseError",
    "MapFormat",
    "MemoryBudgetError",
    "Policy",
    "PolicyMismatchError",
    "Report",
    "Session",
    "StaleMapError",
    "UnsupportedLayerError",
    "disable",
    "enable",
    "hurry",
    "ops",
    "periodic",
    "tiny_shapes_path",
]


def tiny_shapes_path() -> Path:
    """Folder of the shipped trained pipeline, for ``StableDiffusionPipeline.from_pretrained``."""
    return Path(__file__).parent / "assets" / "tiny-shapes"
