"""`attnreuse plan`: memory and time of a policy, from a model's configs alone.

Times come from runs of a pipeline of those configs with random weights: they take as long as trained ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

import torch
from pydantic import computed_field
from torch.utils.flop_counter import FlopCounterMode

from attnreuse.binding.denoiser import holding_layers, layer_kinds, never_served, select_layers, unmatched_by
from attnreuse.binding.processors import attention_layers
from attnreuse.binding.schedule import Schedule
from attnreuse.binding.shapes import LayerCost, Shapes, map_requests, map_shapes, parse_bytes
from attnreuse.errors import UnsupportedLayerError
from attnreuse.maps.formats import format_named
from attnreuse.maps.ring import RingPlan, plan_ring
from attnreuse.policy import Action, Policy
from attnreuse.progress import Progress, counted, silent
from attnreuse.results import Result
from attnreuse.study import costs
from attnreuse.study.blueprint import Blueprint
from attnreuse.study.costs import RunCosts
from attnreuse.study.evaluate import Evaluator
from attnreuse.study.setting import Setting

TIMED_STEPS, ROUNDS = 4, 2  # of each kind of run that is timed
PAYS = 0.97  # share of the full run's time above which a saving is within what two runs differ by


class LayerForecast(Result):
    """One layer: its map ``(B, H, M, N)``, bytes that it stores, place in the ring, and seconds by action."""

    name: str
    kind: str
    shape: tuple[int, int, int, int]
    head_dim: int
    actions: list[Action]
    map_bytes: int
    offset: int | None
    steps: tuple[int, int] | None  # first capture, last reuse
    cost: LayerCost | None


class RunForecast(Result):
    """What a run of one batch should take.

    Attributes:
        attention_share: of a step's time that the chosen layers take, with their projections.
        full_s: seconds with every step computed.
        policy_s: seconds with the policy.
        plain_steps: ``num_inference_steps`` that take as long as the policy, as a fraction.
        capture_step, reuse_step: of a step in which all layers do so, as a share of a full step's time.
    """

    attention_share: float
    full_s: float
    policy_s: float
    plain_steps: float
    capture_step: float
    reuse_step: float

    @computed_field
    @property
    def ratio(self) -> float:
        """The policy's time as a share of the full run's."""
        return self.policy_s / self.full_s

    @computed_field
    @property
    def pays(self) -> bool:
        """Is the saving more than what two runs differ by?"""
        return self.ratio <= PAYS


class Forecast(Result):
    """What a policy will need and, where measured, should gain.

    Attributes:
        asked_steps: ``num_inference_steps``, whose executed steps the policy is for.
        attention_products: share of a denoiser call's multiplications that softmax(QK')V makes, of all layers.
        predicted_bytes: of the buffer.
        dropped: bytes of the maps that the memory budget leaves out, by layer.
        beside: the pipeline's class, where it shows the model a picture it is given beside the one it makes; or None.
        second_call: what makes the pipeline call the denoiser twice a step, which takes the buffer twice; or None.
        not_timed: why there is no `run`, where there is none.
        unmatched: layers that the policy names, and that are not here.
    """

    policy: Policy
    asked_steps: int
    map_format: str
    attention_products: float
    predicted_bytes: int
    dropped: dict[str, int]
    layers: list[LayerForecast]
    run: RunForecast | None
    beside: str | None
    second_call: str | None
    not_timed: str | None
    unmatched: list[str]

    def __rich__(self) -> Any:
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
        timed = ("compute", "capture", "reuse", "hold") if self.run else ()
        for column in ("layers", "kind", "map", "heads", "MiB", "", *timed):
            table.add_column(column, justify="left" if column in ("kind", "") else "right", overflow="fold")
        for (kind, shape, dim, fate), group in itertools.groupby(sorted(self.layers, key=_alike), key=_alike):
            layers = list(group)
            cost = layers[0].cost
            times = [f"{1e3 * seconds:.2f}" for seconds in asdict(cost).values()] if cost else []
            size = f"{layers[0].map_bytes / 2**20:.1f}"
            table.add_row(str(len(layers)), kind, f"{shape[2]}x{shape[3]}", f"{shape[1]}x{dim}", size, fate, *times)
        steps = counted(self.asked_steps, "step")
        if self.policy.steps != self.asked_steps:
            steps += f", {counted(self.policy.steps, 'denoiser call')}"
        size = f"{self.map_format} maps: a buffer of {self.predicted_bytes / 2**20:.1f} MiB"
        title = f"{steps}; {self.policy}; {size}"
        said = [Text("Times are milliseconds of one layer at one step.")] if self.run else []
        if self.dropped:
            said.append(Text("Layers without room do not fit into the memory budget: they only compute."))
        if self.unmatched:
            said.append(Text(f"The policy names layers that are not served here: {', '.join(self.unmatched)}."))
        if self.beside:
            said.append(
                Text(f"A picture that {self.beside} is given stands beside the one it makes: plan the pixels of both.")
            )
        if self.second_call:
            said.append(Text(f"Guidance by {self.second_call} is a call of its own: it takes such a buffer once more."))
        return Group(Text(title), table, *said, Text(self.verdict()))

    def verdict(self) -> str:
        """What the figures say, in sentences."""
        if self.run is None:
            share = f"Attention makes {self.attention_products:.0%} of a step's multiplications."
            return f"{share} Whether it pays is not measured ({self.not_timed})."
        run, steps = self.run, self.asked_steps
        share = (
            f"The layers above take {run.attention_share:.0%} of a step's time here. A step that reuses takes "
            f"{run.reuse_step:.2f} of a full one, a step that captures {run.capture_step:.2f}."
        )
        full = f"{counted(steps, 'full step')} ({run.full_s:.2f} s)"
        took = (
            f"his policy should take {run.ratio:.2f} of the time of {full}, as {run.plain_steps:.1f} plain steps would"
        )
        if not run.pays:
            return f"{share} No, it does not pay: t{took}."
        return f"{share} T{took}. `attnreuse sample` shows which of the two keeps the picture better."


def _alike(layer: LayerForecast) -> tuple[str, tuple[int, int, int, int], int, str]:
    """What layers of one line of the table share."""
    fate = "" if layer.offset is not None else "computes" if layer.steps is None else "no room"
    return layer.kind, layer.shape, layer.head_dim, fate


def forecast(
    blueprint: Blueprint,
    policy: Policy,
    *,
    asked_steps: int,
    map_format: str,
    layers: str | None,
    size: tuple[int, int],
    pictures: int,
    guidance: bool,
    dtype: torch.dtype,
    memory_budget: int | str | None = None,
    measure_on: torch.device | None = None,
    frames: int | None = None,
    progress: Progress = silent,
) -> Forecast:
    """Plan `policy` for a batch of `pictures` of `size` (height, width) in `dtype`.

    Args:
        asked_steps: ``num_inference_steps`` whose executed steps the policy is for.
        guidance: classifier-free guidance is on, which gives most denoisers two rows for each picture.
        measure_on: time runs on this device; None: do not.
        frames: of a video, for models that make one; None: as the model's config says.
        progress: called before each timed run, with the number of these done, of all.
    """
    chosen, denoiser = format_named(map_format), blueprint.denoiser
    inputs = blueprint.inputs(size, pictures * blueprint.rows(guidance), frames or blueprint.frames)
    shapes, holding = map_shapes(denoiser, inputs), holding_layers(denoiser)
    wanted = _wanted(blueprint, layers, policy, holding if inputs.get("encoder_hidden_states") is None else ())
    schedule = Schedule(policy, [name for name in shapes if name in wanted], holding)
    called = (chosen, dtype, measure_on or torch.device("cpu"))
    requests = {r.name: r for r in map_requests(schedule, list(schedule.actions), shapes, *called)}
    ring = plan_ring(list(requests.values()), chosen, parse_bytes(memory_budget))
    run_costs, not_timed = None, "--no-measure"
    if measure_on is not None:
        setting = Setting(
            ("",) * pictures, TIMED_STEPS, guidance=7.5 if guidance else 1.0, size=size, map_format=chosen.name,
            layers=tuple(schedule.actions), batch=pictures,
        )  # fmt: skip
        run_costs, not_timed = _timed(blueprint, setting, dtype, measure_on, progress)
    kinds = layer_kinds(denoiser)
    rows = [
        LayerForecast(
            name=name,
            kind=kinds[name],
            shape=shapes[name].map,
            head_dim=shapes[name].head_dim,
            actions=row,
            map_bytes=requests[name].nbytes(chosen) if name in requests else 0,
            offset=ring.offsets.get(name),
            steps=(requests[name].first, requests[name].last) if name in requests else None,
            cost=run_costs.layers[name] if run_costs else None,
        )
        for name, row in schedule.actions.items()
    ]
    run = run_costs and _run(run_costs, schedule, ring, asked_steps)
    return Forecast(
        policy=policy,
        asked_steps=asked_steps,
        map_format=chosen.name,
        attention_products=_attention_products(denoiser, inputs, shapes),
        predicted_bytes=ring.nbytes,
        dropped=ring.dropped,
        layers=rows,
        run=run,
        beside=blueprint.beside,
        second_call=blueprint.adapter.second_call,
        not_timed=not_timed,
        unmatched=unmatched_by(wanted, policy.patterns),
    )


def _wanted(blueprint: Blueprint, layers: str | None, policy: Policy, given_nothing: Collection[str]) -> set[str]:
    """Names of the layers that `layers` and `policy` mean, and that can be served: not those that are `given_nothing`.

    Raises:
        UnsupportedLayerError: there is none.
    """
    denoiser, modules = blueprint.denoiser, attention_layers(blueprint.denoiser)
    named = select_layers(layer_kinds(denoiser), layers, policy.patterns)
    wanted = {n for n in named if n not in given_nothing and never_served(blueprint.adapter, n, modules[n]) is None}
    if not wanted:
        raise UnsupportedLayerError(f"{type(denoiser).__name__} has no layers {layers!r} that can be served")
    return wanted


def _timed(
    blueprint: Blueprint, setting: Setting, dtype: torch.dtype, device: torch.device, progress: Progress
) -> tuple[RunCosts | None, str | None]:
    """What runs of random weights cost; or why that cannot be told."""
    reason = blueprint.not_timed(dtype, device)
    if reason is not None:
        return None, reason
    pipe = blueprint.with_random_weights(dtype, device)
    try:
        return costs.measure(Evaluator(pipe, setting), ROUNDS, progress), None
    except Exception as error:  # pipelines have needs that no config tells
        return None, f"a run ended in {type(error).__name__}: {error}"


def _attention_products(denoiser: Any, inputs: dict[str, Any], shapes: Shapes) -> float:
    """Share of the multiplications of one call that attention makes."""
    attention = sum(4 * math.prod(layer.map) * layer.head_dim for layer in shapes.values())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        denoiser(**inputs)
    counted = counter.get_flop_counts()["Global"].items()  # attention is one op, or written out
    others = sum(n for op, n in counted if "attention" not in str(op) and "bmm" not in str(op))
    return attention / (attention + others)


def _run(run_costs: RunCosts, schedule: Schedule, ring: RingPlan, asked_steps: int) -> RunForecast:
    """What a run should take whose layers without a place in the ring compute."""
    steps = schedule.policy.steps
    nothing = Schedule(Policy(steps=steps, reuse=(False,) * steps), schedule.actions)
    served = Schedule(schedule.policy, ring.offsets, schedule.holding)
    attention = sum(cost.compute for cost in run_costs.layers.values())
    full_s = run_costs.seconds(nothing)
    dropped = sum(run_costs.layers[name].compute * steps for name in schedule.actions if name not in ring.offsets)
    policy_s = run_costs.seconds(served) + dropped
    step = run_costs.step + attention
    calls = (policy_s - run_costs.fixed) / step
    pair = Schedule(Policy(steps=2, reuse=(False, True)), schedule.actions, schedule.holding).actions
    caching = run_costs.step + run_costs.session
    capture, reuse = (
        caching + sum(cost.total(pair[name][i : i + 1]) for name, cost in run_costs.layers.items()) for i in range(2)
    )
    return RunForecast(
        attention_share=attention / step,
        full_s=full_s,
        policy_s=policy_s,
        plain_steps=asked_steps * calls / steps,
        capture_step=capture / step,
        reuse_step=reuse / step,
    )
