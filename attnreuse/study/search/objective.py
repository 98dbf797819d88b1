"""What a search seeks, and what it found."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import computed_field

from attnreuse.errors import check_finite
from attnreuse.policy import Policy
from attnreuse.results import Result
from attnreuse.study.evaluate import Calls
from attnreuse.study.metrics import HIGHER_IS_BETTER

Scores = dict[str, float]
Value = tuple[int, float]  # larger is better


@dataclass(frozen=True)
class Objective:
    """Best mean `metric`; or, with a `floor` for it, the fastest schedule that keeps above.

    Attributes:
        metric: "psnr" (dB), "ssim" or "lpips".
        floor: worst acceptable metric; then the predicted seconds of a run are minimised.
        memory_budget: most bytes of maps.
    """

    metric: str = "psnr"
    floor: float | None = None
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        if self.metric not in HIGHER_IS_BETTER:
            raise ValueError(f"metric must be one of {', '.join(HIGHER_IS_BETTER)}, got {self.metric!r}")
        check_finite(floor=self.floor)

    def quality(self, scores: Scores) -> float:
        """The metric, signed so that larger is better."""
        return scores[self.metric] * (1 if HIGHER_IS_BETTER[self.metric] else -1)

    def value(self, scores: Scores, seconds: float) -> Value:
        """Schedules below the floor rank by quality, below all others."""
        if self.floor is None:
            return 1, self.quality(scores)
        return (1, -seconds) if self.reaches(scores[self.metric]) else (0, self.quality(scores))

    @property
    def unit(self) -> str:
        """Of the metric; nothing where it has none."""
        return "dB" if self.metric == "psnr" else ""

    def shown(self, value: float) -> str:
        """The metric's name and this value of it, with its unit."""
        return f"{self.metric.upper()} {value:.4g} {self.unit}".rstrip()

    def reaches(self, value: float) -> bool:
        """Is this metric as good as the floor, if there is one?"""
        return self.floor is None or self.quality({self.metric: value}) >= self.quality({self.metric: self.floor})


class Improvement(Result):
    """An improvement: after how many evaluations, to which row, with which metric."""

    evaluations: int
    reuse: str
    metric: float


class SearchResult(Result):
    """What a search found.

    Attributes:
        policy: the best, with its metrics on the search's pictures.
        start: metric of the first schedule, where the search began.
        history: improvements, in order.
        evaluations: distinct schedules judged, those read from the cache included.
        stopped: "local optimum", "budget", "patience" or "all evaluated".
        calls: schedules judged now, not read from the cache, and denoiser calls asked for and made.
        scores: metric of every schedule judged, by its row ("..RR").
    """

    policy: Policy
    start: float
    history: list[Improvement]
    evaluations: int
    stopped: str
    calls: Calls
    scores: dict[str, float]

    @computed_field
    @property
    def calls_saved(self) -> float:
        """Share of the denoiser calls that was replayed instead."""
        return self.calls.saved
