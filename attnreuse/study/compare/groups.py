"""The paper's comparison, at equal measured latency: reuse, fewer steps, and other caches, in one run.

Every way to sample is judged by the same prompts and seeds against the full-step pictures of the same scheduler and
step count, and timed in turns with all others. "Plain steps at equal latency" are read off the measured plain steps, by
interpolation; "at equal cost" counts as the paper does, by attention maps computed. A stochastic sampler draws other
noise when it makes other steps: "same noise" holds it fixed (:mod:`attnreuse.study.noise`). Users get no such run, but
plain steps are not to be beaten by bad luck alone, so it counts among them.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from attnreuse.binding.denoiser import find_denoiser
from attnreuse.measure.environment import environment, package_version
from attnreuse.planning.samplers import make_scheduler, step_options
from attnreuse.policy import Policy, Rule
from attnreuse.progress import Progress, silent
from attnreuse.results import Result
from attnreuse.study.compare.measure import Measured, measure, runs
from attnreuse.study.compare.methods import Method, methods
from attnreuse.study.setting import Setting


class Group(Result):
    """All methods under one scheduler, step count and map format; the full run first."""

    scheduler: str
    steps: int
    map_format: str
    rows: list[Measured]
    notes: list[str]

    @property
    def full(self) -> Measured:
        return self.rows[0]

    @property
    def judged(self) -> set[str]:
        """Scores that any method has."""
        return {score for row in self.rows for score in row.scores}


class Comparison(Result):
    """What :func:`compare` measured."""

    file_kind: ClassVar[str] = "a comparison"
    setting: Setting
    groups: list[Group]
    environment: dict[str, Any]
    rounds: int


def compare(
    pipe: Any,
    setting: Setting,
    *,
    schedulers: Sequence[str | None] = (None,),
    steps: list[int] | None = None,
    formats: list[str] | None = None,
    policies: Sequence[Policy | Rule] = (),
    student: Path | None = None,
    others: bool = True,
    judge: tuple[str, ...] = ("ssim",),
    rounds: int = 3,
    progress: Progress = silent,
) -> Comparison:
    """Measure every method under every scheduler, step count and format.

    Args:
        pipe: its scheduler is replaced meanwhile.
        schedulers: as in :func:`samplers.make_scheduler`; None: the pipeline's own.
        steps, formats: default: the setting's.
        policies: more schedules; each runs where its step count and scheduler fit.
        student: folder of a distilled UNet (`benchmarks/distill_tiny_shapes.py`).
        others: also DeepCache, tomesd and diffusers' PAB, where installed.
        judge: metrics besides PSNR: "ssim", "lpips", "fid", "clip". For captions of the shipped pipeline, FID
            and CLIP score are those of its own CLIP pair, and its caption oracle judges, too.
        rounds: timed rounds of one batch each, all methods in turns.
        progress: called before each method is judged and each batch is timed, with the number of these done, of all.

    Raises:
        AttnReuseError: a metric needs what is not installed.
        ValueError: an unknown sampler, eta for one that has none, layers that match none, a rule for a scheduler
            without noise levels, or no student in its folder.
    """
    own, groups = pipe.scheduler, []
    made = {name: own if name is None else make_scheduler(own.config, name) for name in schedulers}
    for scheduler in made.values():
        step_options(scheduler, setting.eta)
    compared: list[tuple[str | None, Setting, list[Method], list[str]]] = []
    try:
        for scheduler, count, name in itertools.product(
            schedulers, steps or [setting.steps], formats or [setting.map_format]
        ):
            pipe.scheduler = made[scheduler]
            at = replace(setting, steps=count, map_format=name)
            same = type(pipe.scheduler) is type(own)
            candidates, notes = methods(pipe, at, policies, student if same else None, others)
            if student is not None and not same:
                notes.append(f"the student was left out: it is made for {type(own).__name__}")
            compared.append((scheduler, at, candidates, notes))
        of, done = sum(runs(candidates, rounds) for _, _, candidates, _ in compared), 0
        for scheduler, at, candidates, notes in compared:
            pipe.scheduler = made[scheduler]
            label = scheduler or type(own).__name__  # as asked for: samplers share classes

            def tell(part: int, _: int, now: str, before: int = done, label: str = label) -> None:
                progress(before + part, of, f"{label}: {now}")

            rows = measure(pipe, at, candidates, notes, judge, rounds, tell)
            done += runs(candidates, rounds)
            for row in rows:
                row.scheduler = label
            group = Group(scheduler=label, steps=at.steps, map_format=at.map_format, rows=rows, notes=notes)
            groups.append(group)
    finally:
        pipe.scheduler = own
    denoiser = find_denoiser(pipe)
    today = datetime.date.today().isoformat()
    about = {"date": today, **environment(denoiser.device), "dtype": str(denoiser.dtype)}
    about |= {name: version for name in ("DeepCache", "tomesd") if (version := package_version(name))}
    return Comparison(setting=setting, groups=groups, environment=about, rounds=rounds)
