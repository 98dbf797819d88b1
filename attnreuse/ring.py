"""MapRing: one preallocated buffer for every layer's map, laid out before the run.

A layer holds its map from its first capture to its last reuse. Maps whose lifetimes do not overlap
share bytes, so the buffer is the peak of what lives at once, known to the byte before it is allocated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnreuse.errors import MemoryBudgetError
from attnreuse.formats import AttentionMap, MapFormat


@dataclass(frozen=True)
class MapRequest:
    """One layer's map: `shape` ``(B, H, M, N)``, alive in steps `first` to `last`, both included."""

    name: str
    shape: tuple[int, int, int, int]
    first: int
    last: int
    reuses: int

    def overlaps(self, other: MapRequest) -> bool:
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class RingPlan:
    """Where each map lies.

    Attributes:
        map_format: of every map.
        requests: what is planned, by layer name.
        offsets: first byte of each layer's slot, by layer name.
        nbytes: size of the buffer; what :class:`MapRing` allocates, exactly.
        dropped: layers that the memory budget left out, with the bytes each would have taken.
    """

    map_format: MapFormat
    requests: dict[str, MapRequest]
    offsets: dict[str, int]
    nbytes: int
    dropped: dict[str, int]


def plan_ring(requests: list[MapRequest], map_format: MapFormat, memory_budget: int | None = None) -> RingPlan:
    """Lay maps out in one buffer; largest first, each at the lowest offset free over its lifetime.

    Under a `memory_budget` (bytes) the layers that save most time per byte are kept as long as they
    fit: a reuse saves about ``M N D`` products on ``M N`` bytes, so those with most reuses come
    first and, among equals, the smallest maps.

    Raises:
        MemoryBudgetError: not even one layer fits.

    Source: greedy by size, arXiv 2001.03288.
    """
    kept: list[MapRequest] = []
    dropped: dict[str, int] = {}
    for request in sorted(requests, key=lambda r: (-r.reuses, map_format.nbytes(r.shape), r.name)):
        if memory_budget is None or _place([*kept, request], map_format)[1] <= memory_budget:
            kept.append(request)
        else:
            dropped[request.name] = map_format.nbytes(request.shape)
    if dropped and not kept:
        raise MemoryBudgetError(
            f"memory_budget of {memory_budget} bytes holds no map at all: the smallest takes "
            f"{min(dropped.values())} bytes; raise the budget or choose a smaller map_format than {map_format.name}"
        )
    offsets, nbytes = _place(kept, map_format)
    return RingPlan(map_format, {r.name: r for r in kept}, offsets, nbytes, dropped)


def _place(requests: list[MapRequest], map_format: MapFormat) -> tuple[dict[str, int], int]:
    """Offsets by name, and the bytes up to the end of the last slot."""
    placed: list[tuple[MapRequest, int, int]] = []  # request, start, end
    for request in sorted(requests, key=lambda r: (-map_format.nbytes(r.shape), r.name)):
        size, start = map_format.nbytes(request.shape), 0
        for other, other_start, other_end in sorted(placed, key=lambda entry: entry[1]):
            if request.overlaps(other) and start < other_end and other_start < start + size:
                start = other_end
        placed.append((request, start, start + size))
    return {r.name: start for r, start, _ in placed}, max((end for *_, end in placed), default=0)


class MapRing:
    """The buffer of a plan, and which maps it holds.

    A slot holds a map from when its layer has written it until another layer overwrites the bytes.

    Attributes:
        plan: where each map lies.
        buffer: uint8 ``[plan.nbytes]`` on `device`.
        places: by layer, where its map lies, held or not.
        outlines: by layer, a tensor of its map's shape.
        captured_at: for each layer whose map is held, the step that wrote it.
    """

    def __init__(self, plan: RingPlan, device: torch.device):
        self.plan = plan
        # Written to, so that the pages exist before the first step (torch.zeros would map them lazily).
        self.buffer = torch.empty(plan.nbytes, dtype=torch.uint8, device=device).zero_()
        self.places = {name: self._at(name, request.shape) for name, request in plan.requests.items()}
        self.outlines = {name: outline(place) for name, place in self.places.items()}
        self.captured_at: dict[str, int] = {}
        ends = {name: start + self.places[name].nbytes for name, start in plan.offsets.items()}
        self._sharing = {  # layers whose slots have bytes in common, by layer
            name: [n for n in ends if n != name and plan.offsets[n] < ends[name] and plan.offsets[name] < ends[n]]
            for name in ends
        }

    def _at(self, name: str, shape: tuple[int, int, int, int]) -> AttentionMap:
        start = self.plan.offsets[name]
        return AttentionMap.view(self.plan.map_format, shape, self.buffer[start:][: self.plan.map_format.nbytes(shape)])

    @property
    def slots(self) -> dict[str, AttentionMap]:
        """The maps that are held, by layer."""
        return {name: self.places[name] for name in self.captured_at}

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.buffer.numel() * self.buffer.element_size()

    def captured(self, name: str, step: int) -> None:
        """Note that the slot of layer `name` now holds the map of `step`, and what it overwrote is gone."""
        for other in self._sharing[name]:
            self.captured_at.pop(other, None)
        self.captured_at[name] = step

    def keep_rows(self, rows: list[int]) -> None:
        """From now on the maps are of these rows of their batch, in this order; what is held is moved."""
        for name, attn_map in self.places.items():
            moved = self._at(name, (len(rows), *attn_map.shape[1:]))
            if name in self.captured_at:
                parts = (attn_map.codes[rows], attn_map.block_max[rows], attn_map.lse[rows])  # copies: the maps overlap
                for target, part in zip((moved.codes, moved.block_max, moved.lse), parts, strict=True):
                    target.copy_(part)
            self.places[name], self.outlines[name] = moved, outline(moved)


def outline(attn_map: AttentionMap) -> Tensor:
    """A tensor of the map's shape ``[B, H, M, N]`` over one byte of it: its sizes may be symbols to a compiler."""
    return attn_map.storage[:1].expand(attn_map.shape)
