"""What is compared under one sampler, step count and map format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from attnreuse.binding.clock import executed_steps
from attnreuse.planning.levels import resolved
from attnreuse.planning.rows import count_of
from attnreuse.policy import Policy, Rule, hurry, periodic
from attnreuse.progress import counted
from attnreuse.study.compare.other_caches import OTHER_CACHES, caches_for, deepcache
from attnreuse.study.setting import Setting

SAME_NOISE = "plain steps, same noise"
PLAIN = ("plain steps", SAME_NOISE)


@dataclass
class Method:
    """One way to sample.

    Attributes:
        name: what tables call it.
        family: of ``plots.FAMILIES``.
        steps: ``num_inference_steps``.
        policy: of reuse; None: no reuse.
        map_format: of its maps.
        around: a context that changes the pipeline while it samples; not kept in files.
        guidance: instead of the setting's.
    """

    name: str
    family: str
    steps: int
    policy: Policy | None = None
    map_format: str = ""
    around: Annotated[Callable[[Any], AbstractContextManager] | None, Field(exclude=True)] = None
    guidance: float | None = None


def methods(
    pipe: Any, setting: Setting, policies: Sequence[Policy | Rule], student: Path | None, others: bool
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
            notes.append(f"{fixed.name} never reuses: it is {counted(steps, 'plain step')}")
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
        caches = caches_for(pipe)
        found += [Method(name, "other cache", setting.steps, around=around) for name, around in caches.items()]
        if caches is OTHER_CACHES:
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
    return [
        Method(counted(count, "plain step") + family.removeprefix("plain steps"), family, count)
        for count in counts
        for family in PLAIN
    ]


def _plain_counts(steps: int, wanted: set[int]) -> list[int]:
    shares = (0.95, 0.9, 0.85, 0.75, 0.65, 0.5, 0.4)
    counts = {round(steps * share) for share in shares} | wanted
    return sorted((n for n in counts if 1 <= n < steps), reverse=True)


def _on_fewer_steps(pipe: Any, setting: Setting, steps: int) -> Method:
    policy = rule_for(pipe.scheduler, steps, 0.3)
    return Method(f"{policy.name} on {steps} steps", "reuse + fewer steps", steps, policy, setting.map_format)


def _on_deepcache(setting: Setting, policy: Policy) -> Method:
    """The other cache that reuse adds to: PAB skips the same outputs, and tomesd has other tokens at every step."""
    name = f"DeepCache(2) + {policy.name}"
    return Method(name, "reuse + other cache", setting.steps, policy, setting.map_format, deepcache(2))


def _students(folder: Path, steps: int, map_format: str) -> list[Method]:
    """A student runs without guidance, on a grid of its own steps."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"student must be the folder of a UNet, with a config.json: {folder} is none")
    policies = [None, hurry(steps, max(1, steps // 5), 1), hurry(steps, max(1, steps // 2), 1)]
    return [
        Method(
            f"student, {steps} steps" + (f", {policy.name}" if policy else ""),
            "student + reuse" if policy else "student",
            steps, policy, map_format if policy else "", _student(folder), guidance=1.0,
        )
        for policy in policies
    ]  # fmt: skip


def _student(folder: Path) -> Callable[[Any], AbstractContextManager]:
    students: list[Any] = []

    @contextmanager
    def around(pipe: Any) -> Iterator[None]:
        from diffusers import UNet2DConditionModel

        if not students:
            made = UNet2DConditionModel.from_pretrained(folder, local_files_only=True)
            students.append(made.to(pipe.device, pipe.unet.dtype).eval())
        teacher, pipe.unet = pipe.unet, students[0]
        try:
            yield
        finally:
            pipe.unet = teacher

    return around
