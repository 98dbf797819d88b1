"""The search of the ladder: compute, reuse or hold, per step and group of layers."""

import itertools
import json
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_random import captioned_pipeline

from attnreuse import AttnReuseError, Policy, ladder
from attnreuse.binding.processors import attention_layers
from attnreuse.binding.shapes import LayerCost
from attnreuse.planning.rows import strip
from attnreuse.search import InProcess
from attnreuse.study.compare.other_caches import OTHER_CACHES
from attnreuse.study.costs import RunCosts, measure, shares
from attnreuse.study.evaluate import Evaluator
from attnreuse.study.metrics import PAIRED
from attnreuse.study.search.candidates import layer_groups
from attnreuse.study.search.front import Front, Point
from attnreuse.study.search.ladder import FEWER
from attnreuse.study.setting import Setting

PROMPTS = ("a red circle on gray", "a blue square on white")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def pipe():
    return captioned_pipeline()


def evaluator(pipe, layers="all", **changes):
    return Evaluator(pipe, Setting(PROMPTS, 6, map_format="fp32", batch=2, layers=layers, **changes))


def cheap(made, attention=LayerCost(1.0, 1.1, 0.25, 0.0)):  # noqa: B008 (frozen)
    """Costs that no clock decides: attention is half of the time, but for what a run takes once."""
    layers = dict.fromkeys(made.served(), attention)
    return RunCosts(fixed=1.0, step=attention.compute * len(layers), session=0.0, layers=layers)


def search(made, **given):
    return ladder(InProcess(made), run_costs=cheap(made), **given)


@pytest.fixture(scope="module")
def found(pipe, tmp_path_factory):
    """A search whose scores are kept in a file, and what its progress was told."""
    cache, seen = tmp_path_factory.mktemp("front") / "c.jsonl", []
    made = evaluator(pipe)
    return made, search(made, by="kind", budget=60, cache=cache, progress=lambda *a: seen.append(a)), seen, cache


def test_layers_are_grouped_by_kind_level_and_name(pipe):
    everything = evaluator(pipe)
    assert set(layer_groups(everything, "kind")) == {"self", "cross"}
    assert set(layer_groups(everything, "level")) == {"self@64", "self@16", "cross@64", "cross@16"}
    names = [n for group in layer_groups(everything, "level").values() for n in group]
    assert sorted(names) == sorted(layer_groups(everything, "layer"))
    assert set(layer_groups(evaluator(pipe, "self"), "kind")) == {"self"}


def test_the_front_is_of_measured_points_that_none_beats(found):
    made, front, seen, cache = found
    assert front.evaluations == 60 == len(seen)
    assert front.stopped == "budget"
    times = [p.time for p in front.points]
    qualities = [p.psnr_db for p in front.points]
    assert times == sorted(times)
    assert qualities == sorted(qualities)
    assert len(front.points) > 5
    assert times[-1] < 1
    full = cheap(made).seconds(made.schedule(Policy(steps=6, reuse="......")))
    for point in front.points[:: len(front.points) // 3]:
        judge = made.at(point.steps)
        assert judge.scores(point.policy)["psnr"] == point.psnr_db
        assert point.time == cheap(made).seconds(judge.schedule(point.policy)) / full
        assert point.policy.metrics["psnr_db"] == pytest.approx(point.psnr_db, abs=1e-3)
    assert search(evaluator(made.pipe), by="kind", budget=60, cache=cache) == front


def test_groups_get_rows_of_their_own_with_all_letters(found):
    points = found[1].points
    letters = {letter for p in points for name in p.policy.patterns for letter in strip(p.policy.row(name))}
    assert letters == {".", "R", "H"}
    assert any(len({p.policy.row(name) for name in p.policy.patterns}) > 1 for p in points)


def assert_no_fewer_steps_lie_above(made, front):
    for count in sorted({round(6 * share) for share in FEWER} - {6}):
        psnr = PAIRED["psnr"](made.at(count).full.pictures, made.full.pictures).mean()
        time = (1.0 + 2 * count * len(made.served())) / (1.0 + 12 * len(made.served()))
        assert any(p.time <= time + 1e-9 and p.psnr_db >= psnr - 1e-3 for p in front.points), count


def test_no_run_of_fewer_steps_lies_above_the_front(found):
    made, front, *_ = found
    assert_no_fewer_steps_lie_above(made, front)
    assert any(p.steps < 6 for p in front.points)


def test_other_steps_are_judged_against_the_same_pictures(pipe):
    made = evaluator(pipe)
    fewer = made.at(4)
    assert fewer is made.at(4) is not made is made.at(6)
    assert (fewer.executed_steps, made.executed_steps) == (4, 6)
    nothing = Policy(steps=4, reuse="....")
    alone = Evaluator(made.pipe, fewer.setting)
    psnr = PAIRED["psnr"](alone.sample(nothing).pictures, made.full.pictures).mean()
    assert fewer.scores(nothing)["psnr"] == pytest.approx(psnr) != alone.scores(nothing)["psnr"]


def test_a_front_is_kept_in_a_file(tmp_path):
    policy = Policy(steps=3, reuse={"up_blocks.*": ".RH", "*": "..R"}, levels=(1.0, 0.5, -1.0))
    point = Point(policy=policy, steps=3, time=0.75, psnr_db=41.5)
    front = Front(points=[point], full_s=1.0, evaluations=3, pictures=2, stopped="budget")
    front.save(tmp_path / "front.json")
    assert Front.load(tmp_path / "front.json") == front
    policy.save(tmp_path / "policy.json")
    with pytest.raises(ValueError, match=r"policy\.json is not a front file"):
        Front.load(tmp_path / "policy.json")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("ladder-*.json")), ids=lambda path: path.name)
def test_fronts_that_were_measured_are_read(path):
    assert Front.load(path).pick(floor=30).psnr_db >= 30


def test_a_point_is_picked_by_quality_or_time():
    points = [
        Point(policy=Policy(steps=2, reuse=".R"), steps=2, time=time, psnr_db=psnr)
        for time, psnr in ((0.6, 30.0), (0.7, 40.0), (0.8, 50.0))
    ]
    front = Front(points=points, full_s=1.0, evaluations=3, pictures=2, stopped="budget")
    assert front.pick(floor=35) == points[1]
    assert front.pick(time=0.75) == points[1]
    assert front.pick(floor=45, time=0.9) == points[2]
    with pytest.raises(
        AttnReuseError, match=r"none of 3 .* 55 dB: they go from 30.0 dB at 0.60 of .* to 50.0 dB at 0.80"
    ):
        front.pick(floor=55)
    with pytest.raises(AttnReuseError, match=r"at least 45 dB and at most 0\.7 of the full run's time: "):
        front.pick(floor=45, time=0.7)
    with pytest.raises(ValueError, match=r"by floor .* or time"):
        front.pick()


def test_a_memory_budget_is_kept(pipe):
    made = evaluator(pipe)
    whole = search(made, by="kind", budget=30)
    most = max(made.at(p.steps).map_bytes(p.policy) for p in whole.points) // 2
    found = search(evaluator(pipe), by="kind", budget=30, memory_budget=most)
    assert any(p.policy.reuse_steps for p in found.points)
    assert all(made.at(p.steps).map_bytes(p.policy) <= most for p in found.points)
    nothing = search(made, by="kind", budget=30, memory_budget=10)
    assert nothing.points
    assert not any(p.policy.reuse_steps for p in nothing.points)  # fewer steps need none


def test_bad_input_is_refused(pipe):
    for given in ({"by": "levels"}, {"budget": 0}):
        with pytest.raises(ValueError, match=r"'levels'|budget of at least 1"):
            ladder(InProcess(evaluator(pipe)), **given)
    with pytest.raises(ValueError, match="at least 2 steps, got 200 and 1"):
        ladder(InProcess(Evaluator(pipe, Setting(PROMPTS, 1))))


def test_time_ends_the_search(pipe, monkeypatch):
    from attnreuse.study.search import ladder as front

    with pytest.raises(AttnReuseError, match="no schedule was judged in that time"):
        search(evaluator(pipe), budget_time=0.0)
    ticks = iter(range(1000))
    monkeypatch.setattr(front.time, "monotonic", lambda: next(ticks))
    found = search(evaluator(pipe), budget_time=2.0)
    assert (found.stopped, found.evaluations) == ("time", front.WIDTH)


def test_where_no_cache_pays_the_front_is_of_fewer_steps(pipe):
    made = evaluator(pipe, "self")
    dear = cheap(made, LayerCost(1.0, 30.0, 20.0, 15.0))
    found = ladder(InProcess(made), by="kind", budget=30, run_costs=dear)
    assert found.points
    assert not any(p.policy.reuse_steps for p in found.points)
    with pytest.raises(AttnReuseError, match=r"none of \d+ schedules has at most 0\.1 of"):
        found.pick(time=0.1)


def test_other_pictures_confirm_the_front(pipe):
    made = evaluator(pipe)
    others = replace(made.setting, prompts=("a cyan triangle on black", "a red square on white"), seed=7)
    plain = search(made, by="kind", budget=40)
    found = search(made, by="kind", budget=40, confirm=others)
    assert (found.evaluations, found.pictures, plain.pictures) == (40, 2, 2)
    judge = Evaluator(pipe, others)
    for point in found.points:
        assert judge.at(point.steps).scores(point.policy)["psnr"] == pytest.approx(point.psnr_db)
    qualities = [p.psnr_db for p in found.points]
    assert qualities == sorted(qualities)
    assert qualities != [p.psnr_db for p in plain.points]
    assert_no_fewer_steps_lie_above(judge, found)


def test_what_needs_no_search_is_confirmed_wherever_it_stands(pipe, monkeypatch, tmp_path):
    """Fewer steps and one row for all groups: what a search finds must beat them by other pictures, too."""
    made, cache = evaluator(pipe), tmp_path / "c.jsonl"
    monkeypatch.setattr(sys.modules["attnreuse.study.search.ladder"], "CONFIRMED", 2)
    others = replace(made.setting, prompts=("a red square on white",), seed=7)
    search(made, by="kind", budget=60, cache=cache, confirm=others)
    lines = [json.loads(line) for line in cache.read_text().splitlines()]
    setting = Evaluator(pipe, others).key()
    confirmed = {(line["steps"], line["reuse"]) for line in lines if line["setting"] == setting}
    assert {count for count, _ in confirmed} == {2, 3, 4, 5, 6}
    held = {name: ".H.H.H" for name in made.served() if "attn1" in name}
    assert (6, json.dumps(held, sort_keys=True)) in confirmed


def test_a_long_front_is_confirmed_from_end_to_end(pipe, monkeypatch):
    made = evaluator(pipe)
    plain = search(made, by="kind", budget=40)
    assert len(plain.points) > 10
    monkeypatch.setattr(sys.modules["attnreuse.study.search.ladder"], "CONFIRMED", 5)
    others = replace(made.setting, prompts=("a red square on white",), seed=7)
    found = search(made, by="kind", budget=40, confirm=others)
    half = plain.points[len(plain.points) // 2].time
    assert found.points[0].time < half < found.points[-1].time


def test_what_is_confirmed_is_timed_once(pipe, tmp_path, monkeypatch):
    from attnreuse.study import costs

    made, timed = evaluator(pipe), []
    others = replace(made.setting, prompts=("a cyan triangle on black", "a red square on white"), seed=7)
    predicted_by, chance = cheap(made), random.Random(0)

    def shares(of, runs, progress):
        timed.append(runs)
        seconds = [predicted_by.seconds(made.at(steps).schedule(policy)) for steps, policy in runs]
        return [0.1 + 0.8 * s / max(seconds) + chance.uniform(-0.01, 0.01) for s in seconds]

    monkeypatch.setattr(costs, "shares", shares)
    monkeypatch.setattr(costs, "measure", lambda made, progress: cheap(made))
    first = ladder(InProcess(made), by="kind", budget=30, cache=tmp_path / "c.jsonl", confirm=others)
    assert first.times == "fitted"
    predicted = ladder(InProcess(made), by="kind", budget=30, cache=tmp_path / "c.jsonl")
    times = {(p.steps, str(p.policy.reuse)): p.time for p in predicted.points}
    both = [(times[key], p.time) for p in first.points if (key := (p.steps, str(p.policy.reuse))) in times]
    assert len(both) > 2
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(both)]
    assert slopes == pytest.approx(slopes[:1] * len(slopes))  # one line for all
    seconds = [predicted_by.seconds(made.at(steps).schedule(policy)) for steps, policy in timed[0]]
    least, most = (0.1 + 0.8 * s / max(seconds) for s in (min(seconds), max(seconds)))
    assert all(least - 0.01 <= measured < most + 0.01 for _, measured in both)
    assert ladder(InProcess(made), by="kind", budget=30, cache=tmp_path / "c.jsonl", confirm=others) == first
    assert len(timed) == 1


def test_shares_are_of_the_full_run(pipe):
    made = evaluator(pipe)
    never, half = (Policy(steps=n, reuse=[False] * n) for n in (6, 3))
    same, fewer = shares(made, [(6, never), (3, half)])
    assert same == pytest.approx(1, abs=0.25)
    assert fewer < 0.8
    assert not any(type(m.processor).__name__.startswith("Reuse") for m in attention_layers(pipe.unet).values())


@pytest.mark.parametrize("changes", [{"steps": 5}, {"guidance": 2.0}, {}, {"prompts": PROMPTS[:1]}])
def test_what_confirms_differs_in_its_pictures_alone(pipe, changes):
    made = evaluator(pipe)
    with pytest.raises(ValueError, match=r"confirm must (differ|have other pictures)"):
        search(made, confirm=replace(made.setting, **changes))


def test_a_search_ends_where_nothing_new_is_left(pipe):
    short = Evaluator(pipe, Setting(PROMPTS, 2, map_format="fp32", batch=2, layers="self"))
    found = ladder(InProcess(short), by="kind", budget=200, run_costs=cheap(short))
    assert found.stopped == "nothing new"
    assert found.evaluations == 3  # one plain step; one reuse; one hold


def test_a_resumed_search_keeps_the_costs_it_began_with(pipe, tmp_path, monkeypatch):
    from attnreuse.study import costs

    measured = []

    def once(made, progress):
        measured.append(1)
        assert len(measured) == 1
        return cheap(made)

    monkeypatch.setattr(costs, "measure", once)
    made, cache = evaluator(pipe), tmp_path / "c.jsonl"
    first = ladder(InProcess(made), by="kind", budget=30, cache=cache)
    calls = made.calls.made
    assert ladder(InProcess(made), by="kind", budget=30, cache=cache) == first
    assert made.calls.made == calls


def test_the_scheduler_s_work_is_of_the_step(pipe, monkeypatch):
    """Slower steps of the scheduler make fewer steps save more."""
    made, step = evaluator(pipe), pipe.scheduler.step
    before = measure(made)
    monkeypatch.setattr(pipe.scheduler, "step", lambda *args, **given: time.sleep(0.05) or step(*args, **given))
    after = measure(made)
    assert 0.045 < after.step - before.step < 0.08
    assert abs(after.fixed - before.fixed) < 0.05


def test_costs_are_not_told_beside_a_tool_that_skips_layers(pipe):
    pytest.importorskip("DeepCache")
    made = evaluator(pipe)
    assert made.served()
    with OTHER_CACHES["DeepCache(2)"](pipe), pytest.raises(AttnReuseError, match="costs cannot be told"):
        measure(made)


def test_costs_are_measured_within_runs(pipe):
    made = evaluator(pipe)
    found = measure(made)
    assert found.layers.keys() == set(made.served())
    costs = found.layers.values()
    assert 0 < sum(cost.hold for cost in costs) < sum(cost.compute for cost in costs)
    schedule = made.schedule(Policy(steps=6, reuse="......"))
    assert found.seconds(schedule) > sum(6 * cost.compute for cost in found.layers.values()) > 0
    shorter = made.at(3).schedule(Policy(steps=3, reuse="..."))
    assert found.seconds(shorter) <= found.seconds(schedule)
    assert not any(attn._forward_hooks for attn in attention_layers(made.pipe.unet).values())
