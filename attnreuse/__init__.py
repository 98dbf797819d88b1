"""attnreuse: compute an attention map once, keep it compressed, apply it to fresh values later."""

import importlib
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if find_spec("attnreuse.kernels") is None:
    raise ImportError(
        f"Python finds the sources of attnreuse in {Path(__file__).parents[1]} before the installed package, which has "
        "the kernels: start Python in another folder, or install with pip install -e ."
    )

if TYPE_CHECKING:
    from attnreuse import ops
    from attnreuse.analysis import Analysis, analyze, predict
    from attnreuse.binding.enabling import disable, enable
    from attnreuse.binding.report import Report
    from attnreuse.binding.session import Session
    from attnreuse.errors import (
        AttnReuseError,
        MemoryBudgetError,
        PolicyMismatchError,
        StaleMapError,
        UnsupportedLayerError,
    )
    from attnreuse.maps.formats import AttentionMap, MapFormat
    from attnreuse.policy import Policy, Rule, hurry, load_policy, periodic
    from attnreuse.search import Front, Objective, exhaustive, ladder, phast

    TINY_SHAPES_GUIDANCE: float
    __version__: str

# Loaded when first used, so that policies and the command line's help come without torch.
_WHERE = {
    "AttentionMap": "maps.formats",
    "Analysis": "analysis",
    "AttnReuseError": "errors",
    "Front": "search",
    "MapFormat": "maps.formats",
    "MemoryBudgetError": "errors",
    "Objective": "search",
    "Policy": "policy",
    "PolicyMismatchError": "errors",
    "Report": "binding.report",
    "Rule": "policy",
    "Session": "binding.session",
    "StaleMapError": "errors",
    "UnsupportedLayerError": "errors",
    "analyze": "analysis",
    "disable": "binding.enabling",
    "enable": "binding.enabling",
    "exhaustive": "search",
    "hurry": "policy",
    "ladder": "search",
    "load_policy": "policy",
    "periodic": "policy",
    "phast": "search",
    "predict": "analysis",
}
_MODULES = ("analysis", "bench", "formats", "native", "ops", "processors", "reference", "search", "session")

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
    from attnreuse.demo.tiny_shapes import FOLDER

    return FOLDER


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("attnreuse")
    if name == "TINY_SHAPES_GUIDANCE":
        return importlib.import_module("attnreuse.demo.tiny_shapes").GUIDANCE
    if name in _MODULES:
        return importlib.import_module(f"attnreuse.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'attnreuse' has no attribute {name!r}")
    return getattr(importlib.import_module(f"attnreuse.{_WHERE[name]}"), name)
