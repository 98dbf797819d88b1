"""Methods judged by their pictures and timed in turns, and the plain steps that each is read against."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from attnreuse.binding.enabling import enable
from attnreuse.binding.layers import NOT_CALLED
from attnreuse.binding.report import LayerReport, Report
from attnreuse.demo import tiny_shapes
from attnreuse.errors import AttnReuseError
from attnreuse.measure.timing import Times, paced, paced_runs
from attnreuse.planning.rows import strip
from attnreuse.progress import Progress, silent
from attnreuse.study import metrics
from attnreuse.study.compare.methods import PLAIN, SAME_NOISE, Method
from attnreuse.study.evaluate import Evaluator
from attnreuse.study.noise import NoisePath
from attnreuse.study.setting import Setting

SHOWN = 4  # pictures that are kept of each method


@dataclass
class Plain:
    """Plain steps that a method is read against, and how far it lies above them, picture by picture.

    Attributes:
        psnr: their mean, dB.
        gain, gain_ci: mean of the differences, dB, and the half-width of its 95 % confidence interval; None for one
            picture.
    """

    psnr: float
    gain: float
    gain_ci: float | None

    @classmethod
    def of(cls, psnrs: Sequence[float], plain: np.ndarray) -> Plain:
        """Of the PSNRs of a method's pictures, and those of the same pictures with plain steps."""
        gains = np.asarray(psnrs) - plain
        return cls(float(plain.mean()), float(gains.mean()), metrics.half_width(gains) if len(gains) > 1 else None)

    @property
    def is_clear(self) -> bool:
        """Whether the difference is more than pictures differ by; one picture does not tell."""
        return abs(self.gain) > (self.gain_ci or 0)


@dataclass
class Measured:
    """What one method did.

    Attributes:
        map_bytes: of the buffer of one batch, in bytes.
        scores: by metric: the mean, and for "psnr" of more than one picture the half-width of its 95 % confidence
            interval ("psnr_ci").
        pictures: the first ``SHOWN``, ``[P, S, S, 3]`` in [0, 1]; not kept in files.
        psnrs: of each picture, dB; empty for the full run.
        latencies_s: of one batch of pictures, one per round, at the round's pace
            (:func:`attnreuse.measure.timing.paced`).
        maps_computed: share of the full run's attention-map elements that it computed; None where unknown.
        plain: plain steps at its latency; None below all that were measured.
        equal_cost: the plain steps that compute as many maps, as near as step counts allow.
    """

    method: Method
    executed_steps: int
    map_bytes: int
    scores: dict[str, float]
    pictures: Annotated[Any, Field(exclude=True)] = field(default=None, repr=False)
    psnrs: list[float] = field(default_factory=list, repr=False)
    scheduler: str = ""
    latencies_s: list[float] = field(default_factory=list)
    maps_computed: float | None = None
    plain: Plain | None = None
    equal_cost: Plain | None = None

    @property
    def latency_s(self) -> float:
        return float(np.median(self.latencies_s))

    def of_full(self, full: Measured) -> Times:
        """Its time as a share of the full run's of the same round."""
        return Times.of_ratios(self.latencies_s, full.latencies_s)

    def row(self) -> dict[str, Any]:
        """Flat, ready for CSV."""
        m, low_high = self.method, np.percentile(self.latencies_s, [20, 80])
        row = strip(m.policy.reuse) if m.policy and not isinstance(m.policy.reuse, dict) else ""
        return {
            "method": m.name, "family": m.family, "scheduler": self.scheduler, "steps": m.steps,
            "executed_steps": self.executed_steps, "reuse": row, "format": m.map_format,
            "map_bytes": self.map_bytes, "maps_computed": _short(self.maps_computed),
            "latency_s": _short(self.latency_s), "latency_p20_s": _short(low_high[0]),
            "latency_p80_s": _short(low_high[1]),
            **{key: _short(self.scores.get(key)) for key in SCORES},
            "plain_psnr_at_equal_latency": _short(self.plain and self.plain.psnr),
            "plain_psnr_at_equal_cost": _short(self.equal_cost and self.equal_cost.psnr),
        }  # fmt: skip


SCORES = (
    "psnr", "psnr_ci", "ssim", "lpips", "fid", "clip_score", "background", "color", "shape", "relation",
)  # fmt: skip


@contextmanager
def _noted() -> Iterator[None]:
    """Without the warnings that :func:`_unplanned` makes notes of; around many runs, since others are said anew."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"attnreuse: (layer .* computes at|\d+ layers only compute)")
        yield


def measure(
    pipe: Any,
    setting: Setting,
    wanted: list[Method],
    notes: list[str],
    judge: tuple[str, ...],
    rounds: int,
    progress: Progress = silent,
) -> list[Measured]:
    """Judge and time methods in turns, the full run first; `notes` gets what had to be left out."""
    count, of = len(wanted), runs(wanted, rounds)
    rows = judged(pipe, setting, wanted, notes, judge, lambda done, _, now: progress(done, of, now))
    timed(pipe, setting, rows, rounds, lambda done, _, now: progress(count + done, of, now))
    one = Evaluator(pipe, replace(setting, prompts=setting.prompts[:1], steps=1))
    for row in rows:
        row.maps_computed = _maps_computed(one, rows[0], row)
    _at_equal(rows)
    return rows


def runs(wanted: list[Method], rounds: int) -> int:
    """Runs that are judged or timed; plain steps of the same noise are not timed by themselves."""
    return len(wanted) + paced_runs(sum(method.family not in (SAME_NOISE, "full") for method in wanted), rounds)


@_noted()
def judged(
    pipe: Any,
    setting: Setting,
    wanted: list[Method],
    notes: list[str],
    judge: tuple[str, ...],
    progress: Progress = silent,
) -> list[Measured]:
    """The pictures of methods and their scores, the full run first, without times; see :func:`measure`.

    Raises:
        AttnReuseError: a metric needs what is not installed; said before a picture is sampled.
    """
    prompts, path, rows = list(setting.prompts), NoisePath(pipe.scheduler), []
    blank = np.zeros((min(2, len(prompts)), 64, 64, 3), np.float32)
    _scores(blank, blank.copy(), prompts[:2], judge)
    full: np.ndarray | None = None
    for i, method in enumerate(wanted):
        if method.family == SAME_NOISE and not path.is_noisy:
            continue
        progress(i, len(wanted), f"judging {method.name}")
        try:
            row, pictures, unplanned = _sampled(pipe, setting, method, path)
            row.scores, row.psnrs = _scores(pictures, pictures if full is None else full, prompts, judge)
        except AttnReuseError as error:
            if full is None:
                raise
            notes.append(f"{method.name} was left out: {error}")
            continue
        notes += unplanned
        full = pictures if full is None else full
        rows.append(row)
    return rows


@_noted()
def timed(pipe: Any, setting: Setting, rows: list[Measured], rounds: int, progress: Progress = silent) -> None:
    """Add the seconds of one batch in each of `rounds`, all in turns; same noise takes what plain steps take."""
    one_batch = replace(setting, prompts=setting.prompts[: setting.batch])
    called = [row for row in rows if row.method.family != SAME_NOISE]
    of = paced_runs(len(called) - 1, rounds)

    def tell(done: int, i: int) -> None:
        progress(done, of, f"timing {called[i].method.name}, round {done * rounds // of + 1} of {rounds}")

    full, *calls = (functools.partial(_timed, pipe, one_batch, row.method) for row in called)
    for row, seconds in zip(called, paced(full, calls, rounds, tell), strict=True):
        row.latencies_s += seconds
    taken = {row.method.steps: row.latencies_s for row in rows if row.method.family == "plain steps"}
    for row in rows:
        row.latencies_s = taken[row.method.steps] if row.method.family == SAME_NOISE else row.latencies_s


def _sampled(pipe: Any, setting: Setting, method: Method, path: NoisePath) -> tuple[Measured, np.ndarray, list[str]]:
    """A method not yet scored, all its pictures, and notes on its reuse; `path` keeps the full run's noise."""
    evaluator = Evaluator(pipe, _setting_of(setting, method), memo_bytes=0)
    reports: list[Report] = []

    @contextmanager
    def around(start: int) -> Iterator[None]:
        noise = path.recorded(start, method.steps) if method.family == "full" else nullcontext()
        if method.family == SAME_NOISE:
            noise = path.followed(start, method.steps)
        with _applied(pipe, setting, method) as session, noise:
            yield
            if session is not None:
                reports.append(session.report())

    pictures = evaluator.run(around).pictures
    shown = pictures[:SHOWN].copy()
    map_bytes = max((report.allocated_bytes for report in reports), default=0)
    row = Measured(method, evaluator.executed_steps, map_bytes, {}, shown, scheduler=evaluator.scheduler)
    return row, pictures, _unplanned(method, reports)


def _scores(
    pictures: np.ndarray, full: np.ndarray, prompts: list[str], judge: tuple[str, ...]
) -> tuple[dict[str, float], list[float]]:
    """Scores, and the PSNR of each picture to the `full` run's, which has none itself."""
    tiny, scores = tiny_shapes.all_known(prompts), {}
    psnrs = metrics.psnr_each(pictures, full)
    if pictures is full:
        psnrs = psnrs[:0]
    else:
        scores["psnr"] = float(psnrs.mean())
        if len(psnrs) > 1:
            scores["psnr_ci"] = metrics.half_width(psnrs)
        for name in {"ssim", "lpips"} & set(judge):
            scores[name] = float(metrics.PAIRED[name](pictures, full).mean())
        if "fid" in judge and len(pictures) > 1:
            scores["fid"] = metrics.fid(pictures, full, tiny=tiny)
    if "clip" in judge:
        scores["clip_score"] = float(metrics.clip_scores(pictures, prompts, tiny=tiny).mean())
    return scores | (metrics.obedience(pictures, prompts) if tiny else {}), psnrs.tolist()


def _unplanned(method: Method, reports: list[Report]) -> list[str]:
    """Notes on layers that computed where the policy meant to reuse or hold, in any batch."""
    layers = {(layer.name, reason) for report in reports for layer in report.layers for reason in _reasons(layer)}
    counts = Counter(reason for _, reason in sorted(layers))
    return [
        f"{method.name}: {count} layer{'s' if count > 1 else ''} computed instead of reusing: {reason}"
        for reason, count in counts.items()
    ]


def _reasons(layer: LayerReport) -> set[str]:
    cached = layer.planned["reused"] + layer.planned["held"]
    return set(layer.reasons) - {NOT_CALLED} if cached else set()


def _timed(pipe: Any, setting: Setting, method: Method) -> float:
    evaluator = Evaluator(pipe, _setting_of(setting, method), memo_bytes=0)
    return evaluator.run(lambda start: _applied(pipe, setting, method)).seconds


def _setting_of(setting: Setting, method: Method) -> Setting:
    guidance = setting.guidance if method.guidance is None else method.guidance
    return replace(setting, steps=method.steps, guidance=guidance)


@contextmanager
def _applied(pipe: Any, setting: Setting, method: Method) -> Iterator[Any]:
    """The pipeline as the method wants it; gives the reuse session, if any."""
    with nullcontext() if method.around is None else method.around(pipe):
        if method.policy is None:
            yield None
            return
        with enable(pipe, method.policy, map_format=method.map_format, layers=setting.layers) as session:
            yield session


def _maps_computed(one: Evaluator, full: Measured, row: Measured) -> float | None:
    """Share of the full run's map elements; None for methods that do not say. `one` knows the layers."""
    if row.method.around is not None:
        return None
    share, policy = row.executed_steps / full.executed_steps, row.method.policy
    if policy is None:
        return share
    sizes = one.map_sizes(policy)
    reused = sum(size * sum(map(bool, policy.row(name))) for name, size in sizes.items())
    return share * (1 - reused / (sum(sizes.values()) * policy.steps))


def at_time(measured: Iterable[tuple[float, Sequence[float]]], time: float) -> np.ndarray | None:
    """The PSNRs ``[P]`` of pictures at a time, by interpolation between (time, PSNRs); None below all of them.

    More time can be worse: from each on, the best mean so far counts.
    """
    measured = sorted(measured, key=lambda pair: (pair[0], -np.mean(pair[1])))
    if not measured or time < measured[0][0]:
        return None
    times, psnrs = zip(*measured, strict=True)
    best = list(itertools.accumulate(psnrs, lambda a, b: max(a, b, key=np.mean)))
    return np.array([np.interp(time, times, of_picture) for of_picture in np.transpose(best)])


def _at_equal(rows: list[Measured]) -> None:
    """Tell each row the plain steps at its latency and at its count of maps."""
    plain = [r for r in rows if r.method.family in PLAIN]
    if len(plain) < 2:
        return
    calls = rows[0].executed_steps
    for row in rows[1:]:
        if row.method.family in PLAIN:
            continue
        time = row.of_full(rows[0]).median
        psnrs = at_time([(r.of_full(rows[0]).median, r.psnrs) for r in plain], time) if time <= 1 else None
        row.plain = None if psnrs is None else Plain.of(row.psnrs, psnrs)
        if row.maps_computed is not None:
            off = {id(r): abs(r.executed_steps - calls * row.maps_computed) for r in plain}
            as_costly = [r.psnrs for r in plain if off[id(r)] == min(off.values()) <= 1]
            row.equal_cost = Plain.of(row.psnrs, np.array(max(as_costly, key=np.mean))) if as_costly else None


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
