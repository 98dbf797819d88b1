"""``torch.compile``: a graph per action, so more graphs than the compiler keeps by default."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from attnreuse.layers import Layers


def make_room(denoiser: Any, pipe: Any, layers: Layers, warn: Callable[[str], None]) -> None:
    """Raise the compiler's limit of graphs to what the policy needs, and say so.

    A compiled denoiser has a graph for each pattern of its layers' actions, a compiled block for each
    pattern of its own, and each of them for every shape that the stock model has one for.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return
    whole = getattr(pipe, "unet", None) is not denoiser and hasattr(getattr(pipe, "unet", None), "_orig_mod")
    whole = whole or denoiser._compiled_call_impl is not None
    blocks = any(module._compiled_call_impl is not None for module in layers.around)
    if not (whole or blocks):
        return
    steps = list(zip(*layers.actions.values(), strict=True))
    patterns = len(set(steps)) if whole else len({action for step in steps for action in step})
    config, stock = dynamo.config, 8
    if config.recompile_limit < patterns * stock:
        warn(
            f"the compiler's limit of graphs, torch._dynamo.config.recompile_limit, is raised from "
            f"{config.recompile_limit} to {patterns * stock}: this policy has {patterns} patterns of actions"
        )
        config.recompile_limit = patterns * stock
