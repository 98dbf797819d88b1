"""How long work tells what it does, and how many of what it counted."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with the parts done, of at most how many, and what runs now or was found."""

    def __call__(self, done: int, of: int, now: str, *, unit: str = "") -> None:
        """`unit`: what is counted for a while, instead of what the whole work counts."""


def silent(done: int, of: int, now: str, *, unit: str = "") -> None:
    """Tell nobody."""


def counted(count: int, noun: str) -> str:
    """A number with its noun: "1 step", "2 steps"."""
    return f"{count} {noun}{'s' * (count != 1)}"
