"""The search of the ladder: compute, reuse or hold, per step and group of layers."""

import pytest
from tiny_random import captioned_pipeline

from attnreuse import AttnReuseError, Policy, ladder
from attnreuse.evaluate import Evaluator, Setting
from attnreuse.front import Front, Point, layer_groups
from attnreuse.rows import strip
from attnreuse.search import InProcess

PROMPTS = ("a red circle on gray", "a blue square on white")


@pytest.fixture(scope="module")
def pipe():
    return captioned_pipeline()


def evaluator(pipe, layers="all", **changes):
    return Evaluator(pipe, Setting(PROMPTS, 6, map_format="fp32", batch=2, layers=layers, **changes))


def cheap(made):
    """Costs that no clock decides: reuse costs a quarter, hold nothing, and attention is half of the time."""
    from attnreuse.planner import LayerCost

    made._costs = {name: LayerCost(1.0, 1.1, 0.25, 0.0) for name in made.served()}
    return made


@pytest.fixture
def fixed(monkeypatch):
    from attnreuse import front

    monkeypatch.setattr(front, "_seconds", lambda made: 2 * 6 * len(made.served()))


def test_layers_are_grouped_by_kind_level_and_name(pipe):
    everything = evaluator(pipe)
    assert set(layer_groups(everything, "kind")) == {"self", "cross"}
    assert set(layer_groups(everything, "level")) == {"self@64", "self@16", "cross@64", "cross@16"}
    names = [n for group in layer_groups(everything, "level").values() for n in group]
    assert sorted(names) == sorted(layer_groups(everything, "layer"))
    assert set(layer_groups(evaluator(pipe, "self"), "kind")) == {"self"}


def test_the_front_is_of_measured_points_that_none_beats(pipe, fixed, tmp_path):
    made, seen = cheap(evaluator(pipe)), []
    found = ladder(
        InProcess(made), by="kind", budget=40, cache=tmp_path / "c.jsonl", progress=lambda *a: seen.append(a)
    )
    assert found.evaluations == 40 == len(seen)
    assert found.stopped == "budget"
    times = [p.time for p in found.points]
    qualities = [p.psnr_db for p in found.points]
    assert times == sorted(times)
    assert qualities == sorted(qualities)
    assert len(found.points) > 5
    assert 0.5 <= times[0] < times[-1] < 1
    for point in found.points[:: len(found.points) // 3]:
        assert made.scores(point.policy)["psnr"] == point.psnr_db
        schedule = made.schedule(point.policy)
        saved = sum(6 - cost.total(schedule.actions[n]) for n, cost in made._costs.items())
        assert point.time == pytest.approx(1 - saved / found.full_s)
        assert point.policy.metrics["psnr_db"] == pytest.approx(point.psnr_db, abs=1e-3)
    again = ladder(InProcess(cheap(evaluator(pipe))), by="kind", budget=40, cache=tmp_path / "c.jsonl")
    assert again == found


def test_groups_get_rows_of_their_own_with_all_letters(pipe, fixed):
    found = ladder(InProcess(cheap(evaluator(pipe))), by="level", budget=70)
    letters = {letter for p in found.points for name in p.policy.patterns for letter in strip(p.policy.row(name))}
    assert letters == {".", "R", "H"}
    assert any(len({p.policy.row(name) for name in p.policy.patterns}) > 1 for p in found.points)


def test_a_point_is_picked_by_quality_or_time():
    points = [Point(Policy(steps=2, reuse=".R"), time, psnr) for time, psnr in ((0.6, 30.0), (0.7, 40.0), (0.8, 50.0))]
    front = Front(points, 1.0, 3, "budget")
    assert front.pick(floor=35) == points[1]
    assert front.pick(time=0.75) == points[1]
    assert front.pick(floor=45, time=0.9) == points[2]
    with pytest.raises(AttnReuseError, match=r"at least 55 dB of.*from 30.0 dB at 0.60 to 50.0 dB at 0.80"):
        front.pick(floor=55)
    with pytest.raises(AttnReuseError, match=r"at least 45 dB and at most 0\.7 of"):
        front.pick(floor=45, time=0.7)


def test_a_memory_budget_is_kept(pipe, fixed):
    made = cheap(evaluator(pipe))
    whole = ladder(InProcess(made), by="kind", budget=20)
    most = max(made.map_bytes(p.policy) for p in whole.points) // 2
    found = ladder(InProcess(cheap(evaluator(pipe))), by="kind", budget=20, memory_budget=most)
    assert found.points
    assert all(made.map_bytes(p.policy) <= most for p in found.points)
    with pytest.raises(AttnReuseError, match="no schedule fits the memory budget of 10 bytes"):
        ladder(InProcess(made), by="kind", budget=20, memory_budget=10)


def test_bad_input_is_refused(pipe):
    for given in ({"by": "levels"}, {"budget": 0}):
        with pytest.raises(ValueError, match=r"'levels'|budget of at least 1"):
            ladder(InProcess(evaluator(pipe)), **given)
    with pytest.raises(ValueError, match="at least 2 steps, got 200 and 1"):
        ladder(InProcess(Evaluator(pipe, Setting(PROMPTS, 1))))


def test_time_ends_the_search(pipe, fixed, monkeypatch):
    from attnreuse import front

    with pytest.raises(AttnReuseError, match="no schedule was judged in that time"):
        ladder(InProcess(cheap(evaluator(pipe))), budget_time=0.0)
    ticks = iter(range(1000))
    monkeypatch.setattr(front.time, "monotonic", lambda: next(ticks))
    found = ladder(InProcess(cheap(evaluator(pipe))), budget_time=3.0)
    assert (found.stopped, found.evaluations) == ("time", 2 * front.WIDTH)


def test_where_nothing_pays_the_front_is_empty_and_says_so(pipe, fixed):
    from attnreuse.planner import LayerCost

    made = evaluator(pipe, "self")
    made._costs = {name: LayerCost(1.0, 3.0, 2.0, 1.5) for name in made.served()}
    found = ladder(InProcess(made), by="kind", budget=8)
    assert found.points == []
    with pytest.raises(AttnReuseError, match="none of 8 schedules is predicted to be faster than full steps"):
        found.pick(time=0.9)
