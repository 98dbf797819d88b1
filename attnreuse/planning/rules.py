"""Rules: how a run's policy is made. A rule has no step count: it is resolved at the start of each run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from attnreuse.planning.policy import Policy, Saved, library_version_here
from attnreuse.planning.rows import Influence


class Rule(Saved, ABC):
    """A policy for any run: resolved at its start, from its noise levels."""

    library_version: str = Field(default_factory=library_version_here)
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
    def resolve(self, steps: int, levels: Sequence[float] | None = None, influence: Influence | None = None) -> Policy:
        """The policy for a run of `steps` executed steps.

        Args:
            steps: executed steps.
            levels, influence: of each, its noise level (log-SNR), and how far an error of its output moves the final
                sample (:mod:`attnreuse.planning.levels`).
        """

    def __str__(self) -> str:
        return self.name


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

    def resolve(self, steps: int, levels: Sequence[float] | None = None, influence: Influence | None = None) -> Policy:
        return self.policy.stretch(steps, levels)
