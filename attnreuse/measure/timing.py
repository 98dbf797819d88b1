"""Timing side by side: calls taken in turns on one device, so that their ratios can be trusted."""

from __future__ import annotations

import ctypes
import itertools
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
PACED = 3  # calls between two of the reference
_kept: list[bool] = []  # what `keep_freed_memory` said
IN_GRAPH = 20  # calls of a graph whose time is told for one
FLUSH_BYTES = 512 << 20  # more than any GPU's L2; reading them takes longer than the host takes to launch a call


@dataclass(frozen=True)
class Times:
    """Median, 20th and 80th percentile of the seconds of one call, or of their ratios to another's."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, seconds: list[float]) -> Times:
        """Summary of what was measured."""
        if len(seconds) == 1:
            return cls(*seconds * 3)
        fifths = statistics.quantiles(seconds, n=5, method="inclusive")
        return cls(statistics.median(seconds), fifths[0], fifths[3])

    @classmethod
    def of_ratios(cls, seconds: list[float], full: list[float]) -> Times:
        """Summary of `seconds` as shares of the full run's of the same round."""
        return cls.of([own / whole for own, whole in zip(seconds, full, strict=True)])


def paced(
    reference: Callable[[], float],
    calls: Sequence[Callable[[], float]],
    rounds: int,
    tell: Callable[[int, int], None] = lambda done, call: None,
) -> list[list[float]]:
    """Seconds of `reference`, then of each of `calls`, in `rounds`, in turns of random order, at each round's pace.

    A shared machine is slower for minutes, and faster again. So the reference runs before and after every ``PACED``
    calls and is taken to change evenly in between; what a call took is told as it were at the median of its round.

    Args:
        reference, calls: give the seconds they took.
        tell: called before each run with how many are done, and which comes (0: the reference).
    """
    order, done, given = random.Random(0), itertools.count(), [[] for _ in (reference, *calls)]

    def run(call: int) -> float:
        tell(next(done), call)
        return calls[call - 1]() if call else reference()

    for _ in range(rounds):
        marks, shares = [run(0)], {}
        turns = order.sample(range(1, len(given)), len(calls))
        for some in (turns[at : at + PACED] for at in range(0, len(turns), PACED)):
            took = {call: run(call) for call in some}
            marks.append(run(0))
            for at, (call, seconds) in enumerate(took.items(), 1):
                later = at / (len(some) + 1)
                shares[call] = seconds / ((1 - later) * marks[-2] + later * marks[-1])
        for call, share in {0: 1.0, **shares}.items():
            given[call].append(share * statistics.median(marks))
    return given


def paced_runs(calls: int, rounds: int) -> int:
    """How many runs :func:`paced` makes."""
    return rounds * (1 + calls + -(-calls // PACED))


def keep_freed_memory() -> bool:
    """Let this process keep the memory that its operators free, where its C library is glibc; whether it does now.

    By default glibc gives large blocks back to the kernel, and each is faulted in anew, page by page: a tenth of a
    denoiser call on a CPU, in some runs and not in others. For processes that measure; for any other, too, that
    samples on a CPU, at the price that its memory does not shrink.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    whole = mallopt(M_MMAP_THRESHOLD, 1 << 30) or mallopt(M_MMAP_MAX, 0)  # before 2.36, thresholds end at 32 MiB
    _kept[:] = [bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1) and whole)]
    return _kept[0]


def keeps_freed_memory() -> bool:
    """Whether :func:`keep_freed_memory` was called here, and could do it."""
    return any(_kept)


def interleaved(calls: list[Callable[[], Any]], device: torch.device, repeats: int) -> list[Times]:
    """Time `calls` in turns, `repeats` rounds after a warm-up.

    On CUDA by events, each call after a large buffer was read: so that the L2 cache holds none of its inputs, nor lines
    that must be written back before others fit, and its launch is hidden. The host waits only at the end. Elsewhere by
    the clock.
    """
    import torch

    with torch.no_grad():
        for call in calls:
            call()
        rounds = _by_events(calls, device, repeats) if device.type == "cuda" else _by_clock(calls, repeats)
    return [Times.of(list(seconds)) for seconds in zip(*rounds, strict=True)]


def sustained(calls: Sequence[Callable[[], Any]], device: torch.device, repeats: int) -> float:
    """Seconds of one of `calls` on CUDA where they follow each other without a gap, in a graph: a median.

    As a model's layers do: clocks are those of steady work, and nothing is flushed between two calls. `calls` in turn
    ought to touch more memory than the L2 cache holds.
    """
    import torch

    with torch.cuda.device(device):
        for call in calls:
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(IN_GRAPH):
                calls[i % len(calls)]()
        mark, between = stopwatch(device)
        marks = [mark()]
        for _ in range(repeats):
            graph.replay()
            marks.append(mark())
        return statistics.median(between(*pair) for pair in itertools.pairwise(marks)) / IN_GRAPH


def stopwatch(device: torch.device) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """Two functions: one marks now, in the order of the device's work; one gives the seconds between two marks."""
    if device.type != "cuda":
        return time.perf_counter, lambda begin, end: end - begin
    import torch

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
    import torch

    with torch.cuda.device(device):
        others = torch.zeros(FLUSH_BYTES // 4, device=device)
        events = []
        for _ in range(repeats):
            for call in calls:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                others.sum()
                start.record()
                call()
                end.record()
                events.append((start, end))
        torch.cuda.synchronize(device)
    seconds = [start.elapsed_time(end) / 1e3 for start, end in events]
    return [seconds[i : i + len(calls)] for i in range(0, len(seconds), len(calls))]
