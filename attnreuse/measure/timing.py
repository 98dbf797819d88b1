"""Timing side by side: calls taken in turns on one device, so that their ratios can be trusted."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

FLUSH_BYTES = 512 << 20  # more than any GPU's L2; writing them takes longer than the host takes to launch a call


@dataclass(frozen=True)
class Times:
    """Seconds of one call: median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, seconds: list[float]) -> Times:
        """Summary of measured seconds."""
        if len(seconds) == 1:
            return cls(*seconds * 3)
        fifths = statistics.quantiles(seconds, n=5, method="inclusive")
        return cls(statistics.median(seconds), fifths[0], fifths[3])


def interleaved(calls: list[Callable[[], Any]], device: torch.device, repeats: int) -> list[Times]:
    """Time `calls` in turns, `repeats` rounds after a warm-up.

    On CUDA by events, each call after the L2 cache is overwritten (so that it finds no input there, and its
    launch is hidden), and the host waits only at the end; elsewhere by the clock.
    """
    with torch.no_grad():
        for call in calls:
            call()
        rounds = _by_events(calls, device, repeats) if device.type == "cuda" else _by_clock(calls, repeats)
    return [Times.of(list(seconds)) for seconds in zip(*rounds, strict=True)]


def stopwatch(device: torch.device) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """Two functions: one marks now, in the order of the device's work; one gives the seconds between two marks."""
    if device.type != "cuda":
        return time.perf_counter, lambda begin, end: end - begin

    def mark() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def between(begin: Any, end: Any) -> float:
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return mark, between


def _by_clock(calls: list[Callable[[], Any]], repeats: int) -> list[list[float]]:
    rounds = []
    for _ in range(repeats):
        taken = []
        for call in calls:
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        rounds.append(taken)
    return rounds


def _by_events(calls: list[Callable[[], Any]], device: torch.device, repeats: int) -> list[list[float]]:
    with torch.cuda.device(device):
        flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
        events = []
        for _ in range(repeats):
            for call in calls:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                flush.zero_()
                start.record()
                call()
                end.record()
                events.append((start, end))
        torch.cuda.synchronize(device)
    seconds = [start.elapsed_time(end) / 1e3 for start, end in events]
    return [seconds[i : i + len(calls)] for i in range(0, len(seconds), len(calls))]
