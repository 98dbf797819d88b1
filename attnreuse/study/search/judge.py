"""Scores and costs, each found once ever: a file keeps them as they come, so a killed search goes on where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from attnreuse.binding.denoiser import find_denoiser
from attnreuse.measure.environment import environment
from attnreuse.measure.timing import keeps_freed_memory
from attnreuse.planning.rows import strip
from attnreuse.policy import Policy
from attnreuse.progress import Progress, silent
from attnreuse.study import costs
from attnreuse.study.costs import RunCosts
from attnreuse.study.evaluate import Evaluator
from attnreuse.study.search.engines import Engine
from attnreuse.study.search.objective import Scores


class _Kept(BaseModel, extra="forbid"):
    """A line of a cache: a schedule's scores (of runs of so many steps), its time, or what runs cost, on a machine."""

    setting: str
    steps: int | None = None
    reuse: str | None = None
    scores: Scores | None = None
    machine: str | None = None
    costs: RunCosts | None = None
    share: float | None = None  # of the full run's time, measured


class Judge:
    """Scores of schedules through an engine, and their predicted times: each judged, and costs measured, once ever.

    Args:
        engine: judges what the file does not hold.
        cache: the file, a JSON line per schedule; None keeps all in memory only.
        run_costs: of the engine's setting; None: as the file has them for this machine, else they are measured.
        progress: called before each run that is timed.

    Raises:
        ValueError: the file holds other things.
    """

    def __init__(
        self,
        engine: Engine,
        cache: str | Path | None = None,
        run_costs: RunCosts | None = None,
        progress: Progress = silent,
    ):
        self.engine, self.cache, self.progress = engine, None if cache is None else Path(cache), progress
        self._scores: dict[tuple[int, str], Scores] = {}
        self._shares: dict[tuple[int, str], float] = {}
        self._costs = run_costs
        if self.cache is None:
            return
        self._setting = engine.evaluator.key()
        for row in (row for row in self._rows() if row.setting == self._setting):
            if row.scores is not None:
                self._scores.setdefault((row.steps, row.reuse), {}).update(row.scores)
            elif row.machine == _machine(engine.evaluator):
                self._costs = self._costs or row.costs
                if row.share is not None:
                    self._shares[row.steps, row.reuse] = row.share

    @property
    def costs(self) -> RunCosts:
        """What runs of the setting cost here."""
        if self._costs is None:
            self._costs = costs.measure(self.engine.evaluator, progress=self.progress)
            self._append(machine=_machine(self.engine.evaluator), costs=self._costs)
        return self._costs

    def seconds(self, policy: Policy, steps: int) -> float:
        """Predicted, of one batch of a run of `steps`."""
        return self.costs.seconds(self.engine.evaluator.at(steps).schedule(policy))

    def shares(self, policies: list[Policy], steps: list[int]) -> list[float]:
        """Measured times of runs of `steps` with `policies`, as shares of the full run's."""
        keys = [(count, _text(policy)) for policy, count in zip(policies, steps, strict=True)]
        new = [i for i, key in enumerate(keys) if key not in self._shares]
        evaluator = self.engine.evaluator
        runs = [(steps[i], policies[i]) for i in new]
        measured = costs.shares(evaluator, runs, progress=self.progress) if runs else []
        for i, share in zip(new, measured, strict=True):
            self._shares[keys[i]] = share
            self._append(machine=_machine(evaluator), steps=keys[i][0], reuse=keys[i][1], share=share)
        return [self._shares[key] for key in keys]

    def fits(self, policy: Policy, steps: int, memory_budget: int | None) -> bool:
        """Do maps and outputs of one batch fit into so many bytes?"""
        return memory_budget is None or self.engine.evaluator.at(steps).map_bytes(policy) <= memory_budget

    def __call__(
        self, policies: list[Policy], metrics: tuple[str, ...] = ("psnr",), steps: list[int] | None = None
    ) -> list[Scores]:
        """Scores of `policies`, in order, each for a run of its `steps` (default: the setting's)."""
        steps = steps or [self.engine.evaluator.setting.steps] * len(policies)
        keys = [(count, _text(policy)) for policy, count in zip(policies, steps, strict=True)]
        missing = {
            key: policy
            for key, policy in zip(keys, policies, strict=True)
            if not set(metrics) <= self._scores.get(key, {}).keys()
        }
        new = list(missing)
        for i, scores in self.engine.run(list(missing.values()), metrics, [count for count, _ in new]):
            self.engine.evaluator.calls.schedules += 1
            self._scores.setdefault(new[i], {}).update(scores)
            self._append(steps=new[i][0], reuse=new[i][1], scores=scores)
        return [self._scores[key] for key in keys]

    def _append(self, **row: Any) -> None:
        if self.cache is None:
            return
        with self.cache.open("a") as file:
            file.write(_Kept(setting=self._setting, **row).model_dump_json(exclude_none=True) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _rows(self) -> list[_Kept]:
        """Lines of the cache; one that a kill cut short is cut off."""
        data = self.cache.read_bytes() if self.cache.exists() else b""
        whole, rest = data[: data.rfind(b"\n") + 1], data[data.rfind(b"\n") + 1 :]
        begin = b'{"setting":'
        rows: list[_Kept] = []
        try:
            for line in whole.splitlines():
                rows.append(_Kept.model_validate_json(line))
            if not (rest.startswith(begin) or begin.startswith(rest)):
                raise ValueError
        except ValueError as error:
            raise ValueError(
                f"{self.cache} is not a file of scores (line {len(rows) + 1}): give another, or move it away"
            ) from error
        if rest:
            self.cache.write_bytes(whole)
        return rows


def _machine(evaluator: Evaluator) -> str:
    """What the costs of a run belong to besides its setting."""
    about = environment(find_denoiser(evaluator.pipe).device)
    kept = ", freed memory kept" if keeps_freed_memory() else ""
    return f"{about['device']}, {about['threads']} threads, torch {about['torch']}{kept}"


def _text(policy: Policy) -> str:
    """The schedule alone, as a cache's key."""
    if isinstance(policy.reuse, dict):
        return json.dumps({name: strip(row) for name, row in policy.reuse.items()}, sort_keys=True)
    return strip(policy.reuse)
