"""What the steps of a run are: how many, and at which noise levels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from attnreuse.binding import loops
from attnreuse.binding.clock import Place
from attnreuse.planning.levels import influences, noise_levels
from attnreuse.planning.rows import Influence

Told = tuple[tuple[float, ...], Influence | None]  # of each step: noise level, influence


def executed(place: Place, loop: loops.Loop | None) -> int:
    """Denoiser steps that a run beginning at `place` will make."""
    remaining = place.length - place.position
    if loop is None or loop.total is None:
        return remaining if loop is None or loop.timesteps is None else len(loop.timesteps)
    if isinstance(getattr(loop.pipe, "denoising_end", None), float):
        return min(loop.total, remaining)
    asked = getattr(place.scheduler, "num_inference_steps", None)
    order = getattr(place.scheduler, "order", 1)
    cut = asked is not None and loop.total < remaining and loop.total != asked - place.position // order
    return loop.total if cut else remaining


def check_told(place: Place, steps: int) -> bool:
    """Whether `steps` told steps go backwards, the first of which has this place among a scheduler's timesteps.

    Raises:
        ValueError: they are not the whole of what is left of the timesteps.
    """
    backward = place.position == steps - 1 > 0
    if not backward and place.length - place.position != steps:
        raise ValueError(
            f"the timestep of the first of {steps} told steps is number {place.position} of {place.length}, so "
            "the noise levels of the others cannot be told: give a policy with a step count"
        )
    return backward


def levels_from(place: Place, steps: int, backward: bool, schedulers: Callable[[], Iterable[Any]]) -> Told:
    """Noise levels and influences of `steps` steps that begin at `place`.

    Args:
        schedulers: those that may have made the timesteps, likeliest first; asked where `place` knows none.

    Raises:
        ValueError: they cannot be told.
    """
    walk = _levels_of_walk(place, schedulers)
    levels = walk[: place.position + 1][::-1] if backward else walk[place.position :]
    if len(levels) < steps:
        raise ValueError(f"the run has {steps} steps, its timesteps have {len(levels)} noise levels")
    influence = None if backward or place.scheduler is None else influences(place.scheduler)
    if not (influence is None or influence == "even"):
        influence = tuple(influence[place.position :][:steps])
    return tuple(levels[:steps]), influence


def _levels_of_walk(place: Place, schedulers: Callable[[], Iterable[Any]]) -> list[float]:
    if place.scheduler is not None:
        return noise_levels(place.scheduler)
    scheduler = next(filter(None, schedulers()), None)  # the likeliest for timesteps of one's own
    if scheduler is None:
        raise ValueError("no scheduler to read the noise levels from: pass scheduler= to attnreuse.enable")
    return noise_levels(scheduler, place.values)
