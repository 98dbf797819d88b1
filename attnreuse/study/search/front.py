"""What a search of the ladder found: the front of time and PSNR, and which of its points to take."""

from __future__ import annotations

from typing import ClassVar, Literal

from attnreuse.errors import AttnReuseError, check_finite
from attnreuse.policy import Policy
from attnreuse.results import Result


class Point(Result):
    """A joint schedule of a run of `steps` (``num_inference_steps``).

    Attributes:
        time: as a share of the full run's; see :class:`Front`.
        psnr_db: measured, the mean, against the full run's pictures.
    """

    policy: Policy
    steps: int
    time: float
    psnr_db: float


class Front(Result):
    """What a search of the ladder found.

    Attributes:
        points: schedules that no judged one beats in time and PSNR, fastest first.
        full_s: predicted seconds of one batch with every step computed.
        evaluations: distinct schedules judged, those read from the cache included.
        pictures: over which the points' PSNR are means: those that confirm, else those of the search.
        times: "predicted" from costs; or "fitted": moved by the line that leads the predictions of the confirmed points
            to what they took, measured in turns with the full run. Files of earlier searches say "measured": each by
            its own runs.
        stopped: "budget", "time", or "nothing new" where no change of the front was left to judge.
    """

    file_kind: ClassVar[str] = "a front"
    points: list[Point]
    full_s: float
    evaluations: int
    pictures: int
    stopped: str
    times: Literal["predicted", "fitted", "measured"] = "predicted"

    def pick(self, floor: float | None = None, time: float | None = None) -> Point:
        """The fastest point of at least `floor` dB; without a floor the best that takes at most `time`.

        Args:
            floor: dB.
            time: share of the full run's time, also with a floor.

        Raises:
            ValueError: neither is given, or one is no finite number.
            AttnReuseError: there is none; the message says what there is.
        """
        if floor is None and time is None:
            raise ValueError("say which point to pick: by floor (dB) or time (share of the full run's)")
        check_finite(floor=floor, time=time)
        if not self.points:
            raise AttnReuseError(f"none of {self.evaluations} schedules is predicted to be faster than full steps here")
        points = [p for p in self.points if (floor is None or p.psnr_db >= floor) and (time is None or p.time <= time)]
        if not points:
            first, last = self.points[0], self.points[-1]
            wanted = [] if floor is None else [f"at least {floor:g} dB"]
            wanted += [] if time is None else [f"at most {time:g} of the full run's time"]
            raise AttnReuseError(
                f"none of {self.evaluations} schedules has {' and '.join(wanted)}: they go from "
                f"{first.psnr_db:.1f} dB at {first.time:.2f} of the full run's time to {last.psnr_db:.1f} dB at "
                f"{last.time:.2f}"
            )
        return points[-1] if floor is None else points[0]
