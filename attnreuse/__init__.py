"""attnreuse: compute an attention map once, keep it compressed, apply it to fresh values later."""

import importlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

try:
    from attnreuse import ops
except ModuleNotFoundError as error:
    if error.name != "attnreuse.kernels":
        raise
    raise ImportError(
        f"Python finds the sources of attnreuse in {Path(__file__).parents[1]} before the installed package, which has "
        "the kernels: start Python in another folder, or install with pip install -e ."
    ) from None
from attnreuse.binding.enabling import disable, enable
from attnreuse.binding.report import Report
from attnreuse.binding.session import Session
from attnreuse.demo import tiny_shapes
from attnreuse.errors import (
    AttnReuseError,
    MemoryBudgetError,
    PolicyMismatchError,
    StaleMapError,
    UnsupportedLayerError,
)
from attnreuse.maps.formats import AttentionMap, MapFormat
from attnreuse.policy import Policy, Rule, hurry, load_policy, periodic

TINY_SHAPES_GUIDANCE = tiny_shapes.GUIDANCE

_SCIENCE = {  # loaded when first used: what samples pictures to learn from them
    "Analysis": "analysis",
    "Objective": "search",
    "analyze": "analysis",
    "Front": "search",
    "exhaustive": "search",
    "ladder": "search",
    "phast": "search",
    "predict": "analysis",
}

_MODULES = ("analysis", "bench", "formats", "native", "processors", "reference", "search", "session")  # public paths

__all__ = [
    "TINY_SHAPES_GUIDANCE",
    "Analysis",
    "AttentionMap",
    "AttnReuseError",
    "Front",
    "MapFormat",
    "MemoryBudgetError",
    "Objective",
    "Policy",
    "PolicyMismatchError",
    "Report",
    "Rule",
    "Session",
    "StaleMapError",
    "UnsupportedLayerError",
    "__version__",
    "analyze",
    "disable",
    "enable",
    "exhaustive",
    "hurry",
    "ladder",
    "load_policy",
    "ops",
    "periodic",
    "phast",
    "predict",
    "tiny_shapes_path",
]


def tiny_shapes_path() -> Path:
    """Folder of the shipped trained pipeline, for ``StableDiffusionPipeline.from_pretrained``."""
    return tiny_shapes.FOLDER


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("attnreuse")
    if name in _MODULES:
        return importlib.import_module(f"attnreuse.{name}")
    if name not in _SCIENCE:
        raise AttributeError(f"module 'attnreuse' has no attribute {name!r}")
    return getattr(importlib.import_module(f"attnreuse.{_SCIENCE[name]}"), name)
