"""HURRY: which steps reuse, by a formula, with nothing sampled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

from pydantic import Field

from attnreuse.planning.policy import Policy, check_steps
from attnreuse.planning.rows import Influence, best_row, count_of, level_error, room_for
from attnreuse.planning.rules import Rule


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

    def resolve(self, steps: int, levels: Sequence[float] | None = None, influence: Influence | None = None) -> Policy:
        if levels is None:
            raise ValueError(f"{self.name} needs the noise levels of the steps")
        check_steps(steps, levels)
        if not (influence is None or influence == "even" or len(influence) == steps):
            raise ValueError(f"influence must be {steps} numbers like steps, got {len(influence)}")
        row = best_row(steps, count_of(self.reuse, steps), level_error(levels, influence))
        return Policy(steps=steps, reuse=row, name=self.name, levels=levels)


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
            age costs more than lateness gains (docs/schedules.md). None: one late block, the paper's
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
