"""MapRing: one preallocated buffer for every layer's map and held output, laid out before the run.

A layer's slot lives from its first capture (or kept output) to its last reuse (or hold). Slots whose lifetimes
do not overlap share bytes, so the buffer is the peak of what lives at once, known to the byte before it is
allocated.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from attnreuse.errors import MemoryBudgetError
from attnreuse.maps.formats import AttentionMap, MapFormat, align


@dataclass(frozen=True)
class MapRequest:
    """What one layer stores, alive in steps `first` to `last`, both included.

    Attributes:
        shape: of its map ``(B, H, M, N)``; None where it never reuses.
        reuses: steps that reuse or hold.
        output: shape of its output ``(B, M, C)`` in `dtype`; None where it never holds.
        workspace: bytes that its reuses work in (:func:`attnreuse.ops.workspace_bytes`), one layer after the other.
    """

    name: str
    shape: tuple[int, int, int, int] | None
    first: int
    last: int
    reuses: int
    output: tuple[int, int, int] | None = None
    dtype: torch.dtype = torch.float32
    workspace: int = 0

    def map_bytes(self, map_format: MapFormat) -> int:
        return 0 if self.shape is None else map_format.nbytes(self.shape)

    def nbytes(self, map_format: MapFormat) -> int:
        """Bytes of its slot: the map, then the output."""
        output = 0 if self.output is None else align(math.prod(self.output) * self.dtype.itemsize)
        return self.map_bytes(map_format) + output

    def overlaps(self, other: MapRequest) -> bool:
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class RingPlan:
    """Where each map lies.

    Attributes:
        map_format: of every map.
        requests: what is stored, by layer name.
        offsets: first byte of each layer's slot, by layer name.
        slots: bytes of all slots; behind them lies the workspace that all reuses share.
        nbytes: size of the buffer; what :class:`MapRing` allocates, exactly.
        dropped: layers that the memory budget left out, with the bytes each would have taken.
    """

    map_format: MapFormat
    requests: dict[str, MapRequest]
    offsets: dict[str, int]
    slots: int
    nbytes: int
    dropped: dict[str, int]


def plan_ring(requests: list[MapRequest], map_format: MapFormat, memory_budget: int | None = None) -> RingPlan:
    """Lay slots out in one buffer; largest first, each at the lowest offset free over its lifetime.

    Under a `memory_budget` (bytes) the layers that save most time per byte are kept as long as they
    fit: a reuse saves about ``M N D`` products on ``M N`` bytes, so those with most reuses come
    first and, among equals, the smallest slots.

    Raises:
        MemoryBudgetError: not even one layer fits.

    Source: greedy by size, arXiv 2001.03288.
    """
    kept: list[MapRequest] = []
    dropped: dict[str, int] = {}
    for request in sorted(requests, key=lambda r: (-r.reuses, r.nbytes(map_format), r.name)):
        more = [*kept, request]
        if memory_budget is None or _place(more, map_format)[1] + _workspace(more) <= memory_budget:
            kept.append(request)
        else:
            dropped[request.name] = request.nbytes(map_format)
    if dropped and not kept:
        raise MemoryBudgetError(
            f"memory_budget of {memory_budget} bytes holds no map at all: the smallest takes "
            f"{min(dropped.values())} bytes; raise the budget or choose a smaller map_format than {map_format.name}"
        )
    offsets, slots = _place(kept, map_format)
    return RingPlan(map_format, {r.name: r for r in kept}, offsets, slots, slots + _workspace(kept), dropped)


def _workspace(requests: list[MapRequest]) -> int:
    """Bytes that the reuses of all layers need to work in, one at a time."""
    return max((request.workspace for request in requests), default=0)


def _place(requests: list[MapRequest], map_format: MapFormat) -> tuple[dict[str, int], int]:
    """Offsets by name, and the bytes up to the end of the last slot."""
    placed: list[tuple[MapRequest, int, int]] = []  # request, start, end
    for request in sorted(requests, key=lambda r: (-r.nbytes(map_format), r.name)):
        size, start = request.nbytes(map_format), 0
        for other, other_start, other_end in sorted(placed, key=lambda entry: entry[1]):
            if request.overlaps(other) and start < other_end and other_start < start + size:
                start = other_end
        placed.append((request, start, start + size))
    return {r.name: start for r, start, _ in placed}, max((end for *_, end in placed), default=0)


@dataclass(frozen=True)
class OutputSlot:
    """Where the output of a layer is kept.

    Attributes:
        storage: uint8, flat: what compiled code may write to, since all slots lie in one uint8 buffer.
        outline: a tensor of the output's shape ``[B, M, C]``, as :func:`outline` makes it.
        dtype: of the output.
    """

    storage: Tensor
    outline: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.outline.shape

    def write(self, output: Tensor) -> None:
        """Keep `output`, of as many elements, in the order in which it is indexed."""
        self.storage.copy_(output.contiguous().flatten().view(torch.uint8))

    def read(self, shape: tuple[int, ...]) -> Tensor:
        """The output, in memory of its own."""
        return self.storage.clone().view(self.dtype).view(shape)


class MapRing:
    """The buffer of a plan, and what it holds.

    A slot holds a map, or an output, from when its layer has written it until another layer overwrites the bytes.

    Attributes:
        plan: where each slot lies.
        buffer: uint8 ``[plan.nbytes]`` on `device`.
        workspace: what reuses work in, the end of the buffer; None where they need none.
        places: by layer, where its map lies, held or not.
        outlines: by layer, a tensor of its map's shape.
        outputs: by layer, where its output lies, held or not.
        captured_at: for each layer whose map is held, the step that wrote it.
        kept_at: for each layer whose output is held, the step that wrote it and what it depended on.
    """

    def __init__(self, plan: RingPlan, device: torch.device):
        self.plan = plan
        # Written to, so that the pages exist before the first step (torch.zeros would map them lazily).
        self.buffer = torch.empty(plan.nbytes, dtype=torch.uint8, device=device).zero_()
        self.workspace = _staying(self.buffer[plan.slots :]) if plan.nbytes > plan.slots else None
        requests = plan.requests.items()
        self.places = {name: self._map(name, r.shape) for name, r in requests if r.shape is not None}
        self.outlines = {name: outline(place.shape, device) for name, place in self.places.items()}
        self.outputs = {name: self._output(name, r.output) for name, r in requests if r.output is not None}
        self.captured_at: dict[str, int] = {}
        self.kept_at: dict[str, tuple[int, object]] = {}
        ends = {name: start + plan.requests[name].nbytes(plan.map_format) for name, start in plan.offsets.items()}
        self._sharing = {  # layers whose slots have bytes in common, by layer
            name: [n for n in ends if n != name and plan.offsets[n] < ends[name] and plan.offsets[name] < ends[n]]
            for name in ends
        }

    def _map(self, name: str, shape: tuple[int, int, int, int]) -> AttentionMap:
        start = self.plan.offsets[name]
        storage = _staying(self.buffer[start:][: self.plan.map_format.nbytes(shape)])
        return AttentionMap.view(self.plan.map_format, shape, storage)

    def _output(self, name: str, shape: tuple[int, int, int]) -> OutputSlot:
        request = self.plan.requests[name]
        start = self.plan.offsets[name] + request.map_bytes(self.plan.map_format)
        storage = _staying(self.buffer[start:][: math.prod(shape) * request.dtype.itemsize])
        return OutputSlot(storage, outline(shape, self.buffer.device), request.dtype)

    @property
    def slots(self) -> dict[str, AttentionMap]:
        """The maps that are held, by layer."""
        return {name: self.places[name] for name in self.captured_at}

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.buffer.numel() * self.buffer.element_size()

    def slot_bytes(self, name: str) -> int:
        """Bytes of the slot of layer `name`, 0 if it has none."""
        request = self.plan.requests.get(name)
        return 0 if request is None else request.nbytes(self.plan.map_format)

    def captured(self, name: str, step: int) -> None:
        """Note that the slot of layer `name` now holds the map of `step`, and what it overwrote is gone."""
        self._overwritten(name)
        self.captured_at[name] = step

    def kept(self, name: str, step: int, about: object) -> None:
        """Note that the slot of layer `name` now holds its output of `step`, which depended on `about`."""
        self._overwritten(name)
        self.kept_at[name] = (step, about)

    def _overwritten(self, name: str) -> None:
        for other in self._sharing[name]:
            self.captured_at.pop(other, None)
            self.kept_at.pop(other, None)

    def forget(self) -> None:
        """Hold nothing any more."""
        self.captured_at.clear()
        self.kept_at.clear()

    def keep_rows(self, rows: list[int], batch: int) -> None:
        """From now on all is of these rows of a `batch`, in this order; what is held is moved.

        Where a layer sees several pictures for each row of the batch (frames), all of them go with it.
        """
        for name, attn_map in self.places.items():
            kept = _of_each(rows, attn_map.shape[0] // batch)
            moved = self._map(name, (len(kept), *attn_map.shape[1:]))
            if name in self.captured_at:
                parts = (attn_map.codes[kept], attn_map.block_max[kept], attn_map.lse[kept])  # copies: the maps overlap
                for target, part in zip((moved.codes, moved.block_max, moved.lse), parts, strict=True):
                    target.copy_(part)
            self.places[name], self.outlines[name] = moved, outline(moved.shape, self.buffer.device)
        for name, output in self.outputs.items():
            kept = _of_each(rows, output.shape[0] // batch)
            moved = self._output(name, (len(kept), *output.shape[1:]))
            if name in self.kept_at:
                moved.write(output.read(output.shape)[kept])
            self.outputs[name] = moved


def _of_each(rows: list[int], count: int) -> list[int]:
    """Numbers of the pictures of these rows, `count` for each."""
    return [row * count + i for row in rows for i in range(count)]


def _staying(storage: Tensor) -> Tensor:
    """`storage`, of which a compiler that is there is told that it stays where it is.

    CUDA graphs else copy each map to an input of their own, in every call, and leave out what writes to one.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.mark_static_address(storage)
    return storage


def outline(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A tensor of this shape over a byte of its own, which nobody reads: its sizes may be symbols to a compiler.

    Over a byte of the buffer the compiler could not tell it from other slots, and would take their distances as fixed.
    """
    return torch.zeros(1, dtype=torch.uint8, device=device).expand(shape)
