"""Denoiser outputs kept to be replayed: which call gives the same again, and what may be dropped."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from attnreuse.binding.schedule import CACHED
from attnreuse.policy import Action

Key = tuple[int, str, int]  # first picture of the batch, what all layers did so far, call within the step


@dataclass
class Memo:
    """Denoiser outputs by key, the least recently used dropped beyond `limit` bytes."""

    limit: int
    held: OrderedDict[Key, Any] = field(default_factory=OrderedDict)
    nbytes: int = 0
    calls_per_step: int = 1

    def get(self, key: Key) -> Any:
        self.held.move_to_end(key)
        return tree_map_only(Tensor, Tensor.clone, self.held[key])  # the caller may write to it

    def put(self, key: Key, output: Any) -> None:
        self.calls_per_step = max(self.calls_per_step, key[2] + 1)
        if key in self.held:
            return
        size = _nbytes(output)
        if size > self.limit:
            return
        self.held[key] = tree_map_only(Tensor, Tensor.clone, output)
        self.nbytes += size
        while self.nbytes > self.limit:
            _, dropped = self.held.popitem(last=False)
            self.nbytes -= _nbytes(dropped)

    def first_live(self, batch: int, digests: list[str], actions: dict[str, list[Action]]) -> int:
        """The first step that must be computed: what is not held, or made the map of a step that is not."""
        live = 0
        while live < len(digests) and all(
            (batch, digests[live], call) in self.held for call in range(self.calls_per_step)
        ):
            live += 1
        while live < len(digests) and any(row[live] in CACHED for row in actions.values()):
            live -= 1
        return live


def digests_of(actions: dict[str, list[Action]], steps: int) -> list[str]:
    """Per executed step of a run of `steps` (``num_inference_steps``): a digest of what every layer did up to it."""
    running, digests = hashlib.sha256(f"{steps} steps;".encode()), []
    for step_actions in zip(*actions.values(), strict=True):
        running.update(",".join(a.value for a in step_actions).encode() + b";")
        digests.append(running.hexdigest())
    return digests


def _nbytes(output: Any) -> int:
    """Of the tensors of a denoiser's output (a tuple, or diffusers' output class)."""
    return sum(leaf.nbytes for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
