"""What a run did, layer by layer; prints as a rich table."""

from __future__ import annotations

import io
from typing import Any, ClassVar

from pydantic import ConfigDict, Field

from attnreuse.policy import Action
from attnreuse.results import Result

COUNTS = {Action.COMPUTE: "computed", Action.CAPTURE: "captured", Action.REUSE: "reused", Action.HOLD: "held"}


class LayerReport(Result):
    """What one layer did in a run: numbers of denoiser calls, and its map: ``(B, H, M, N)``, head dim, bytes.

    Attributes:
        held: calls that gave the output of an earlier one again.
        planned: what the policy said for the same calls, by "computed", "captured", "reused" and "held".
        reasons: why calls went otherwise than planned, and how many did.
    """

    model_config = ConfigDict(frozen=False)
    name: str
    kind: str  # "self", "cross" or "joint"
    computed: int = 0
    captured: int = 0
    reused: int = 0
    held: int = 0
    planned: dict[str, int] = Field(default_factory=lambda: dict.fromkeys(COUNTS.values(), 0))
    reasons: dict[str, int] = Field(default_factory=dict)
    map_bytes: int = 0
    shape: tuple[int, int, int, int] | None = None
    head_dim: int | None = None

    def count(self, planned: Action, did: Action | None, reason: str | None) -> None:
        """Count a denoiser call; `did` is None where the layer was not called."""
        self.planned[COUNTS[planned]] += 1
        if did is not None:
            setattr(self, COUNTS[did], getattr(self, COUNTS[did]) + 1)
        if did is not planned:
            reason = reason or "unknown"
            self.reasons[reason] = self.reasons.get(reason, 0) + 1


class Report(Result):
    """What ran. `skipped` maps layer names to the reason why they only compute."""

    model_config = ConfigDict(frozen=False)
    file_kind: ClassVar[str] = "a report"
    policy: str
    map_format: str
    steps: int = 0
    layers: list[LayerReport] = Field(default_factory=list)
    predicted_bytes: int = 0
    allocated_bytes: int = 0
    skipped: dict[str, str] = Field(default_factory=dict)

    def groups(self) -> list[list[LayerReport]]:
        """Layers of one kind, map shape and fate together, in the order of their first."""
        groups: dict[tuple, list[LayerReport]] = {}
        for layer in self.layers:
            fate = {**layer.to_dict(), "name": None, "skipped": self.skipped.get(layer.name)}
            groups.setdefault(tuple(map(str, fate.values())), []).append(layer)
        return list(groups.values())

    def __rich__(self) -> Any:
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
        for column in ("", "layers", "kind", "map", *COUNTS.values(), "MiB"):
            table.add_column(column, justify="left" if column in ("", "kind") else "right", overflow="fold")
        notes = []
        for number, layers in enumerate(self.groups(), 1):
            layer = layers[0]
            shape = "" if layer.shape is None else "x".join(map(str, layer.shape[2:]))
            counts = [_of(getattr(layer, key), layer.planned[key]) for key in COUNTS.values()]
            table.add_row(f"{number}", f"{len(layers)}", layer.kind, shape, *counts, f"{layer.map_bytes / 2**20:,.1f}")
            notes.append(f"{number}: {_names([layer.name for layer in layers])}")
            notes += [f"   {times} calls not as planned: {why}" for why, times in layer.reasons.items()]
            notes += [f"   only computes: {self.skipped[layer.name]}"] if layer.name in self.skipped else []
        known = {layer.name for layer in self.layers}
        notes += [f"left alone: {name}: {why}" for name, why in self.skipped.items() if name not in known]
        title = f"{self.policy}, {self.steps} steps, {self.map_format} maps, {self.allocated_bytes:,} bytes"
        return Group(Text(title), table, *map(Text, notes))

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=80, file=io.StringIO(), markup=False, emoji=False)
        console.print(self)
        return console.file.getvalue()


def _of(count: int, planned: int) -> str:
    return str(count) if count == planned else f"{count} of {planned}"


def _names(names: list[str]) -> str:
    """Names in few words: one as it is, several by their blocks, as patterns that a policy could name."""
    if len(names) == 1:
        return names[0]
    blocks: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        block = ".".join(parts[:2] if parts[1].isdigit() else parts[:1])
        blocks[f"{block}.*{parts[-1]}"] = blocks.get(f"{block}.*{parts[-1]}", 0) + 1
    return ", ".join(pattern + (f" ({count})" if count > 1 else "") for pattern, count in blocks.items())
