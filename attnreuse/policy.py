"""Policies: which executed steps (and layers) reuse their maps. Plain data; no tensors here.

A policy says only "reuse or not"; what a layer does at a step follows from it: reuse, capture (the
next step reuses, so the map must be written) or compute (exact fused attention, nothing written).
"""

from __future__ import annotations

import fnmatch
import itertools
import json
from collections.abc import Iterable
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

FILE = "policy.json"  # its name in a hub repository
SHIPPED = Path(__file__).parent / "policies"  # found by `attnreuse search` for the shipped pipeline


class Action(str, Enum):
    """What a layer does at a step."""

    COMPUTE = "compute"
    CAPTURE = "capture"
    REUSE = "reuse"


def _library_version() -> str:
    try:
        return version("attnreuse")
    except PackageNotFoundError:
        return "unknown"


class Policy(BaseModel):
    """Which of a run's executed steps reuse attention maps.

    Attributes:
        steps: executed denoiser steps of the run. Heun executes ``2 N - 1`` of them, PNDM ``N + 1``,
            img2img fewer than asked for: see ``attnreuse plan``.
        reuse: one boolean per step, for every layer; or such a row per layer-name pattern
            (``fnmatch``; the first that matches counts, a layer none matches never reuses).
            The first step never reuses.
        model, scheduler, resolution, map_format: what it was made for, where that matters. A run
            with another scheduler or model warns (or raises, under ``strict``).
        metrics: measured figures, by name, such as ``{"psnr_db": 38.2}``.
        library_version: of attnreuse, at the time of making.
        version: of the file's layout.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(ge=1)
    reuse: tuple[bool, ...] | dict[str, tuple[bool, ...]]
    name: str = "policy"
    model: str | None = None
    scheduler: str | None = None
    resolution: tuple[int, int] | None = None
    map_format: str | None = None
    metrics: dict[str, float] = {}
    library_version: str = Field(default_factory=_library_version)
    version: Literal[1] = 1

    @field_validator("reuse", mode="before")
    @classmethod
    def _booleans(cls, value: Any) -> Any:
        """Accept lists and 0/1; refuse anything else, which pydantic would coerce."""
        rows = value.values() if isinstance(value, dict) else [value]
        for row in rows:
            if isinstance(row, str) or any(v not in (0, 1) for v in row):
                raise ValueError(f"reuse must hold booleans, got {row!r}")
        return value

    @model_validator(mode="after")
    def _rows_fit(self) -> Policy:
        for pattern, row in self._rows().items():
            if len(row) != self.steps:
                raise ValueError(f"reuse[{pattern!r}] must have {self.steps} entries like steps, got {len(row)}")
            if row[0]:
                raise ValueError(f"reuse[{pattern!r}] must not reuse at the first step: there is no map yet")
        return self

    def _rows(self) -> dict[str, tuple[bool, ...]]:
        return self.reuse if isinstance(self.reuse, dict) else {"*": self.reuse}

    def row(self, layer: str) -> tuple[bool, ...]:
        """Per step: does `layer` reuse?"""
        for pattern, row in self._rows().items():
            if fnmatch.fnmatchcase(layer, pattern):
                return row
        return (False,) * self.steps

    def actions(self, layer: str) -> list[Action]:
        """Per step: what `layer` does."""
        row = (*self.row(layer), False)
        return [
            Action.REUSE if now else Action.CAPTURE if then else Action.COMPUTE for now, then in itertools.pairwise(row)
        ]

    @property
    def reuse_steps(self) -> int:
        """Steps at which at least one layer reuses."""
        return sum(map(any, zip(*self._rows().values(), strict=True)))

    def __str__(self) -> str:
        rows = self._rows()
        strips = {p: strip(row) for p, row in rows.items()}
        return f"{self.name} " + (strips["*"] if set(rows) == {"*"} else str(strips))

    def save(self, path: str | Path) -> None:
        """Write the policy as JSON."""
        Path(path).write_text(self.model_dump_json(indent=2, exclude_none=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Read a policy file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a policy; the message says which field is wrong and how.
        """
        try:
            return cls.model_validate(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
            raise ValueError(f"{path} is not a policy file: {wrong}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a policy file: {error}") from None

    @classmethod
    def from_hub(cls, repo_id: str, revision: str | None = None) -> Policy:
        """Download ``policy.json`` of a Hugging Face model repository and read it."""
        from huggingface_hub import hf_hub_download

        return cls.load(hf_hub_download(repo_id, FILE, revision=revision))

    def push_to_hub(self, repo_id: str, private: bool = False) -> str:
        """Upload as ``policy.json``; makes the repository if need be and returns the commit's URL."""
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        data = self.model_dump_json(indent=2, exclude_none=True).encode()
        return str(api.upload_file(path_or_fileobj=data, path_in_repo=FILE, repo_id=repo_id))


def strip(row: Iterable[bool]) -> str:
    """A row as text: "R" where a step reuses, "." where it does not."""
    return "".join(".R"[reuse] for reuse in row)


def trades(row: tuple[bool, ...]) -> list[tuple[bool, ...]]:
    """The rows in which one reuse step and one computed step (not the first) trade places: Hamming distance two."""
    on = [i for i, reuse in enumerate(row) if reuse]
    off = [i for i, reuse in enumerate(row) if not reuse and i > 0]
    return [tuple(r != (k in pair) for k, r in enumerate(row)) for pair in itertools.product(on, off)]


def load_policy(source: Policy | str | Path) -> Policy:
    """A policy as it is, from a file, or by the name of a hub repository."""
    if isinstance(source, Policy):
        return source
    is_file = isinstance(source, Path) or source.endswith(".json") or Path(source).exists()
    return Policy.load(source) if is_file else Policy.from_hub(source)


def shipped_policies(scheduler: str | None = None, steps: int | None = None) -> list[Policy]:
    """Policies found for the shipped pipeline, of a scheduler (its class) and a number of executed steps."""
    found = [Policy.load(path) for path in sorted(SHIPPED.glob("*.json"))]
    return [p for p in found if scheduler in (None, p.scheduler) and steps in (None, p.steps)]


def hurry(steps: int, reuse: int, max_age: int | Literal["least"] | None = "least") -> Policy:
    """Reuse at the latest possible steps: a perturbation made late has less time to grow.

    Args:
        steps: executed steps of the run.
        reuse: how many of them reuse.
        max_age: how many steps old a reused map may be. "least": as few as leave room for `reuse`, since
            age costs more than lateness gains (README, "Find a schedule"). None: one late block, the paper's
            heuristic, which captures once instead of before every reuse. 1: every reuse follows a
            computed step.

    Raises:
        ValueError: more reuses than fit.

    Source: arXiv 2401.01008; ``max_age`` is ours.
    """
    if max_age == "least":
        max_age = next((age for age in range(1, steps) if reuse <= room_for(steps, age)), steps)
    age = steps if max_age is None else max_age
    if age < 1:
        raise ValueError(f"max_age must be at least 1, got {max_age}")
    room = room_for(steps, age)
    if not 0 <= reuse <= room:
        limit = "" if age >= steps else f" with max_age {max_age}"
        raise ValueError(f"reuse must be between 0 and {room} for {steps} steps{limit}, got {reuse}")
    row = [False] * steps
    step, left = steps - 1, reuse
    while left:
        row[step] = (steps - 1 - step) % (age + 1) != age
        left -= row[step]
        step -= 1
    return Policy(steps=steps, reuse=row, name=f"hurry({steps},{reuse},max_age={max_age})")


def room_for(steps: int, age: int) -> int:
    """Most steps that can reuse maps at most `age` steps old."""
    return steps - -(-steps // (age + 1))


def periodic(steps: int, interval: int) -> Policy:
    """Compute every `interval`-th step, starting with the first, and reuse at the others."""
    if interval < 1:
        raise ValueError(f"interval must be at least 1, got {interval}")
    row = [step % interval != 0 for step in range(steps)]
    return Policy(steps=steps, reuse=row, name=f"periodic({steps},{interval})")
