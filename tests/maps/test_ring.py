"""The ring's plan: no two living maps share a byte, and what is predicted is what is allocated."""

from operator import attrgetter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnreuse import MemoryBudgetError, ops
from attnreuse.maps.formats import FORMATS
from attnreuse.maps.ring import MapRequest, MapRing, plan_ring

CPU = torch.device("cpu")
PARTS = [attrgetter("codes"), attrgetter("block_max"), attrgetter("lse")]


@st.composite
def requests(draw):
    count = draw(st.integers(1, 8))
    made = []
    for i in range(count):
        shape = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 200)))
        first = draw(st.integers(0, 8))
        last = draw(st.integers(first + 1, 10))
        made.append(MapRequest(f"layer{i}", shape, first, last, draw(st.integers(1, last - first))))
    return made


def peak(made, map_format):
    """Most bytes alive at one step: no plan can do with less."""
    return max(sum(map_format.nbytes(r.shape) for r in made if r.first <= t <= r.last) for t in range(11))


@given(requests(), st.sampled_from(list(FORMATS.values())))
@settings(max_examples=60, deadline=None)
def test_living_maps_never_overlap_and_the_prediction_is_exact(made, map_format):
    plan = plan_ring(made, map_format)
    ends = {name: start + map_format.nbytes(plan.requests[name].shape) for name, start in plan.offsets.items()}
    for a in made:
        for b in made:
            if a is not b and a.overlaps(b):
                assert ends[a.name] <= plan.offsets[b.name] or ends[b.name] <= plan.offsets[a.name]
    assert peak(made, map_format) <= plan.nbytes <= sum(map_format.nbytes(r.shape) for r in made)
    ring = MapRing(plan, CPU)
    assert ring.nbytes == ring.buffer.numel() == plan.nbytes == max(ends.values())
    assert not ring.slots  # nothing is held yet


def test_maps_that_never_live_together_share_bytes():
    shape, u8 = (2, 4, 64, 64), FORMATS["u8"]
    early, late = MapRequest("early", shape, 0, 4, 4), MapRequest("late", shape, 5, 9, 4)
    plan = plan_ring([early, late], u8)
    assert plan.offsets == {"early": 0, "late": 0}
    assert plan.nbytes == u8.nbytes(shape)


def test_reuses_share_one_workspace_behind_the_slots():
    shape, u7 = (1, 2, 64, 64), FORMATS["u7"]
    made = [MapRequest("a", shape, 0, 4, 4, workspace=512), MapRequest("b", shape, 0, 4, 4, workspace=768)]
    plan = plan_ring(made, u7)
    assert plan.slots == 2 * u7.nbytes(shape)
    assert plan.nbytes == plan.slots + 768
    ring = MapRing(plan, CPU)
    assert ring.nbytes == plan.nbytes
    assert ring.workspace.numel() == 768
    ring.workspace.fill_(7)
    assert not any(place.storage.any() for place in ring.places.values())
    assert MapRing(plan_ring([MapRequest("a", shape, 0, 4, 4)], u7), CPU).workspace is None
    short = plan_ring(made, u7, plan.nbytes - 1)
    assert list(short.dropped) == ["b"]
    assert short.nbytes == u7.nbytes(shape) + 512


def test_what_overwrites_a_map_takes_its_place():
    shape = (1, 1, 8, 8)
    ring = MapRing(plan_ring([MapRequest("a", shape, 0, 1, 1), MapRequest("b", shape, 2, 3, 1)], FORMATS["u8"]), CPU)
    ring.captured("a", 0)
    assert ring.captured_at == {"a": 0}
    ring.captured("b", 2)
    assert ring.captured_at == {"b": 2}


@given(requests(), st.floats(0.05, 1.0))
@settings(max_examples=60, deadline=None)
def test_a_budget_is_kept_and_what_it_drops_is_told(made, share):
    u8 = FORMATS["u8"]
    budget = int(share * plan_ring(made, u8).nbytes)
    if budget < min(u8.nbytes(r.shape) for r in made):
        with pytest.raises(MemoryBudgetError, match=f"memory_budget of {budget} bytes"):
            plan_ring(made, u8, budget)
        return
    plan = plan_ring(made, u8, budget)
    assert plan.nbytes <= budget
    assert set(plan.offsets) | set(plan.dropped) == {r.name for r in made}
    assert not set(plan.offsets) & set(plan.dropped)


@pytest.mark.parametrize("name", FORMATS)
def test_capture_writes_only_inside_its_slot(name):
    shapes = [(1, 2, 63, 77), (1, 2, 33, 33), (1, 2, 40, 129)]
    made = [MapRequest(f"layer{i}", shape, 0, 1, 1) for i, shape in enumerate(shapes)]
    ring = MapRing(plan_ring(made, FORMATS[name]), CPU)
    for request in made:
        ring.buffer.fill_(0xA5)
        _, h, m, n = request.shape
        q, k, v = torch.randn(1, h, m, 40), torch.randn(1, h, n, 40), torch.randn(1, h, n, 40)
        ops.capture(q, k, v, into=ring.places[request.name])
        start = ring.plan.offsets[request.name]
        end = start + ring.places[request.name].nbytes
        assert (ring.buffer[:start] == 0xA5).all()
        assert (ring.buffer[end:] == 0xA5).all()


@pytest.mark.parametrize("frames", [1, 2])  # pictures of a video for each row of the batch
@pytest.mark.parametrize("rows", [[1], [2, 0], [0, 1, 2], [2, 1, 0]])
@pytest.mark.parametrize("name", FORMATS)
def test_rows_that_are_kept_keep_their_maps(name, rows, frames):
    shape = (3 * frames, 2, 33, 129)
    made = [MapRequest("held", shape, 0, 1, 1), MapRequest("not yet", shape, 0, 1, 1)]
    ring = MapRing(plan_ring(made, FORMATS[name]), CPU)
    q, k, v = (torch.randn(3 * frames, 2, tokens, 40) for tokens in (33, 129, 129))
    ops.capture(q, k, v, into=ring.places["held"])
    ring.captured("held", 0)
    expected = [part(ring.slots["held"]).unflatten(0, (3, frames))[rows].flatten(0, 1) for part in PARTS]
    ring.keep_rows(rows, batch=3)
    assert set(ring.slots) == {"held"}
    assert all(torch.equal(part(ring.slots["held"]), was) for part, was in zip(PARTS, expected, strict=True))
    assert ring.places["not yet"].shape == (len(rows) * frames, 2, 33, 129)
    assert ring.slots["held"].storage.data_ptr() >= ring.buffer.data_ptr()
