"""What attnreuse raises beyond ValueError and TypeError; and a check that options share."""

from __future__ import annotations

import math


class AttnReuseError(RuntimeError):
    """Base of the library's own errors."""


class UnsupportedLayerError(AttnReuseError):
    """A layer, processor or model that attnreuse cannot serve."""


class PolicyMismatchError(AttnReuseError):
    """A policy that does not fit the run: other step count, scheduler, model or layers."""


class MemoryBudgetError(AttnReuseError):
    """A memory budget in which not even one layer's map fits."""


class StaleMapError(AttnReuseError):
    """Under ``strict``: a layer holds no map of this run that it could reuse, where its policy reuses."""


class UnknownStepError(AttnReuseError):
    """Under ``strict``: which step a denoiser call belongs to cannot be told."""


def check_finite(**given: float | None) -> None:
    """Refuse infinities and NaN, by the name of their argument; None is an argument left out.

    Raises:
        ValueError: one of them.
    """
    for name, number in given.items():
        if number is not None and not math.isfinite(number):
            raise ValueError(f"{name} must be a finite number, got {number}")
