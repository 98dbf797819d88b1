"""Schedules judged by their pictures: the same prompts and seeds for all, shared beginnings computed once.

Two schedules whose layers do the same up to a step give the denoiser the same inputs up to there, so
its outputs are kept and replayed: only from the step where they part is the denoiser called. The
pipeline itself runs in full (its scheduler is cheap), so any scheduler and pipeline branches rightly.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnreuse.adapters import adapter_of
from attnreuse.binding.clock import executed_steps
from attnreuse.binding.denoiser import (
    find_denoiser,
    holding_layers,
    layer_kinds,
    model_name,
    part_of,
    select_layers,
    unsupported,
)
from attnreuse.binding.enabling import enable
from attnreuse.binding.hooks import Attached
from attnreuse.binding.layers import NOT_CALLED
from attnreuse.binding.processors import attention_layers
from attnreuse.binding.schedule import Schedule
from attnreuse.binding.session import Session
from attnreuse.binding.shapes import Shapes, map_requests, map_shapes
from attnreuse.errors import AttnReuseError, PolicyMismatchError, UnsupportedLayerError
from attnreuse.maps.formats import format_named
from attnreuse.maps.ring import plan_ring
from attnreuse.planning.levels import influences, noise_levels
from attnreuse.planning.samplers import step_options
from attnreuse.policy import Policy
from attnreuse.study.metrics import PAIRED
from attnreuse.study.replay import Memo, digests_of
from attnreuse.study.setting import Setting, guided, not_of_prompts, takes_whatever


@dataclass
class Calls:
    """Schedules judged; denoiser calls that their pictures asked for, and those really made, in this process."""

    schedules: int = 0
    asked: int = 0
    made: int = 0

    def since(self, begun: Calls) -> Calls:
        """Those after `begun`."""
        return Calls(self.schedules - begun.schedules, self.asked - begun.asked, self.made - begun.made)

    @property
    def saved(self) -> float:
        """Share of the calls that was replayed instead."""
        return 1 - self.made / self.asked if self.asked else 0.0


@dataclass(frozen=True)
class Sampled:
    """`pictures` ``[P, S, S, 3]`` in [0, 1], final `latents` ``[P, C, S, S]``, `seconds` of the pipeline's calls."""

    pictures: np.ndarray
    latents: Tensor
    seconds: float


class Evaluator:
    """Samples and scores schedules on one pipeline under one :class:`Setting`.

    Args:
        pipe: a pipeline that :func:`attnreuse.enable` serves, and that samples pictures by prompts alone.
        setting: what to sample.
        memo_bytes: most memory for denoiser outputs kept to be replayed; 0 shares nothing.

    Raises:
        UnsupportedLayerError: a pipeline that takes no prompt, or needs more than that.
        ValueError: eta for a scheduler that has none, or layers that match none.

    Attributes:
        executed_steps: denoiser steps of a run; policies must have this many.
        levels: noise levels (log-SNR) of the executed steps, or None where the scheduler has none.
        influence: how far an error of each moves the final sample, or None: see
            :func:`~attnreuse.planning.levels.influences`.
        reference: whose full-step pictures those of schedules are judged against: this one's, or see :meth:`at`.
        calls: denoiser calls asked for and made so far.
    """

    def __init__(self, pipe: Any, setting: Setting, memo_bytes: int = 1 << 30):
        reason = not_of_prompts(type(pipe))
        if reason is not None:
            raise UnsupportedLayerError(f"only pipelines that draw by prompts alone are sampled here: {reason}")
        self.pipe, self.setting, self.calls = pipe, setting, Calls()
        step_options(pipe.scheduler, setting.eta)
        select_layers(layer_kinds(find_denoiser(pipe)), setting.layers)
        self.executed_steps = executed_steps(pipe.scheduler, setting.steps)
        self.levels = _levels(pipe.scheduler)
        self.influence = None if self.levels is None else influences(pipe.scheduler)
        self.scheduler, self.model = type(pipe.scheduler).__name__, model_name(pipe)
        self._memo = Memo(memo_bytes)
        self._inputs: dict[str, Any] = {}  # the denoiser's, of the first call
        self._full: Sampled | None = None
        self._others: dict[int, Evaluator] = {}
        self.reference = self

    def at(self, steps: int) -> Evaluator:
        """The same for runs of other `steps` (``num_inference_steps``), judged against the reference's full steps."""
        root = self.reference
        if steps == root.setting.steps:
            return root
        if steps not in root._others:
            other = Evaluator(root.pipe, replace(root.setting, steps=steps))
            other.reference, other.calls, other._memo = root, root.calls, root._memo
            root._others[steps] = other
        return root._others[steps]

    def key(self) -> str:
        """Digest of everything that decides a score besides the schedule: names a cache's rows."""
        about = {**asdict(self.setting), "model": self.model, "scheduler": self.scheduler}
        about["layers"] = self.setting.layers or "self"
        denoiser = find_denoiser(self.pipe)
        about |= {"dtype": str(denoiser.dtype), "device": denoiser.device.type}
        about |= {"config": {k: v for k, v in self.pipe.scheduler.config.items() if not k.startswith("_")}}
        about |= {"weights": _some_weights(self.pipe)}
        return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def policy(self, reuse: Any, name: str) -> Policy:
        """A policy that remembers what it was made for."""
        return Policy(
            steps=self.executed_steps,
            reuse=reuse,
            name=name,
            model=self.model,
            scheduler=self.scheduler,
            resolution=self.setting.size,
            map_format=self.setting.map_format,
            levels=self.levels,
        )

    @property
    def full(self) -> Sampled:
        """With every step computed; sampled once."""
        if self._full is None:
            self._full = self.sample(Policy(steps=self.executed_steps, reuse=[False] * self.executed_steps))
        return self._full

    def sample(self, policy: Policy) -> Sampled:
        """Pictures and final latents with `policy`.

        Raises:
            PolicyMismatchError: a policy for another number of executed steps.
        """
        if policy.steps != self.executed_steps:
            raise PolicyMismatchError(
                f"policy {policy.name!r} is for {policy.steps} executed steps, this run executes {self.executed_steps}"
            )

        @contextmanager
        def enabled(start: int) -> Iterator[None]:
            with self.enabled(policy) as session, self._replaying(session, start):
                yield

        return self.run(enabled)

    def enabled(self, policy: Policy) -> Session:
        """Reuse on the pipeline with `policy`, the setting's map format and layers."""
        return enable(self.pipe, policy, map_format=self.setting.map_format, layers=self.setting.layers)

    def run(self, around: Callable[[int], AbstractContextManager]) -> Sampled:
        """Pictures and final latents of the setting, the pipeline called within ``around(first picture)``."""
        pictures, latents, seconds = [], [], 0.0

        def keep_latents(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            last["latents"] = given["latents"]
            return given

        def keep(step: int, timestep: Any, latents: Tensor) -> None:
            last["latents"] = latents

        taken = inspect.signature(type(self.pipe).__call__).parameters
        current = "callback_on_step_end" in taken or takes_whatever(taken.values())
        called = {"callback_on_step_end": keep_latents} if current else {"callback": keep}
        for start, prompts in self.setting.batches():
            last: dict[str, Tensor] = {}
            with around(start):
                call = guided(self.pipe, self.setting.call(start, len(prompts)) | called, len(prompts))
                begin = time.perf_counter()
                pictures.append(self.pipe(prompts, **call).images)
                seconds += time.perf_counter() - begin
            latents.append(last["latents"].float().cpu())
        return Sampled(np.concatenate(pictures), torch.cat(latents), seconds)

    def scores(self, policy: Policy, metrics: tuple[str, ...] = ("psnr",)) -> dict[str, float]:
        """Mean over the pictures of each metric (``metrics.PAIRED``) against the reference's full-step pictures."""
        sampled, full = self.sample(policy), self.reference.full
        return {name: float(np.mean(PAIRED[name](sampled.pictures, full.pictures))) for name in metrics}

    def shapes(self) -> Shapes:
        """Map shape and head dim of every layer at this setting's batch, guidance and size."""
        root = self.reference
        if not root._inputs:
            _ = root.full
        return map_shapes(find_denoiser(self.pipe), root._inputs)

    def served(self, policy: Policy | None = None) -> list[str]:
        """Names of the layers that the setting (or else `policy`) means and that can be served, as they are called."""
        denoiser = find_denoiser(self.pipe)
        modules, adapter = attention_layers(denoiser), adapter_of(denoiser)
        named = policy.patterns if policy else ()
        wanted = set(select_layers(layer_kinds(denoiser), self.setting.layers, named))
        return [name for name in self.shapes() if name in wanted and unsupported(adapter, name, modules[name]) is None]

    def map_sizes(self, policy: Policy | None = None) -> dict[str, int]:
        """Elements of the map of each layer served, see :meth:`served`."""
        return {name: math.prod(self.shapes()[name].map) for name in self.served(policy)}

    def schedule(self, policy: Policy) -> Schedule:
        """What the served layers do under `policy`."""
        return Schedule(policy, self.served(policy), holding_layers(find_denoiser(self.pipe)))

    def map_bytes(self, policy: Policy) -> int:
        """Bytes of the buffer that `policy` needs here."""
        denoiser, map_format = find_denoiser(self.pipe), format_named(self.setting.map_format)
        called = (map_format, denoiser.dtype, denoiser.device)
        requests = map_requests(self.schedule(policy), self.served(policy), self.shapes(), *called)
        return plan_ring(requests, map_format).nbytes

    @contextmanager
    def _replaying(self, session: Session, batch: int) -> Iterator[None]:
        """Within, the denoiser's forward answers from the memo as long as the schedule agrees with it."""
        denoiser = session.denoiser
        if denoiser is not part_of(self.pipe):
            raise AttnReuseError("a compiled denoiser cannot be replayed: search and analyse before torch.compile")
        digests, inputs = digests_of(session.actions, self.setting.steps), self.reference._inputs
        first_live = self._memo.first_live(batch, digests, session.actions)
        forward, signature = denoiser.forward, inspect.signature(type(denoiser).forward)

        def replay(*args: Any, **kwargs: Any) -> Any:
            tick = session.tick
            key = (batch, digests[tick.step], tick.call)
            self.calls.asked += 1
            if tick.step < first_live:
                return self._memo.get(key)
            if not inputs:
                inputs.update(signature.bind(denoiser, *args, **kwargs).arguments)
                inputs.pop("self")
            self.calls.made += 1
            output = forward(*args, **kwargs)
            self._memo.put(key, output)
            return output

        with warnings.catch_warnings():  # what is replayed calls no layer
            warnings.filterwarnings("ignore", f".*{re.escape(NOT_CALLED)}")
            with Attached(denoiser, forward=replay):
                yield


def _some_weights(pipe: Any) -> str:
    """Digest of the names, shapes and a few values of all weights: another training or adapter has another."""
    running = hashlib.sha256()
    parts = [(name, part) for name, part in sorted(pipe.components.items()) if isinstance(part, torch.nn.Module)]
    for part_name, part in parts:
        for name, weight in part.named_parameters():
            some = weight.detach().flatten()[:: max(1, weight.numel() // 16)]
            values = [] if some.is_meta else some.float().tolist()  # meta: offloaded
            running.update(f"{part_name}.{name} {tuple(weight.shape)} {values};".encode())
    return running.hexdigest()


def _levels(scheduler: Any) -> tuple[float, ...] | None:
    try:
        return tuple(round(level, 4) for level in noise_levels(scheduler))
    except ValueError:
        return None
