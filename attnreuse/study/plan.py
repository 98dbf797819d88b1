"""`attnreuse plan`: memory and time of a policy, from a model's configs alone.

Times come from runs of a pipeline of those configs with random weights: they take as long as trained ones.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import computed_field

from attnreuse.binding.denoiser import holding_layers, layer_kinds, select_layers
from attnreuse.binding.schedule import Schedule
from attnreuse.binding.shapes import LayerCost, map_requests, map_shapes, parse_bytes
from attnreuse.errors import UnsupportedLayerError
from attnreuse.maps.formats import format_named
from attnreuse.maps.ring import RingPlan, plan_ring
from attnreuse.planning.samplers import make_scheduler
from attnreuse.policy import Action, Policy
from attnreuse.results import Result
from attnreuse.study import costs
from attnreuse.study.costs import RunCosts
from attnreuse.study.evaluate import Evaluator, Setting

TIMED_STEPS, ROUNDS = 4, 2  # of each kind of run that is timed
PAYS = 0.97  # share of the full run's time above which a saving is within what two runs differ by
NOT_CALLED = ("safety_checker", "feature_extractor", "image_encoder")  # parts that a plain run does without


@dataclass
class Blueprint:
    """A pipeline without its weights: the denoiser on the meta device, its scheduler, sizes.

    Attributes:
        model: folder or hub name.
        local: read files that are here, ask no hub.
        index: its parts and their classes.
        vae_scale: pixels per latent, along a side.
        tokens: of a prompt.
    """

    model: str
    local: bool
    index: dict[str, Any]
    denoiser: Any
    scheduler: Any
    vae_scale: int
    tokens: int

    @classmethod
    def load(cls, model: str, scheduler: str | None = None, local: bool = False) -> Blueprint:
        """Read the configs of a pipeline folder or hub name; `scheduler` as in :func:`make_scheduler`."""
        from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel

        given: dict[str, Any] = {"local_files_only": local}
        index = DiffusionPipeline.load_config(model, **given)
        if index.get("unet", [None, None])[1] != "UNet2DConditionModel":
            raise UnsupportedLayerError(
                f"{model}: expected a pipeline with a UNet2DConditionModel, got {sorted(index)}"
            )
        config = UNet2DConditionModel.load_config(model, subfolder="unet", **given)
        with torch.device("meta"):
            denoiser = UNet2DConditionModel.from_config(config)
        vae = AutoencoderKL.load_config(model, subfolder="vae", **given)
        text = UNet2DConditionModel.load_config(model, subfolder="text_encoder", **given)
        return cls(
            model,
            local,
            index,
            denoiser.eval(),
            make_scheduler(DDIMScheduler.load_config(model, subfolder="scheduler", **given), scheduler),
            2 ** (len(vae["block_out_channels"]) - 1),
            text.get("max_position_embeddings") or text.get("text_config", {}).get("max_position_embeddings", 77),
        )

    @property
    def side(self) -> int:
        """The model's own resolution in pixels."""
        return self.denoiser.config.sample_size * self.vae_scale

    def inputs(self, size: tuple[int, int], batch: int) -> dict[str, Any]:
        """Arguments of the denoiser's forward for pictures of `size` (height, width), on meta."""
        config = self.denoiser.config
        height, width = (-(-pixels // self.vae_scale) for pixels in size)
        given: dict[str, Any] = {
            "sample": torch.empty(batch, config.in_channels, height, width, device="meta"),
            "timestep": 1,
            "encoder_hidden_states": torch.empty(batch, self.tokens, config.cross_attention_dim, device="meta"),
        }
        if config.addition_embed_type == "text_time":  # SDXL
            ids = config.projection_class_embeddings_input_dim
            pooled = ids - 6 * config.addition_time_embed_dim
            given["added_cond_kwargs"] = {
                "text_embeds": torch.empty(batch, pooled, device="meta"),
                "time_ids": torch.empty(batch, 6, device="meta"),
            }
        return given

    def with_random_weights(self, dtype: torch.dtype, device: torch.device) -> Any:
        """The pipeline of these configs; nothing but its tokenizers' files is read.

        Raises:
            UnsupportedLayerError: it cannot be made so.
        """
        import diffusers

        name = self.index["_class_name"]
        cls = getattr(diffusers, name, None)
        if cls is None:
            raise UnsupportedLayerError(f"{self.model}: diffusers has no {name}; --no-measure plans it")
        taken = inspect.signature(cls.__init__).parameters
        parts = {name: value for name, value in self.index.items() if name in taken}
        for name, made_by in parts.items():
            if isinstance(made_by, (list, tuple)):
                parts[name] = None if name in NOT_CALLED or made_by[1] is None else self._part(name, *made_by)
        if "requires_safety_checker" in taken:
            parts["requires_safety_checker"] = False
        pipe = cls(**parts).to(device, dtype)
        pipe.scheduler = self.scheduler
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _part(self, name: str, library: str, cls_name: str) -> Any:
        import diffusers
        import transformers

        given = {"subfolder": name, "local_files_only": self.local}
        cls = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), cls_name, None)
        if cls is None:
            raise UnsupportedLayerError(
                f"{self.model}: its {name} is a {cls_name} of {library}, which is not at hand; --no-measure plans it"
            )
        if library == "diffusers":
            return cls.from_config(cls.load_config(self.model, **given))
        if not hasattr(cls, "config_class"):  # a tokenizer
            return cls.from_pretrained(self.model, **given)
        return cls(cls.config_class.from_pretrained(self.model, **given)).eval()


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
        attention_share: of a step's time that the layers take which the policy serves, with their projections.
        full_s: seconds with every step computed.
        policy_s: seconds with the policy.
        plain_steps: ``num_inference_steps`` that take as long as the policy.
    """

    attention_share: float
    full_s: float
    policy_s: float
    plain_steps: int

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
        predicted_bytes: of the buffer.
        dropped: bytes of the maps that the memory budget leaves out, by layer.
    """

    policy: Policy
    asked_steps: int
    map_format: str
    predicted_bytes: int
    dropped: dict[str, int]
    layers: list[LayerForecast]
    run: RunForecast | None

    def __rich__(self) -> Any:
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE, pad_edge=False)
        for column in ("layers", "kind", "map", "heads", "MiB", "", "compute", "capture", "reuse", "hold"):
            table.add_column(column, justify="left" if column in ("kind", "") else "right")
        for (kind, shape, dim, fate), group in itertools.groupby(sorted(self.layers, key=_alike), key=_alike):
            layers = list(group)
            cost = layers[0].cost
            times = [f"{1e3 * seconds:.2f}" for seconds in asdict(cost).values()] if cost else []
            size = f"{layers[0].map_bytes / 2**20:.1f}"
            table.add_row(str(len(layers)), kind, f"{shape[2]}x{shape[3]}", f"{shape[1]}x{dim}", size, fate, *times)
        steps = f"{self.asked_steps} steps"
        if self.policy.steps != self.asked_steps:
            steps += f", {self.policy.steps} denoiser calls"
        size = f"{self.map_format} maps: a buffer of {self.predicted_bytes / 2**20:.1f} MiB"
        title = f"{steps}; {self.policy}; {size}"
        timed = [Text("Times are milliseconds of one layer at one step.")] if self.run else []
        return Group(Text(title), table, *timed, Text(self.verdict()))

    def verdict(self) -> str:
        """What the figures say, in sentences."""
        if self.run is None:
            return "Whether it pays is not measured (--no-measure)."
        run, steps = self.run, self.asked_steps
        share = f"The layers that reuse take {run.attention_share:.0%} of a step's time here."
        took = f"This policy should take {run.ratio:.2f} of the time of {steps} full steps ({run.full_s:.2f} s)"
        if not run.pays:
            return f"{share} No, it does not pay: {took[0].lower()}{took[1:]}."
        return (
            f"{share} {took}, as {run.plain_steps} plain steps do. `attnreuse sample` shows which of the two keeps the "
            "picture better."
        )


def _alike(layer: LayerForecast) -> tuple[str, tuple[int, int, int, int], int, str]:
    """What layers of one line of the table share."""
    fate = "" if layer.offset is not None else "computes" if layer.steps is None else "does not fit"
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
) -> Forecast:
    """Plan `policy` for a batch of `pictures` of `size` (height, width) in `dtype`.

    Args:
        asked_steps: ``num_inference_steps`` whose executed steps the policy is for.
        guidance: classifier-free guidance doubles the denoiser's rows.
        measure_on: time runs on this device; None: do not.
    """
    chosen, denoiser = format_named(map_format), blueprint.denoiser
    kinds = layer_kinds(denoiser)
    wanted = set(select_layers(kinds, layers, policy.patterns))
    shapes = map_shapes(denoiser, blueprint.inputs(size, pictures * (2 if guidance else 1)))
    schedule = Schedule(policy, [name for name in shapes if name in wanted], holding_layers(denoiser))
    requests = {r.name: r for r in map_requests(schedule, list(schedule.actions), shapes, dtype)}
    ring = plan_ring(list(requests.values()), chosen, parse_bytes(memory_budget))
    run_costs = None
    if measure_on is not None:
        setting = Setting(
            ("",) * pictures, TIMED_STEPS, guidance=7.5 if guidance else 1.0, size=size, map_format=chosen.name,
            layers=tuple(schedule.actions), batch=pictures,
        )  # fmt: skip
        pipe = blueprint.with_random_weights(dtype, measure_on)
        run_costs = costs.measure(Evaluator(pipe, setting), ROUNDS)
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
        predicted_bytes=ring.nbytes,
        dropped=ring.dropped,
        layers=rows,
        run=run,
    )


def _run(run_costs: RunCosts, schedule: Schedule, ring: RingPlan, asked_steps: int) -> RunForecast:
    """What a run should take whose layers without a place in the ring compute."""
    steps = schedule.policy.steps
    nothing = Schedule(Policy(steps=steps, reuse=(False,) * steps), schedule.actions)
    served = Schedule(schedule.policy, ring.offsets, schedule.holding)
    attention = sum(cost.compute for cost in run_costs.layers.values())
    full_s = run_costs.seconds(nothing)
    dropped = sum(run_costs.layers[name].compute * steps for name in schedule.actions if name not in ring.offsets)
    policy_s = run_costs.seconds(served) + dropped
    calls = (policy_s - run_costs.fixed) / (run_costs.step + attention)
    plain = max(1, min(asked_steps, round(asked_steps * calls / steps)))
    share = attention / (run_costs.step + attention)
    return RunForecast(attention_share=share, full_s=full_s, policy_s=policy_s, plain_steps=plain)
