"""The paper's comparison, at equal measured latency: reuse, fewer steps, and other caches, in one run.

Every way to sample is judged by the same prompts and seeds against the full-step pictures of the same scheduler and
step count, and timed in turns with all others. "Plain steps at equal latency" are read off the measured plain steps, by
interpolation; "at equal cost" counts as the paper does, by attention maps computed. A stochastic sampler draws other
noise when it makes other steps: "same noise" holds it fixed (:mod:`attnreuse.noise`). Users get no such run, but plain
steps are not to be beaten by bad luck alone, so it counts among them.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from attnreuse import metrics, tiny_shapes
from attnreuse.clock import executed_steps
from attnreuse.environment import environment, package_version
from attnreuse.errors import AttnReuseError
from attnreuse.evaluate import Evaluator, Setting
from attnreuse.levels import resolved
from attnreuse.noise import NoisePath
from attnreuse.peers import PEERS, deepcache
from attnreuse.policy import Policy, Rule, hurry, periodic
from attnreuse.progress import Progress, silent
from attnreuse.rows import count_of, strip
from attnreuse.samplers import make_scheduler, step_options
from attnreuse.session import enable

SHOWN = 4  # pictures that are kept of each method
SAME_NOISE = "plain steps, same noise"
PLAIN = ("plain steps", SAME_NOISE)


@dataclass
class Method:
    """One way to sample.

    Attributes:
        name: what tables call it.
        family: "full", one of ``PLAIN``, "reuse", "reuse + fewer steps", "other cache", "reuse + other cache",
            "student" or "student + reuse".
        steps: ``num_inference_steps``.
        policy: of reuse; None: no reuse.
        map_format: of its maps.
        around: a context that changes the pipeline while it samples.
        guidance: instead of the setting's.
    """

    name: str
    family: str
    steps: int
    policy: Policy | None = None
    map_format: str = ""
    around: Callable[[Any], AbstractContextManager] | None = None
    guidance: float | None = None


@dataclass
class Measured:
    """What one method did.

    Attributes:
        map_bytes: of the buffer of one batch, in bytes.
        scores: by metric: the mean, and for "psnr" the half-width of its 95 % confidence interval ("psnr_ci").
        pictures: the first ``SHOWN``, ``[P, S, S, 3]`` in [0, 1].
        latencies_s: of one batch of pictures, one per round.
        maps_computed: share of the full run's attention-map elements that it computed; None where unknown.
        plain_psnr: of plain steps at its latency; None below all that were measured.
        equal_cost_psnr: of the plain steps that compute as many maps, as near as step counts allow.
    """

    method: Method
    executed_steps: int
    map_bytes: int
    scores: dict[str, float]
    pictures: np.ndarray = field(repr=False)
    scheduler: str = ""
    latencies_s: list[float] = field(default_factory=list)
    maps_computed: float | None = None
    plain_psnr: float | None = None
    equal_cost_psnr: float | None = None

    @property
    def latency_s(self) -> float:
        return float(np.median(self.latencies_s))

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
            "plain_psnr_at_equal_latency": _short(self.plain_psnr),
            "plain_psnr_at_equal_cost": _short(self.equal_cost_psnr),
        }  # fmt: skip


SCORES = (
    "psnr", "psnr_ci", "ssim", "lpips", "fid", "clip_score", "background", "color", "shape", "relation",
)  # fmt: skip


@dataclass
class Group:
    """All methods under one scheduler, step count and map format; the full run first."""

    scheduler: str
    steps: int
    map_format: str
    rows: list[Measured]
    notes: list[str]

    @property
    def full(self) -> Measured:
        return self.rows[0]


@dataclass
class Comparison:
    """What :func:`compare` measured."""

    setting: Setting
    groups: list[Group]
    environment: dict[str, Any]
    rounds: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        groups = [
            {"scheduler": g.scheduler, "steps": g.steps, "map_format": g.map_format, "notes": g.notes,
             "rows": [r.row() for r in g.rows]}
            for g in self.groups
        ]  # fmt: skip
        return {"setting": asdict(self.setting), "groups": groups, "environment": self.environment}


def compare(
    pipe: Any,
    setting: Setting,
    *,
    schedulers: list[str | None] = [None],  # noqa: B006 (never written to)
    steps: list[int] | None = None,
    formats: list[str] | None = None,
    policies: list[Policy | Rule] = [],  # noqa: B006
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
        ValueError: an unknown sampler, eta for one that has none, or a rule for a scheduler without noise levels.
    """
    own, groups = pipe.scheduler, []
    made = {name: own if name is None else make_scheduler(own.config, name) for name in schedulers}
    for scheduler in made.values():
        step_options(scheduler, setting.eta)
    wanted = []
    try:
        for scheduler, count, name in itertools.product(
            schedulers, steps or [setting.steps], formats or [setting.map_format]
        ):
            pipe.scheduler = made[scheduler]
            at = replace(setting, steps=count, map_format=name)
            same = type(pipe.scheduler) is type(own)  # a student is made for one scheduler
            wanted.append((scheduler, at, *methods(pipe, at, policies, student if same else None, others)))
        of, done = sum(_runs(found, rounds) for _, _, found, _ in wanted), 0
        for scheduler, at, found, notes in wanted:
            pipe.scheduler = made[scheduler]
            label = scheduler or type(own).__name__  # as asked for: samplers share classes

            def tell(part: int, _: int, now: str, before: int = done, label: str = label) -> None:
                progress(before + part, of, f"{label}: {now}")

            rows = measure(pipe, at, found, notes, judge, rounds, tell)
            done += _runs(found, rounds)
            for row in rows:
                row.scheduler = label
            groups.append(Group(label, at.steps, at.map_format, rows, notes))
    finally:
        pipe.scheduler = own
    about = {**environment(pipe.unet.device), "dtype": str(pipe.unet.dtype)}
    about |= {name: found for name in ("DeepCache", "tomesd") if (found := package_version(name))}
    return Comparison(setting, groups, about, rounds)


def methods(
    pipe: Any, setting: Setting, policies: list[Policy | Rule], student: Path | None, others: bool
) -> tuple[list[Method], list[str]]:
    """What is compared under a setting, the full run first; and notes on what cannot be."""
    executed, scheduler = executed_steps(pipe.scheduler, setting.steps), type(pipe.scheduler).__name__
    half, quarter, notes = executed // 2, executed // 4, []
    found = [Method("full steps", "full", setting.steps)]
    schedules = [hurry(executed, half, None), hurry(executed, half, 1), rule_for(pipe.scheduler, setting.steps, 0.5)]
    schedules += [hurry(executed, quarter, None), rule_for(pipe.scheduler, setting.steps, 0.25)]
    schedules += [periodic(executed, 2), periodic(executed, 3)]
    on_fewer, as_costly = [], {round(setting.steps * (1 - reused / executed)) for reused in (half, quarter)}
    for policy in policies:
        fixed = resolved(policy, pipe.scheduler, executed) if isinstance(policy, Rule) else policy
        steps = _steps_of(pipe.scheduler, fixed.steps, setting.steps)
        if steps is None or fixed.scheduler not in (None, scheduler):
            made_for = f"{fixed.scheduler or 'any scheduler'} and {fixed.steps} calls"
            notes.append(f"{fixed.name} was left out: it is for {made_for}, this is {scheduler} and {executed}")
        elif steps == setting.steps:
            schedules.append(fixed)
        elif not fixed.reuse_steps:
            notes.append(f"{fixed.name} never reuses: it is {steps} plain steps")
            as_costly.add(steps)
        else:
            name = f"{fixed.name} on {steps} steps"
            on_fewer.append(Method(name, "reuse + fewer steps", steps, fixed, setting.map_format))
    seen: dict[Any, str] = {}
    for policy in schedules:
        key = str(policy.reuse)
        if policy.reuse_steps and key in seen:
            notes.append(f"{policy.name} is the schedule of {seen[key]}")
        elif not policy.reuse_steps:
            notes.append(f"{policy.name} never reuses: it is the full run")
        else:
            seen[key] = policy.name
            found.append(Method(policy.name, "reuse", setting.steps, policy, setting.map_format))
    found += plain_steps(_plain_counts(setting.steps, as_costly))
    if others:
        found += [Method(name, "other cache", setting.steps, around=around) for name, around in PEERS.items()]
        found.append(_on_deepcache(setting, rule_for(pipe.scheduler, setting.steps, 0.5)))
    few = max(2, setting.steps // 2)
    found += [_on_fewer_steps(pipe, setting, few), *on_fewer]
    if student is not None:
        found += _students(student, few, setting.map_format)
    return found, notes


def _steps_of(scheduler: Any, calls: int, most: int) -> int | None:
    """How many steps to ask for, at most `most`, so that `calls` are executed; the scheduler is set to `most` again."""
    try:
        for steps in range(most, 0, -1):
            executed = executed_steps(scheduler, steps)
            if executed <= calls:
                return steps if executed == calls else None
        return None
    finally:
        scheduler.set_timesteps(most)


def rule_for(scheduler: Any, steps: int, reuse: float) -> Policy:
    """What the rule ``hurry(reuse=...)`` makes of `steps` asked for; without noise levels, HURRY with fresh maps."""
    executed = executed_steps(scheduler, steps)
    try:
        return resolved(hurry(reuse=reuse), scheduler, executed)
    except ValueError:
        return hurry(executed, count_of(reuse, executed))


def plain_steps(counts: Iterable[int]) -> list[Method]:
    """Runs of so many steps, each with noise of its own and with the full run's."""
    return [Method(f"{count} {family}", family, count) for count in counts for family in PLAIN]


def _plain_counts(steps: int, wanted: set[int]) -> list[int]:
    shares = (0.95, 0.9, 0.85, 0.75, 0.65, 0.5, 0.4)
    counts = {round(steps * share) for share in shares} | wanted
    return sorted((n for n in counts if 1 <= n < steps), reverse=True)


def _on_fewer_steps(pipe: Any, setting: Setting, steps: int) -> Method:
    policy = rule_for(pipe.scheduler, steps, 1 / 3)
    return Method(f"{policy.name} on {steps} steps", "reuse + fewer steps", steps, policy, setting.map_format)


def _on_deepcache(setting: Setting, policy: Policy) -> Method:
    """The other cache that reuse adds to: PAB skips the same outputs, and tomesd has other tokens at every step."""
    name = f"DeepCache(2) + {policy.name}"
    return Method(name, "reuse + other cache", setting.steps, policy, setting.map_format, deepcache(2))


def _students(folder: Path, steps: int, map_format: str) -> list[Method]:
    """A student runs without guidance, on a grid of its own steps."""
    policies = [None, hurry(steps, max(1, steps // 5), 1), hurry(steps, max(1, steps // 2), 1)]
    return [
        Method(
            f"student, {steps} steps" + (f", {policy.name}" if policy else ""),
            "student + reuse" if policy else "student",
            steps, policy, map_format if policy else "", _student(folder), guidance=1.0,
        )
        for policy in policies
    ]  # fmt: skip


# -- measuring


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
    count, of = len(wanted), _runs(wanted, rounds)
    rows = judged(pipe, setting, wanted, notes, judge, lambda done, _, now: progress(done, of, now))
    timed(pipe, setting, rows, rounds, lambda done, _, now: progress(count + done, of, now))
    one = Evaluator(pipe, replace(setting, prompts=setting.prompts[:1], steps=1))
    for row in rows:
        row.maps_computed = _maps_computed(one, rows[0], row)
    _at_equal(rows)
    return rows


def _runs(wanted: list[Method], rounds: int) -> int:
    """Runs that are judged or timed; plain steps of the same noise are not timed by themselves."""
    return len(wanted) + rounds * sum(method.family != SAME_NOISE for method in wanted)


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
    _scores(blank, blank, prompts[:2], judge)
    full: np.ndarray | None = None
    for i, method in enumerate(wanted):
        if method.family == SAME_NOISE and not path.is_noisy:
            continue
        progress(i, len(wanted), f"judging {method.name}")
        try:
            row, pictures = _sampled(pipe, setting, method, path)
        except AttnReuseError as error:
            if full is None:
                raise
            notes.append(f"{method.name} was left out: {error}")
            continue
        row.scores = _scores(pictures, full, prompts, judge)
        full = pictures if full is None else full
        rows.append(row)
    return rows


def timed(pipe: Any, setting: Setting, rows: list[Measured], rounds: int, progress: Progress = silent) -> None:
    """Add the seconds of one batch in each of `rounds`, all in turns; same noise takes what plain steps take."""
    one_batch = replace(setting, prompts=setting.prompts[: setting.batch])
    called = [row for row in rows if row.method.family != SAME_NOISE]
    order = random.Random(0)
    for i in range(rounds):
        for j, row in enumerate(order.sample(called, len(called))):  # none always follows the same, which may slow it
            progress(i * len(called) + j, rounds * len(called), f"timing {row.method.name}, round {i + 1} of {rounds}")
            row.latencies_s.append(_timed(pipe, one_batch, row.method))
    taken = {row.method.steps: row.latencies_s for row in rows if row.method.family == "plain steps"}
    for row in rows:
        row.latencies_s = taken[row.method.steps] if row.method.family == SAME_NOISE else row.latencies_s


def _sampled(pipe: Any, setting: Setting, method: Method, path: NoisePath) -> tuple[Measured, np.ndarray]:
    """A method not yet scored, and all its pictures; `path` keeps the full run's noise."""
    evaluator = Evaluator(pipe, _setting_of(setting, method), memo_bytes=0)
    held = [0]

    @contextmanager
    def around(start: int) -> Iterator[None]:
        noise = path.recorded(start, method.steps) if method.family == "full" else nullcontext()
        if method.family == SAME_NOISE:
            noise = path.followed(start, method.steps)
        with _applied(pipe, setting, method) as session, noise:
            yield
            held[0] = max(held[0], session.report().allocated_bytes if session else 0)

    pictures = evaluator.run(around).pictures
    row = Measured(method, evaluator.executed_steps, held[0], {}, pictures[:SHOWN].copy(), evaluator.scheduler)
    return row, pictures


def _scores(
    pictures: np.ndarray, full: np.ndarray | None, prompts: list[str], judge: tuple[str, ...]
) -> dict[str, float]:
    tiny, scores = is_tiny(prompts), {}
    if full is not None:
        psnr = metrics.psnr_each(pictures, full)
        scores = {"psnr": float(psnr.mean()), "psnr_ci": metrics.half_width(psnr)}
        for name in {"ssim", "lpips"} & set(judge):
            scores[name] = float(metrics.PAIRED[name](pictures, full).mean())
        if "fid" in judge and len(pictures) > 1:
            scores["fid"] = metrics.fid(pictures, full, tiny=tiny)
    if "clip" in judge:
        scores["clip_score"] = float(metrics.clip_scores(pictures, prompts, tiny=tiny).mean())
    return scores | (metrics.obedience(pictures, prompts) if tiny else {})


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


def at_time(measured: Iterable[tuple[float, float]], time: float) -> float | None:
    """The PSNR of plain steps at a time, by interpolation of (time, PSNR) pairs; None below all of them.

    More steps can be worse or, by noise, faster: up to each pair the best so far counts.
    """
    pairs = sorted(measured)
    if not pairs or time < pairs[0][0]:
        return None
    times, psnrs = zip(*pairs, strict=True)
    return float(np.interp(time, times, np.maximum.accumulate(psnrs)))


def _at_equal(rows: list[Measured]) -> None:
    """Tell each row the plain steps' PSNR at its latency and at its count of maps."""
    plain = [r for r in rows if r.method.family in PLAIN]
    if len(plain) < 2:
        return
    calls = rows[0].executed_steps
    for row in rows[1:]:
        if row.method.family in PLAIN:
            continue
        if row.latency_s <= rows[0].latency_s:
            row.plain_psnr = at_time([(r.latency_s, r.scores["psnr"]) for r in plain], row.latency_s)
        if row.maps_computed is not None:
            off = {id(r): abs(r.executed_steps - calls * row.maps_computed) for r in plain}
            as_costly = [r.scores["psnr"] for r in plain if off[id(r)] == min(off.values()) <= 1]
            row.equal_cost_psnr = max(as_costly, default=None)


def _short(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.4g}"


# -- students


def _student(folder: Path) -> Callable[[Any], AbstractContextManager]:
    held: list[Any] = []

    @contextmanager
    def around(pipe: Any) -> Iterator[None]:
        from diffusers import UNet2DConditionModel

        if not held:
            held.append(UNet2DConditionModel.from_pretrained(folder).to(pipe.device, pipe.unet.dtype).eval())
        teacher, pipe.unet = pipe.unet, held[0]
        try:
            yield
        finally:
            pipe.unet = teacher

    return around


def is_tiny(prompts: list[str]) -> bool:
    """Are these captions of the shipped pipeline's grammar, which its own CLIP and the oracle can judge?"""
    try:
        for prompt in prompts:
            tiny_shapes.parse(prompt)
    except ValueError:
        return False
    return True
