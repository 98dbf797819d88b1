"""Policies: which executed steps (and layers) reuse their maps; rules: how a run's policy is made. No tensors here.

A policy says only "compute, reuse or hold"; what a layer does at a step follows from it: reuse the map, hold
the output of the step before, capture (a later step reuses, so the map must be written) or compute (exact
fused attention, no map written).
A policy is for one number of executed steps. A rule has none: at the start of each run it makes a policy
from the noise levels (log-SNR) of the run's denoiser calls.
"""

from __future__ import annotations

import fnmatch
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, overload

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from attnreuse.hub import is_online
from attnreuse.planning.rows import Row, best_row, count_of, holding, level_error, parse, room_for, stretched, strip

FILE = "policy.json"  # its name in a hub repository
SHIPPED = Path(__file__).parent / "assets" / "policies"  # found by `attnreuse search` for the shipped pipeline


class Action(str, Enum):
    """What a layer does at a step."""

    COMPUTE = "compute"
    CAPTURE = "capture"
    REUSE = "reuse"
    HOLD = "hold"


def _library_version() -> str:
    try:
        return version("attnreuse")
    except PackageNotFoundError:
        return "unknown"


class _Saved(BaseModel):
    """Plain data that is kept as a JSON file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.model_dump_json() == other.model_dump_json()

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    def save(self, path: str | Path) -> None:
        """Write the policy as JSON."""
        Path(path).write_text(self.model_dump_json(indent=2, exclude_none=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that holds such a policy or rule.

        Raises:
            FileNotFoundError: no such file.
            ValueError: something else; the message says which field is wrong and how.
        """
        with _as_policy_file(path):
            return cls.model_validate(json.loads(Path(path).read_text(encoding="utf-8")))

    @classmethod
    def from_hub(cls, repo_id: str, revision: str | None = None) -> Self:
        """Download ``policy.json`` of a Hugging Face model repository and read it."""
        return cls.load(_download(repo_id, revision))

    def push_to_hub(self, repo_id: str, private: bool = False) -> str:
        """Upload as ``policy.json``; makes the repository if need be and returns the commit's URL."""
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        data = self.model_dump_json(indent=2, exclude_none=True).encode()
        return str(api.upload_file(path_or_fileobj=data, path_in_repo=FILE, repo_id=repo_id))


class Policy(_Saved):
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
    metrics: dict[str, FiniteFloat] = {}
    library_version: str = Field(default_factory=_library_version)
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
        _check_levels(steps, levels)
        rows = {pattern: stretched(row, steps, self.levels, levels) for pattern, row in self._rows().items()}
        changed = {
            "steps": steps,
            "reuse": rows if isinstance(self.reuse, dict) else rows["*"],
            "levels": None if levels is None else tuple(levels),
            "name": self.name if steps == self.steps else f"{self.name} stretched from {self.steps} steps",
            "metrics": {},
        }
        return Policy.model_validate(self.model_dump() | changed)


def _check_levels(steps: int, levels: Sequence[float] | None) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if levels is not None and (len(levels) != steps or not all(map(math.isfinite, levels))):
        raise ValueError(f"levels must be {steps} finite numbers like steps, got {list(levels)}")


class Rule(_Saved, ABC):
    """A policy for any run: resolved at its start, from its noise levels."""

    library_version: str = Field(default_factory=_library_version)
    version: Literal[1] = 1

    @property
    @abstractmethod
    def name(self) -> str:
        """What reports call it."""

    @property
    def patterns(self) -> list[str]:
        """Layer patterns that it names."""
        return []

    @property
    def uses_levels(self) -> bool:
        """Whether it is resolved from noise levels."""
        return False

    @abstractmethod
    def resolve(
        self, steps: int, levels: Sequence[float] | None = None, influence: Sequence[float] | None = None
    ) -> Policy:
        """The policy for a run of `steps` executed steps.

        Args:
            steps: executed steps.
            levels, influence: of each, its noise level (log-SNR), and how far an error of its output moves the final
                sample (:mod:`attnreuse.planning.levels`).
        """

    def __str__(self) -> str:
        return self.name


class Hurry(Rule):
    """Reuse a share of the steps: those whose map, by noise level and influence, has changed least in effect.

    Attributes:
        reuse: share of the executed steps that reuse, in [0, 1]; half a step goes down.
    """

    rule: Literal["hurry"] = "hurry"
    reuse: float = Field(ge=0, le=1, strict=True)

    @property
    def name(self) -> str:
        return f"hurry(reuse={self.reuse:g})"

    @property
    def uses_levels(self) -> bool:
        return True

    def resolve(
        self, steps: int, levels: Sequence[float] | None = None, influence: Sequence[float] | None = None
    ) -> Policy:
        if levels is None:
            raise ValueError(f"{self.name} needs the noise levels of the steps")
        _check_levels(steps, levels)
        if influence is not None and len(influence) != steps:
            raise ValueError(f"influence must be {steps} numbers like steps, got {len(influence)}")
        row = best_row(steps, count_of(self.reuse, steps), level_error(levels, influence))
        return Policy(steps=steps, reuse=row, name=self.name, levels=levels)


class Periodic(Rule):
    """Compute every `interval`-th step, starting with the first, and reuse at the others."""

    rule: Literal["periodic"] = "periodic"
    interval: int = Field(ge=1, strict=True)

    @property
    def name(self) -> str:
        return f"periodic(interval={self.interval})"

    def resolve(
        self, steps: int, levels: Sequence[float] | None = None, influence: Sequence[float] | None = None
    ) -> Policy:
        row = [step % self.interval != 0 for step in range(steps)]
        return Policy(steps=steps, reuse=row, name=self.name, levels=levels)


class Stretched(Rule):
    """A policy for one number of steps, stretched to any."""

    rule: Literal["stretch"] = "stretch"
    policy: Policy

    @property
    def name(self) -> str:
        return f"{self.policy.name}, stretched"

    @property
    def patterns(self) -> list[str]:
        return self.policy.patterns

    @property
    def uses_levels(self) -> bool:
        return self.policy.levels is not None

    def resolve(
        self, steps: int, levels: Sequence[float] | None = None, influence: Sequence[float] | None = None
    ) -> Policy:
        return self.policy.stretch(steps, levels)


RULES: dict[str, type[Rule]] = {"hurry": Hurry, "periodic": Periodic, "stretch": Stretched}


def load_policy(source: Policy | Rule | str | Path) -> Policy | Rule:
    """A policy or rule as it is, from a file, or by the name of a hub repository.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds neither; the message says what is wrong.
    """
    if isinstance(source, (Policy, Rule)):
        return source
    if not isinstance(source, (str, Path)) or str(source) in ("", *RULES):
        raise ValueError(
            f"policy must be a Policy, a rule such as hurry(reuse=0.5), a file or a hub name, got {source!r}"
        )
    is_file = isinstance(source, Path) or source.endswith(".json") or Path(source).exists()
    path = Path(source if is_file else _download(source))
    if not path.exists():
        raise FileNotFoundError(f"no such policy file: {path}")
    with _as_policy_file(path):
        data = json.loads(path.read_text(encoding="utf-8"))
        rule = data.get("rule") if isinstance(data, dict) else None
        if rule is not None and (not isinstance(rule, str) or rule not in RULES):
            raise ValueError(f"{path} is not a policy file: rule must be one of {', '.join(RULES)}, got {rule!r}")
        return (Policy if rule is None else RULES[rule]).model_validate(data)


@contextmanager
def _as_policy_file(path: str | Path) -> Iterator[None]:
    """Errors of reading `path` say what is wrong with it."""
    try:
        yield
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{path} is not a policy file: {wrong}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a policy file: {error}") from None


def _download(repo_id: str, revision: str | None = None) -> str:
    from huggingface_hub import hf_hub_download

    if repo_id.count("/") != 1 or repo_id.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no such policy file: {repo_id} (a hub name is like user/name)")
    local = not is_online(repo_id, FILE, revision)
    return hf_hub_download(repo_id, FILE, revision=revision, local_files_only=local)


def shipped_policies(scheduler: str | None = None, steps: int | None = None) -> list[Policy]:
    """Policies found for the shipped pipeline, of a scheduler (its class) and a number of executed steps."""
    found = [Policy.load(path) for path in sorted(SHIPPED.glob("*.json"))]
    return [p for p in found if scheduler in (None, p.scheduler) and steps in (None, p.steps)]


@overload
def hurry(steps: int, reuse: int, max_age: int | Literal["least"] | None = "least") -> Policy: ...
@overload
def hurry(*, reuse: float) -> Hurry: ...
def hurry(steps: int | None = None, reuse: float = 0.5, max_age: Any = "least") -> Policy | Hurry:
    """With `steps`, the policy that reuses at the latest possible steps; without, the rule for any run.

    The rule, ``hurry(reuse=0.5)``, goes by noise levels: it reuses that share of a run's executed steps, those
    where the drift of the map, by distance in log-SNR, has least effect on the picture (:class:`Hurry`).

    Args:
        steps: executed steps of the run.
        reuse: how many of them reuse; without `steps` the share of them, in [0, 1].
        max_age: how many steps old a reused map may be. "least": as few as leave room for `reuse`, since
            age costs more than lateness gains (README, "Find a schedule"). None: one late block, the paper's
            heuristic, which captures once instead of before every reuse. 1: every reuse follows a
            computed step.

    Raises:
        ValueError: more reuses than fit, or a share outside [0, 1].

    Source: arXiv 2401.01008; ``max_age`` and the rule are ours.
    """
    if isinstance(reuse, bool) or not isinstance(reuse, (int, float)) or not math.isfinite(reuse):
        raise ValueError(f"reuse must be a number, got {reuse!r}")
    if steps is None:
        if not 0 <= reuse <= 1:
            raise ValueError(f"reuse must be a share in [0, 1] without steps, got {reuse}: hurry(steps, {reuse})?")
        if max_age != "least":
            raise ValueError(f"max_age counts steps, so it needs steps: hurry(steps, reuse, max_age={max_age})")
        return Hurry(reuse=reuse)
    if reuse != int(reuse):
        raise ValueError(f"reuse must be a number of steps beside steps, got {reuse}: hurry(reuse={reuse})?")
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


@overload
def periodic(steps: int, interval: int) -> Policy: ...
@overload
def periodic(*, interval: int) -> Periodic: ...
def periodic(steps: int | None = None, interval: int | None = None) -> Policy | Periodic:
    """Compute every `interval`-th step, starting with the first, and reuse at the others.

    With `steps` executed steps a policy, without them the rule for any run.
    """
    if not isinstance(interval, int) or interval < 1:
        raise ValueError(f"interval must be a whole number, at least 1, got {interval!r}")
    rule = Periodic(interval=interval)
    if steps is None:
        return rule
    return rule.resolve(steps).model_copy(update={"name": f"periodic({steps},{interval})"})
