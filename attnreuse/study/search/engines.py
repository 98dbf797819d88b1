"""What scores schedules: this process, or a ray cluster."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from attnreuse.errors import AttnReuseError
from attnreuse.policy import Policy
from attnreuse.study.evaluate import Evaluator
from attnreuse.study.search.objective import Scores
from attnreuse.study.setting import Setting

Judged = Iterator[tuple[int, Scores]]  # by index of the schedule


class Engine(Protocol):
    """Scores schedules, each of a run of its `steps` (``num_inference_steps``); yields (index, scores) as it goes."""

    evaluator: Evaluator

    def run(self, policies: list[Policy], metrics: tuple[str, ...], steps: list[int]) -> Judged: ...

    def of(self, setting: Setting) -> Engine:
        """Such an engine for another setting; this one is not used any more."""


class InProcess:
    """One schedule after the other, here."""

    def __init__(self, evaluator: Evaluator):
        self.evaluator = evaluator

    def run(self, policies: list[Policy], metrics: tuple[str, ...], steps: list[int]) -> Judged:
        for i, (policy, count) in enumerate(zip(policies, steps, strict=True)):
            yield i, self.evaluator.at(count).scores(policy, metrics)

    def of(self, setting: Setting) -> InProcess:
        return InProcess(Evaluator(self.evaluator.pipe, setting))


class RayEngine:
    """Schedules spread over a ray cluster, each worker with the pipeline, and threads, of this process.

    Same threads, same arithmetic: results equal those of :class:`InProcess` on like machines. A worker
    that dies is started again and its schedule judged anew.

    Args:
        evaluator: of this process; its pipeline is copied to the workers.
        workers: how many; None: as many as the cluster's CPUs (or GPUs) allow.
        address: of a running cluster; None: a local one.
    """

    def __init__(self, evaluator: Evaluator, workers: int | None = None, address: str | None = None):
        try:
            import ray
        except ImportError as error:
            raise AttnReuseError("engine 'ray' needs ray: pip install 'attnreuse[ray]'") from error
        self.evaluator = evaluator
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        threads, on_gpu = torch.get_num_threads(), evaluator.pipe.device.type == "cuda"
        cluster = ray.cluster_resources()
        room = cluster.get("GPU", 0) if on_gpu else cluster.get("CPU", 1) // threads
        self.workers = workers or max(1, int(room))
        claim = {"num_gpus": 1} if on_gpu else {"num_cpus": min(threads, cluster.get("CPU", 1) / self.workers)}
        device = str(evaluator.pipe.device)
        self._pipe = ray.put(evaluator.pipe.to("cpu"))  # held: a worker started again reads it again
        evaluator.pipe.to(device)
        actor = ray.remote(max_restarts=-1, max_task_retries=-1, **claim)(_Worker)
        self.actors = [actor.remote(self._pipe, evaluator.setting, threads, device) for _ in range(self.workers)]

    def run(self, policies: list[Policy], metrics: tuple[str, ...], steps: list[int]) -> Judged:
        from ray.util import ActorPool

        jobs, pool = list(zip(itertools.count(), policies, steps, strict=False)), ActorPool(self.actors)
        yield from pool.map_unordered(lambda actor, job: actor.scores.remote(*job, metrics), jobs)

    def of(self, setting: Setting) -> RayEngine:
        self.close()
        return RayEngine(Evaluator(self.evaluator.pipe, setting), self.workers)

    def close(self) -> None:
        """Give the workers back."""
        import ray

        for actor in self.actors:
            ray.kill(actor)


class _Worker:
    """One process of a :class:`RayEngine`."""

    def __init__(self, pipe: Any, setting: Setting, threads: int, device: str):
        torch.set_num_threads(threads)
        pipe.set_progress_bar_config(disable=True)
        self.evaluator = Evaluator(pipe.to(device), setting)

    def pid(self) -> int:
        return os.getpid()

    def scores(self, index: int, policy: Policy, steps: int, metrics: tuple[str, ...]) -> tuple[int, Scores]:
        return index, self.evaluator.at(steps).scores(policy, metrics)
