"""Every n-th step computes, the others reuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

from pydantic import Field

from attnreuse.planning.policy import Policy
from attnreuse.planning.rows import Influence
from attnreuse.planning.rules import Rule


class Periodic(Rule):
    """Compute every `interval`-th step, starting with the first, and reuse at the others."""

    rule: Literal["periodic"] = "periodic"
    interval: int = Field(ge=1, strict=True)

    @property
    def name(self) -> str:
        return f"periodic(interval={self.interval})"

    def resolve(self, steps: int, levels: Sequence[float] | None = None, influence: Influence | None = None) -> Policy:
        row = [step % self.interval != 0 for step in range(steps)]
        return Policy(steps=steps, reuse=row, name=self.name, levels=levels)


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
