"""``torch.compile``: a graph per action, so more graphs than the compiler keeps by default."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

from attnreuse.binding.layers import Layers
from attnreuse.binding.schedule import Schedule

STOCK = 8  # graphs that the compiler keeps of one function
_users: weakref.WeakSet = weakref.WeakSet()  # sessions that the limit was raised for
_limits: list[int] = []  # what it was before, and what it was raised to


def make_room(
    user: Any, denoiser: Any, whole: bool, layers: Layers, schedule: Schedule, warn: Callable[[str], None]
) -> None:
    """Raise the compiler's limit of graphs to what `schedule`, of the session `user`, needs, and say so.

    A denoiser compiled as a `whole` has a graph for each pattern of its layers' actions, a compiled block for
    each pattern of its own, and each of them for every shape that the stock model has one for.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return
    whole = whole or denoiser._compiled_call_impl is not None
    blocks = any(module._compiled_call_impl is not None for module in layers.around)
    if not (whole or blocks):
        return
    steps = set(schedule.steps)
    patterns = len(steps) if whole else len({action for step in steps for action in step})
    config, needed = dynamo.config, patterns * STOCK
    if config.recompile_limit < needed:
        warn(
            f"the compiler's limit of graphs, torch._dynamo.config.recompile_limit, is raised from "
            f"{config.recompile_limit} to {needed}, until disable: this policy has {patterns} patterns of actions"
        )
        _limits[:] = [*(_limits or [config.recompile_limit])[:1], needed]
        config.recompile_limit = needed
    if _limits:
        _users.add(user)


def give_back(user: Any) -> None:
    """The limit is needed for `user` no longer; with the last one it is what it was, unless somebody else set it."""
    _users.discard(user)
    if _limits and not _users:
        before, raised = _limits
        _limits.clear()
        config = sys.modules["torch._dynamo"].config
        if config.recompile_limit == raised:
            config.recompile_limit = before
