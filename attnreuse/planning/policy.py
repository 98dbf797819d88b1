"""Policies: which executed steps (and layers) reuse their maps. Plain data, no tensors.

A policy says only "compute, reuse or hold"; what a layer does at a step follows from it: reuse the map, hold
the output of the step before, capture (a later step reuses, so the map must be written) or compute (exact
fused attention, no map written).
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar, Literal

from pydantic import (
    ConfigDict,
    Field,
    FiniteFloat,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)
from typing_extensions import Self

from attnreuse.hub import is_online
from attnreuse.planning.rows import Row, holding, parse, stretched, strip
from attnreuse.results import Result

FILE = "policy.json"  # its name in a hub repository


class Action(str, Enum):
    """What a layer does at a step."""

    COMPUTE = "compute"
    CAPTURE = "capture"
    REUSE = "reuse"
    HOLD = "hold"


def library_version_here() -> str:
    try:
        return version("attnreuse")
    except PackageNotFoundError:
        return "unknown"


class Saved(Result):
    """A policy or rule: one that says the same is the same."""

    model_config = ConfigDict(extra="forbid")
    file_kind: ClassVar[str] = "a policy"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.model_dump_json() == other.model_dump_json()

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @model_serializer(mode="wrap")
    def _without_nothing(self, dump: Any) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if value is not None}

    @classmethod
    def from_hub(cls, repo_id: str, revision: str | None = None) -> Self:
        """Download ``policy.json`` of a Hugging Face model repository and read it."""
        return cls.load(download(repo_id, revision))

    def push_to_hub(self, repo_id: str, private: bool = False) -> str:
        """Upload as ``policy.json``; makes the repository if need be and returns the commit's URL."""
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        data = self.model_dump_json(indent=2).encode()
        return str(api.upload_file(path_or_fileobj=data, path_in_repo=FILE, repo_id=repo_id))


class Policy(Saved):
    """Which of a run's executed steps reuse attention maps.

    Attributes:
        steps: executed denoiser steps of the run. Heun executes ``2 N - 1`` of them, PNDM ``N + 1``,
            img2img fewer than asked for: see ``attnreuse plan``.
        reuse: a row for every layer; or one per layer-name pattern (``fnmatch``; the first that matches
            counts, a layer none matches computes). A row has a value per step: False (compute), True (reuse
            the map) or "H" (hold the output of the step before, for self-attention worse than a map but
            free). Text such as ".R.RH" is a row, too. The first step computes.
        model, scheduler, resolution, map_format: what it was made for, where that matters. A run
            with another scheduler or model warns (or raises, under ``strict``).
        levels: noise level (log-SNR) of each step, where known: what :meth:`stretch` goes by.
        metrics: measured figures, by name, such as ``{"psnr_db": 38.2}``.
        library_version: of attnreuse, at the time of making.
        version: of the file's layout.
    """

    steps: int = Field(ge=1)
    reuse: Row | dict[str, Row]
    name: str = "policy"
    model: str | None = None
    scheduler: str | None = None
    resolution: tuple[int, int] | None = None
    map_format: str | None = None
    levels: tuple[FiniteFloat, ...] | None = None
    metrics: dict[str, FiniteFloat] = Field(default_factory=dict)
    library_version: str = Field(default_factory=library_version_here)
    version: Literal[1, 2] = 2

    @field_validator("reuse", mode="before")
    @classmethod
    def _parsed(cls, value: Any) -> Any:
        """Accept text, lists and 0/1; refuse anything else, which pydantic would coerce."""
        return {pattern: parse(row) for pattern, row in value.items()} if isinstance(value, dict) else parse(value)

    @field_serializer("reuse")
    def _as_text(self, value: Any) -> Any:
        return {pattern: strip(row) for pattern, row in value.items()} if isinstance(value, dict) else strip(value)

    @field_validator("version", mode="after")
    @classmethod
    def _newest(cls, value: int) -> int:
        """Files of version 1, whose rows are lists of booleans, are read as those of version 2."""
        return 2

    @model_validator(mode="after")
    def _rows_fit(self) -> Policy:
        for pattern, row in self._rows().items():
            if len(row) != self.steps:
                raise ValueError(f"reuse[{pattern!r}] must have {self.steps} entries like steps, got {len(row)}")
            if row[0]:
                raise ValueError(f"reuse[{pattern!r}] must compute at the first step: there is no map yet")
        if self.levels is not None and len(self.levels) != self.steps:
            raise ValueError(f"levels must have {self.steps} entries like steps, got {len(self.levels)}")
        return self

    def _rows(self) -> dict[str, Row]:
        return self.reuse if isinstance(self.reuse, dict) else {"*": self.reuse}

    @property
    def patterns(self) -> list[str]:
        """Layer patterns that it names."""
        return list(self.reuse) if isinstance(self.reuse, dict) else []

    def row(self, layer: str) -> Row:
        """Per step: does `layer` reuse (True), or hold ("H")?"""
        for pattern, row in self._rows().items():
            if fnmatch.fnmatchcase(layer, pattern):
                return row
        return (False,) * self.steps

    def actions(self, layer: str, hold: bool = False) -> list[Action]:
        """Per step: what `layer` does; with `hold`, it holds its output wherever the policy says reuse."""
        row = holding(self.row(layer)) if hold else self.row(layer)
        actions, reused = [], False
        for step in reversed(row):
            if step:
                actions.append(Action.HOLD if step == "H" else Action.REUSE)
                reused = reused or step is True
            else:
                actions.append(Action.CAPTURE if reused else Action.COMPUTE)
                reused = False
        return actions[::-1]

    @property
    def reuse_steps(self) -> int:
        """Steps at which at least one layer reuses or holds."""
        return sum(map(any, zip(*self._rows().values(), strict=True)))

    def __str__(self) -> str:
        rows = self._rows()
        strips = {p: strip(row) for p, row in rows.items()}
        return f"{self.name} " + (strips["*"] if set(rows) == {"*"} else str(strips))

    def stretch(self, steps: int, levels: Sequence[float] | None = None) -> Policy:
        """This policy for a run of other steps: as much is reused around each noise level as here.

        Args:
            steps: executed steps of the run.
            levels: their noise levels (log-SNR). Without them, or where the policy does not know its own, steps
                are taken to lie evenly.
        """
        check_steps(steps, levels)
        rows = {pattern: stretched(row, steps, self.levels, levels) for pattern, row in self._rows().items()}
        changed = {
            "steps": steps,
            "reuse": rows if isinstance(self.reuse, dict) else rows["*"],
            "levels": None if levels is None else tuple(levels),
            "name": self.name if steps == self.steps else f"{self.name} stretched from {self.steps} steps",
            "metrics": {},
        }
        return Policy.model_validate(self.model_dump() | changed)


def check_steps(steps: int, levels: Sequence[float] | None) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if levels is not None and (len(levels) != steps or not all(map(math.isfinite, levels))):
        raise ValueError(f"levels must be {steps} finite numbers like steps, got {list(levels)}")


def download(repo_id: str, revision: str | None = None) -> str:
    """Path of a hub repository's ``policy.json``."""

    from huggingface_hub import hf_hub_download

    if repo_id.count("/") != 1 or repo_id.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no such policy file: {repo_id} (a hub name is like user/name)")
    local = not is_online(repo_id, FILE, revision)
    return hf_hub_download(repo_id, FILE, revision=revision, local_files_only=local)
