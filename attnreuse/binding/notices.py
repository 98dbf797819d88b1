"""What a session says of what does not go as the policy says."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass

from attnreuse.binding.run import Run
from attnreuse.errors import AttnReuseError, UnsupportedLayerError

INSIDE = ("attnreuse", "torch", "diffusers", "contextlib", "accelerate")  # packages between us and the user's line


@dataclass(frozen=True)
class Notices:
    """Warnings, at the user's line; errors instead, where `strict` and something does not go as the policy says."""

    strict: bool

    def complain(self, error: AttnReuseError, more: str = "") -> None:
        """Something does not go as the policy says: an error under `strict`, else a warning, which says `more`."""
        if self.strict:
            raise error
        self.warn(f"{error}{more}")

    def warn(self, message: str) -> None:
        """Say so, whatever `strict` is."""
        level, frame = 1, sys._getframe(0)
        while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in INSIDE:
            level, frame = level + 1, frame.f_back
        warnings.warn(f"attnreuse: {message}", stacklevel=level)

    def only_compute(self, run: Run, reasons: dict[str, str], asked_for: bool = False) -> None:
        """Report layers that only compute in this run, and warn of those that would have reused.

        An error under `strict` unless `asked_for`.
        """
        new = {name: reason for name, reason in reasons.items() if run.report.skipped.get(name) != reason}
        unplanned = [name for name in new if run.schedule.reuses(name)]
        if unplanned:
            message = f"{len(unplanned)} layers only compute, such as {unplanned[0]}: {new[unplanned[0]]}"
            self.warn(message) if asked_for else self.complain(UnsupportedLayerError(message))
        run.report.skipped.update(new)
