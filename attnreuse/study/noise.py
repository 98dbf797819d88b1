"""The noise of a stochastic sampler, held fixed between step counts.

Such a sampler draws fresh noise at each step, so a run of fewer steps gets other noise, and ends in another
picture whatever its steps are worth. A step from SNR ``a`` to SNR ``b`` keeps ``sqrt(a / b)`` of the sample's noise
and makes up the rest, so over a run the noise is ``B(SNR) / sqrt(SNR)`` of a Brownian motion B. Here the draws of
one run are taken as the increments of B. A run of other steps gets the increments of the same motion over its own
intervals: each is standard normal, as the sampler expects, and both runs follow one path of noise.
"""

from __future__ import annotations

import copy
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from attnreuse.errors import AttnReuseError
from attnreuse.planning.levels import noise_levels


class NoisePath:
    """The noise of one run of a pipeline's scheduler, for other runs to follow.

    Args:
        scheduler: one that draws its noise by diffusers' ``randn_tensor``, at most once a denoiser call.
    """

    def __init__(self, scheduler: Any):
        self.scheduler, self.steps = scheduler, 0
        self.draws: dict[int, list[Tensor]] = {}  # by batch, in the order of the steps

    @property
    def is_noisy(self) -> bool:
        """Whether the recorded run drew any noise."""
        return any(self.draws.values())

    @contextmanager
    def recorded(self, batch: int, steps: int) -> Iterator[None]:
        """Within, what a run of `steps` draws for the pictures of `batch` is kept."""
        self.steps = steps
        kept = self.draws[batch] = []

        def record(draw: Callable[[], Tensor]) -> Tensor:
            kept.append(draw())
            return kept[-1].clone()

        with self._drawing(record):
            yield

    @contextmanager
    def followed(self, batch: int, steps: int) -> Iterator[None]:
        """Within, a run of `steps` gets the noise of the recorded path.

        Raises:
            AttnReuseError: the recorded run did not draw once a denoiser call.
        """
        noise = iter(self._increments(batch, _ends(self.scheduler, steps)))
        with self._drawing(lambda draw: next(noise)):
            yield

    def _increments(self, batch: int, ends: list[float]) -> list[Tensor]:
        """Standard normal noise for each interval between `ends` (SNR, rising), along the recorded path."""
        draws, recorded = self.draws[batch], _ends(self.scheduler, self.steps)
        if not len(recorded) - 2 <= len(draws) < len(recorded):
            raise AttnReuseError(
                f"the noise of {type(self.scheduler).__name__} cannot be held fixed: it drew {len(draws)} times in "
                f"{len(recorded) - 1} denoiser calls"
            )
        g = torch.Generator().manual_seed(batch)

        def fresh() -> Tensor:
            return torch.randn(draws[0].shape, generator=g).to(draws[0])

        path, at = {}, torch.zeros_like(draws[0])  # the motion, by SNR
        points = sorted({*ends, *recorded})
        for (low, high), draw in zip(itertools.pairwise(recorded), draws, strict=False):
            end = at + math.sqrt(high - low) * draw
            path[low], here = at, low
            for cut in [p for p in points if low < p < high]:  # a Brownian bridge from `here` to the interval's end
                share, spread = (cut - here) / (high - here), (cut - here) * (high - cut) / (high - here)
                at = at + share * (end - at) + math.sqrt(spread) * fresh()
                path[cut], here = at, cut
            at = path[high] = end
        first, last = min(path), max(path)
        for before, point in itertools.pairwise([last, *(p for p in points if p > last)]):
            path[point] = path[before] + math.sqrt(point - before) * fresh()
        for after, point in itertools.pairwise([first, *sorted((p for p in points if p < first), reverse=True)]):
            path[point] = path[after] - math.sqrt(after - point) * fresh()
        return [(path[high] - path[low]) / math.sqrt(high - low) for low, high in itertools.pairwise(ends)]

    @contextmanager
    def _drawing(self, answer: Callable[[Callable[[], Tensor]], Tensor]) -> Iterator[None]:
        """Within, `answer` gives what the scheduler draws; it is handed the real draw."""
        module = sys.modules[type(self.scheduler).__module__]
        real = getattr(module, "randn_tensor", None)
        if real is None:  # it draws nothing
            yield
            return
        module.randn_tensor = lambda *args, **kwargs: answer(lambda: real(*args, **kwargs))
        try:
            yield
        finally:
            module.randn_tensor = real


def _ends(scheduler: Any, steps: int) -> list[float]:
    """Where the intervals of a run's steps end, as rising SNR: at its calls, and once after them."""
    twin = copy.deepcopy(scheduler)
    twin.set_timesteps(steps)
    levels = noise_levels(twin)
    if any(b <= a for a, b in itertools.pairwise(levels)):
        raise AttnReuseError(f"the noise of {type(scheduler).__name__} cannot be held fixed: its levels do not rise")
    return [math.exp(level) for level in (*levels, levels[-1] + 1)]  # after the last call no noise is added
