"""What a run did, layer by layer; prints as a rich table."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class LayerReport:
    """What one layer did in a run: numbers of denoiser calls, and its map: bytes, ``(B, H, M, N)``, head dim."""

    name: str
    kind: str  # "self" or "cross"
    computed: int = 0
    captured: int = 0
    reused: int = 0
    map_bytes: int = 0
    shape: tuple[int, int, int, int] | None = None
    head_dim: int | None = None


@dataclass
class Report:
    """What ran. `skipped` maps layer names to the reason why they only compute."""

    policy: str
    map_format: str
    steps: int = 0
    layers: list[LayerReport] = field(default_factory=list)
    predicted_bytes: int = 0
    allocated_bytes: int = 0
    skipped: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(title=f"{self.policy}, {self.steps} steps, {self.map_format} maps, {self.allocated_bytes:,} B")
        for column in ("layer", "kind", "computed", "captured", "reused", "map bytes"):
            table.add_column(column, justify="left" if column in ("layer", "kind") else "right")
        for layer in self.layers:
            cells = (layer.name, layer.kind, layer.computed, layer.captured, layer.reused, f"{layer.map_bytes:,}")
            table.add_row(*map(str, cells))
        for name, reason in self.skipped.items():
            table.add_row(name, "", "", "", "", f"skipped: {reason}")
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, file=io.StringIO())
        console.print(self)
        return console.file.getvalue()
