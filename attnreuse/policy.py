"""Policies and rules, and where they come from: `hurry`, `periodic`, files, the hub, those that are shipped.

A policy is for one number of executed steps. A rule has none: at the start of each run it makes a policy
from the noise levels (log-SNR) of the run's denoiser calls.
"""

from __future__ import annotations

import json
from pathlib import Path

from attnreuse.planning.hurry import Hurry, hurry
from attnreuse.planning.periodic import Periodic, periodic
from attnreuse.planning.policy import Action, Policy, download
from attnreuse.planning.rules import Rule, Stretched
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
