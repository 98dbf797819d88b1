"""The main job: full steps, reuse, and the plain steps that should take as long, side by side."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pydantic import ConfigDict, Field, computed_field

from attnreuse.binding.clock import executed_steps
from attnreuse.binding.denoiser import find_denoiser, layer_kinds, model_name, select_layers
from attnreuse.binding.enabling import enable
from attnreuse.binding.report import Report
from attnreuse.measure.environment import environment
from attnreuse.measure.timing import paced, paced_runs
from attnreuse.planning.levels import resolved
from attnreuse.policy import Policy, Rule
from attnreuse.progress import Progress, counted, silent
from attnreuse.results import Result
from attnreuse.study import costs
from attnreuse.study.evaluate import Evaluator
from attnreuse.study.metrics import EQUAL_DB, psnr_each
from attnreuse.study.setting import Setting

MIN_SIDE = 256  # pixels; smaller pictures are enlarged in the sheet
WARM_UP = 4  # steps, in which attention is timed, too
DIFFERENCE = 20  # times that differences from the full steps' pictures are enlarged


class Way(Result):
    """One way to sample: its pictures ``[P, S, S, 3]`` in [0, 1], latencies and PSNR to the baseline's.

    Attributes:
        pictures: not kept in files.
        latencies_s: seconds for all prompts at once, of each round, at the pace of the full runs around it
            (:func:`attnreuse.measure.timing.paced`).
        psnr_db: of each picture, at most ``EQUAL_DB``.
    """

    model_config = ConfigDict(frozen=False)
    label: str
    steps: int
    latencies_s: list[float] = Field(default_factory=list)
    psnr_db: list[float] = Field(default_factory=list)
    pictures: Any = Field(default=None, exclude=True, repr=False)

    @computed_field(repr=False)
    @property
    def latency_s(self) -> float:
        """Median seconds for all prompts at once."""
        return statistics.median(self.latencies_s)

    @computed_field(repr=False)
    @property
    def mean_psnr_db(self) -> float | None:
        """Mean over the prompts; None where every picture equals the baseline's."""
        return None if min(self.psnr_db, default=EQUAL_DB) == EQUAL_DB else statistics.mean(self.psnr_db)


class SampleResult(Result):
    """What :func:`sample` measured.

    Attributes:
        attention_s: seconds of `baseline.latency_s` that the layers with maps spend on attention, with its projections.
        at_most_s: those of them that the calls that reuse or hold stand for: no reuse can save more (Amdahl).
    """

    file_kind: ClassVar[str] = "a sample result"
    prompts: list[str]
    policy: Policy
    baseline: Way
    reuse: Way
    fewer: Way
    report: Report
    attention_s: float
    at_most_s: float
    environment: dict[str, Any]

    @computed_field
    @property
    def saved_s(self) -> float:
        """Seconds that reuse took less than full steps; negative where it took more."""
        return self.baseline.latency_s - self.reuse.latency_s

    @property
    def ways(self) -> list[Way]:
        return [self.baseline, self.reuse, self.fewer]


def sample(
    pipe: Any,
    prompts: list[str],
    *,
    steps: int,
    policy: Policy | Rule,
    layers: str | tuple[str, ...] | None = None,
    map_format: str,
    seed: int,
    guidance: float | None = None,
    eta: float | None = None,
    rounds: int = 2,
    progress: Progress = silent,
) -> SampleResult:
    """Sample `prompts` in one batch with full steps, with `policy`, and with fewer steps.

    After a warm-up full steps and reuse are timed in turns, in `rounds`; then they and as many fewer steps as should
    take as long as the reuse run's median, in proportion, in `rounds` more.

    Args:
        steps: ``num_inference_steps`` of the baseline.
        policy: for the executed steps of that run; or a rule.
        layers: as in :func:`attnreuse.enable`.
        guidance, eta: ``guidance_scale`` and the scheduler's ``eta``; None: the pipeline's default.
        progress: called before each run, with the number of runs done, of all, and what runs.

    Raises:
        AttnReuseError: pictures that are not numbers, as half precision may make them.
    """
    begun, reports, executed = itertools.count(), [], executed_steps(pipe.scheduler, steps)
    if isinstance(policy, Rule):
        policy = resolved(policy, pipe.scheduler, executed)
    setting = Setting(
        tuple(prompts), steps, seed, guidance, eta, map_format=map_format, layers=layers, batch=len(prompts)
    )

    @contextmanager
    def reusing(start: int) -> Iterator[None]:
        with enable(pipe, policy, map_format=map_format, layers=layers) as session:
            yield
        reports.append(session.report())

    def run(way: Way) -> float:
        progress(next(begun), of, f"{way.label}, {counted(way.steps, 'step')}")
        evaluator = Evaluator(pipe, replace(setting, steps=way.steps), memo_bytes=0)
        sampled = evaluator.run(reusing if way is reuse else lambda start: nullcontext())
        way.pictures = sampled.pictures
        return sampled.seconds

    def time(*ways: Way) -> None:
        full, *others = (functools.partial(run, way) for way in ways)
        for way, seconds in zip(ways, paced(full, others, rounds), strict=True):
            way.latencies_s += seconds

    baseline, reuse = Way(label="full steps", steps=steps), Way(label="reuse", steps=steps)
    of = 1 + paced_runs(1, rounds) + paced_runs(2, rounds)
    progress(next(begun), of, f"warm-up, {counted(min(WARM_UP, steps), 'step')}")
    denoiser = find_denoiser(pipe)
    served = tuple(select_layers(layer_kinds(denoiser), layers, policy.patterns))
    warm_up = Evaluator(pipe, replace(setting, steps=min(WARM_UP, steps), layers=served))
    shares = costs.attention(warm_up, executed)
    time(baseline, reuse)
    count = max(1, min(steps - 1, round(steps * reuse.latency_s / baseline.latency_s)))
    fewer = Way(label="fewer steps", steps=count)
    time(baseline, reuse, fewer)
    for way in (baseline, reuse, fewer):
        way.psnr_db = psnr_each(way.pictures, baseline.pictures).tolist()
    about = {"model": model_name(pipe), "scheduler": type(pipe.scheduler).__name__, "guidance": guidance, "seed": seed}
    measured_on = {**about, **environment(denoiser.device), "dtype": str(denoiser.dtype)}
    took = _attention(reports[-1], shares, baseline.latency_s)
    return SampleResult(
        prompts=prompts, policy=policy, baseline=baseline, reuse=reuse, fewer=fewer, report=reports[-1],
        environment=measured_on, **took,
    )  # fmt: skip


def _attention(report: Report, shares: dict[str, float], full_s: float) -> dict[str, float]:
    """Seconds of computed attention in all calls of the layers with maps, and in those that reused or held."""
    of_step = [(layer, shares[layer.name] * full_s) for layer in report.layers if layer.map_bytes]
    calls = [(sum(layer.planned.values()), seconds) for layer, seconds in of_step]
    cached = [(layer.reused + layer.held, seconds) for layer, seconds in of_step]
    return {
        "attention_s": sum(n * seconds for n, seconds in calls),
        "at_most_s": sum(n * seconds for n, seconds in cached),
    }


def sheet(result: SampleResult) -> Image.Image:
    """One picture: a row per way to sample, and below each but the first its difference; a column per prompt.

    Raises:
        ValueError: a result that was loaded, which has no pictures.
    """
    if result.baseline.pictures is None:
        raise ValueError("a loaded result has no pictures: sample again")
    height, width = result.baseline.pictures.shape[1:3]
    scale = max(1, math.ceil(MIN_SIDE / min(height, width)))
    height, width = height * scale, width * scale
    font, margin, line, left = ImageFont.load_default(14), 12, 18, 150
    rows = [
        (about, pictures, [[line for note in of_one for line in _wrapped(note, width, font)] for of_one in notes])
        for about, pictures, notes in _sheet_rows(result)
    ]
    tall = [height + margin + line * max(map(len, notes)) for _, _, notes in rows]
    size = (left + len(result.prompts) * (width + margin), margin + sum(tall))
    canvas, top = Image.new("RGB", size, "white"), margin
    draw = ImageDraw.Draw(canvas)
    for (about, pictures, notes), high in zip(rows, tall, strict=True):
        draw.multiline_text((margin, top), about, "black", font, spacing=6)
        for j, (picture, lines) in enumerate(zip(pictures, notes, strict=True)):
            at = left + j * (width + margin)
            image = Image.fromarray((picture * 255).round().astype(np.uint8)).resize((width, height), Image.NEAREST)
            canvas.paste(image, (at, top))
            draw.multiline_text((at, top + height + 3), "\n".join(lines), "black", font, spacing=4)
        top += high
    return canvas


def _sheet_rows(result: SampleResult) -> list[tuple[str, np.ndarray, list[tuple[str, ...]]]]:
    """For each row of the sheet: what is said left of it, its pictures, and what is said below each."""
    rows, full = [], result.baseline.pictures
    for way in result.ways:
        about = f"{way.label}\n{way.steps} steps\n{way.latency_s:.2f} s"
        if way is result.reuse:
            calls = result.policy.reuse_steps
            about += f"\n{counted(calls, 'call')} reuse{'s' * (calls == 1)}\n{result.report.map_format} maps"
        first = way is result.baseline
        quality = ["reference" if first else "equal" if v == EQUAL_DB else f"{v:.1f} dB" for v in way.psnr_db]
        rows.append((about, way.pictures, list(zip(result.prompts, quality, strict=True))))
        if not first:
            changed = np.clip(np.abs(way.pictures - full) * DIFFERENCE, 0, 1)
            about = f"{way.label},\ndifference from\nfull steps,\ntimes {DIFFERENCE}"
            rows.append((about, changed, [()] * len(full)))
    return rows


def _wrapped(text: str, width: int, font: Any) -> list[str]:
    """`text` in lines of `width` pixels, broken between words where that is possible."""
    lines, rest = [], text
    while font.getlength(rest) > width:
        fits = max(1, max(n for n in range(len(rest)) if font.getlength(rest[:n]) <= width))
        space = rest.rfind(" ", 0, fits + 1)
        lines.append(rest[: space if space > 0 else fits])
        rest = rest[len(lines[-1]) :].lstrip()
    return [*lines, rest]
