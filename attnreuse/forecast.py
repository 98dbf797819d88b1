"""`attnreuse plan`: memory and attention time of a policy, from a model's configs alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from attnreuse.denoiser import holding_layers, layer_kinds, select_layers
from attnreuse.errors import UnsupportedLayerError
from attnreuse.formats import map_format as format_named
from attnreuse.planner import LayerCost, map_requests, map_shapes, measure_costs, parse_bytes
from attnreuse.policy import Action, Policy
from attnreuse.ring import RingPlan, plan_ring
from attnreuse.samplers import make_scheduler
from attnreuse.schedule import Schedule


@dataclass
class Blueprint:
    """A pipeline without its weights: the denoiser on the meta device, its scheduler, sizes."""

    denoiser: Any
    scheduler: Any
    vae_scale: int
    tokens: int

    @classmethod
    def load(cls, model: str, scheduler: str | None = None) -> Blueprint:
        """Read the configs of a pipeline folder or hub name; `scheduler` as in :func:`make_scheduler`."""
        from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel

        index = DiffusionPipeline.load_config(model)
        if index.get("unet", [None, None])[1] != "UNet2DConditionModel":
            raise UnsupportedLayerError(
                f"{model}: expected a pipeline with a UNet2DConditionModel, got {sorted(index)}"
            )
        with torch.device("meta"):
            denoiser = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(model, subfolder="unet"))
        vae = AutoencoderKL.load_config(model, subfolder="vae")
        text = UNet2DConditionModel.load_config(model, subfolder="text_encoder")
        return cls(
            denoiser.eval(),
            make_scheduler(DDIMScheduler.load_config(model, subfolder="scheduler"), scheduler),
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


@dataclass
class LayerForecast:
    """One layer: its map ``(B, H, M, N)``, bytes that it stores, place in the ring, and seconds by action."""

    name: str
    shape: tuple[int, int, int, int]
    head_dim: int
    actions: list[Action]
    map_bytes: int
    offset: int | None
    steps: tuple[int, int] | None  # first capture, last reuse
    cost: LayerCost | None


@dataclass
class Forecast:
    """What a policy will need and, where measured, should gain in attention."""

    policy: Policy
    map_format: str
    ring: RingPlan
    layers: list[LayerForecast]

    def seconds(self) -> tuple[float, float] | None:
        """Attention seconds of a run with every step computed, and with the policy; None if unmeasured."""
        costs = [(layer.cost, layer.actions, layer.offset) for layer in self.layers]
        if any(cost is None for cost, *_ in costs):
            return None
        full = sum(cost.compute * len(actions) for cost, actions, _ in costs)
        held = sum(cost.compute * len(a) if at is None else cost.total(a) for cost, a, at in costs)
        return full, held

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        seconds = self.seconds()
        return {
            "policy": self.policy.model_dump(mode="json", exclude_none=True),
            "map_format": self.map_format,
            "predicted_bytes": self.ring.nbytes,
            "dropped": self.ring.dropped,
            "layers": [asdict(layer) for layer in self.layers],
            "attention_seconds": seconds and {"computed": seconds[0], "with_policy": seconds[1]},
        }

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table(title=f"{self.policy}, {self.map_format} maps")
        for column in ("layer", "map B H M N", "bytes", "offset", "steps", "compute", "capture", "reuse", "hold"):
            table.add_column(column, justify="left" if column == "layer" else "right")
        for layer in self.layers:
            place = ["does not fit" if layer.name in self.ring.dropped else "unused", ""]
            if layer.offset is not None:
                place = [f"{layer.offset:,}", f"{layer.steps[0]}-{layer.steps[1]}"]
            times = [f"{1e3 * s:.2f} ms" for s in asdict(layer.cost).values()] if layer.cost else [""] * 4
            shape = "x".join(map(str, layer.shape))
            table.add_row(layer.name, shape, f"{layer.map_bytes:,}", *place, *times)
        return Group(table, f"ring: {self.ring.nbytes:,} bytes ({self.ring.nbytes / 2**20:.1f} MiB)", self._gain())

    def _gain(self) -> str:
        seconds = self.seconds()
        if seconds is None:
            return "not measured (--no-measure)"
        full, held = seconds
        advice = "it should pay" if held < 0.97 * full else "do not: it would not pay on this device"
        return f"attention, with its projections: {full:.2f} s computed, {held:.2f} s with this policy; {advice}"


def forecast(
    blueprint: Blueprint,
    policy: Policy,
    *,
    map_format: str,
    layers: str | None,
    size: tuple[int, int],
    batch: int,
    dtype: torch.dtype,
    memory_budget: int | str | None = None,
    measure_on: torch.device | None = None,
) -> Forecast:
    """Plan `policy` for pictures of `size` (height, width) and `batch` denoiser rows in `dtype`."""
    chosen = format_named(map_format)
    wanted = set(select_layers(layer_kinds(blueprint.denoiser), layers, policy.patterns))
    shapes = map_shapes(blueprint.denoiser, blueprint.inputs(size, batch))
    names = [name for name in shapes if name in wanted]
    schedule = Schedule(policy, names, holding_layers(blueprint.denoiser))
    requests = {r.name: r for r in map_requests(schedule, names, shapes, dtype)}
    ring = plan_ring(list(requests.values()), chosen, parse_bytes(memory_budget))
    costs = measure_costs(names, shapes, chosen, dtype, measure_on) if measure_on else {}
    rows = [
        LayerForecast(
            name,
            shapes[name].map,
            shapes[name].head_dim,
            schedule.actions[name],
            requests[name].nbytes(chosen) if name in requests else 0,
            ring.offsets.get(name),
            (requests[name].first, requests[name].last) if name in requests else None,
            costs.get(name),
        )
        for name in names
    ]
    return Forecast(policy, chosen.name, ring, rows)
