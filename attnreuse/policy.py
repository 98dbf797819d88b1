"""Policies and rules, and where they come from: `hurry`, `periodic`, files, the hub, those that are shipped.

A policy is for one number of executed steps. A rule has none: at the start of each run it makes a policy
from the noise levels (log-SNR) of the run's denoiser calls.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal, overload

from attnreuse.planning.policy import Action, Policy, download
from attnreuse.planning.rows import room_for
from attnreuse.planning.rules import Hurry, Periodic, Rule, Stretched
from attnreuse.results import reading

__all__ = [
    "Action",
    "Hurry",
    "Periodic",
    "Policy",
    "Rule",
    "Stretched",
    "hurry",
    "load_policy",
    "periodic",
    "shipped_policies",
]
SHIPPED = Path(__file__).parent / "assets" / "policies"  # found by `attnreuse search` for the shipped pipeline
RULES: dict[str, type[Rule]] = {"hurry": Hurry, "periodic": Periodic, "stretch": Stretched}


def load_policy(source: Policy | Rule | str | Path) -> Policy | Rule:
    """A policy or rule as it is, from a file, or by the name of a hub repository.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds neither; the message says what is wrong.
    """
    if isinstance(source, (Policy, Rule)):
        return source
    if not isinstance(source, (str, Path)) or str(source) in ("", *RULES):
        raise ValueError(
            f"policy must be a Policy, a rule such as hurry(reuse=0.5), a file or a hub name, got {source!r}"
        )
    is_file = isinstance(source, Path) or source.endswith(".json") or Path(source).exists()
    path = Path(source if is_file else download(source))
    if not path.exists():
        raise FileNotFoundError(f"no such policy file: {path}")
    with reading(path, Policy.file_kind):
        data = json.loads(path.read_text(encoding="utf-8"))
        rule = data.get("rule") if isinstance(data, dict) else None
        if rule is not None and (not isinstance(rule, str) or rule not in RULES):
            raise ValueError(f"{path} is not a policy file: rule must be one of {', '.join(RULES)}, got {rule!r}")
        return (Policy if rule is None else RULES[rule]).model_validate(data)


def shipped_policies(scheduler: str | None = None, steps: int | None = None) -> list[Policy]:
    """Policies found for the shipped pipeline, of a scheduler (its class) and a number of executed steps."""
    policies = [Policy.load(path) for path in sorted(SHIPPED.glob("*.json"))]
    return [p for p in policies if scheduler in (None, p.scheduler) and steps in (None, p.steps)]


@overload
def hurry(steps: int, reuse: int, max_age: int | Literal["least"] | None = "least") -> Policy: ...
@overload
def hurry(*, reuse: float) -> Hurry: ...
def hurry(steps: int | None = None, reuse: float = 0.5, max_age: Any = "least") -> Policy | Hurry:
    """With `steps`, the policy that reuses at the latest possible steps; without, the rule for any run.

    The rule, ``hurry(reuse=0.5)``, goes by noise levels: it reuses that share of a run's executed steps, those
    where the drift of the map, by distance in log-SNR, has least effect on the picture (:class:`Hurry`).

    Args:
        steps: executed steps of the run.
        reuse: how many of them reuse; without `steps` the share of them, in [0, 1].
        max_age: how many steps old a reused map may be. "least": as few as leave room for `reuse`, since
            age costs more than lateness gains (docs/schedules.md). None: one late block, the paper's
            heuristic, which captures once instead of before every reuse. 1: every reuse follows a
            computed step.

    Raises:
        ValueError: more reuses than fit, or a share outside [0, 1].

    Source: arXiv 2401.01008; ``max_age`` and the rule are ours.
    """
    if isinstance(reuse, bool) or not isinstance(reuse, (int, float)) or not math.isfinite(reuse):
        raise ValueError(f"reuse must be a number, got {reuse!r}")
    if steps is None:
        if not 0 <= reuse <= 1:
            raise ValueError(f"reuse must be a share in [0, 1] without steps, got {reuse}: hurry(steps, {reuse})?")
        if max_age != "least":
            raise ValueError(f"max_age counts steps, so it needs steps: hurry(steps, reuse, max_age={max_age})")
        return Hurry(reuse=reuse)
    if reuse != int(reuse):
        raise ValueError(f"reuse must be a number of steps beside steps, got {reuse}: hurry(reuse={reuse})?")
    if max_age == "least":
        max_age = next((age for age in range(1, steps) if reuse <= room_for(steps, age)), steps)
    age = steps if max_age is None else max_age
    if age < 1:
        raise ValueError(f"max_age must be at least 1, got {max_age}")
    room = room_for(steps, age)
    if not 0 <= reuse <= room:
        limit = "" if age >= steps else f" with max_age {max_age}"
        raise ValueError(f"reuse must be between 0 and {room} for {steps} steps{limit}, got {reuse}")
    row = [False] * steps
    step, left = steps - 1, reuse
    while left:
        row[step] = (steps - 1 - step) % (age + 1) != age
        left -= row[step]
        step -= 1
    return Policy(steps=steps, reuse=row, name=f"hurry({steps},{reuse},max_age={max_age})")


@overload
def periodic(steps: int, interval: int) -> Policy: ...
@overload
def periodic(*, interval: int) -> Periodic: ...
def periodic(steps: int | None = None, interval: int | None = None) -> Policy | Periodic:
    """Compute every `interval`-th step, starting with the first, and reuse at the others.

    With `steps` executed steps a policy, without them the rule for any run.
    """
    if not isinstance(interval, int) or interval < 1:
        raise ValueError(f"interval must be a whole number, at least 1, got {interval!r}")
    rule = Periodic(interval=interval)
    if steps is None:
        return rule
    return rule.resolve(steps).model_copy(update={"name": f"periodic({steps},{interval})"})
