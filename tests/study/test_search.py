"""The search: finds better schedules, the same ones each time, also after a kill and on a cluster."""

import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import search_run
from fake_engine import FakeEngine
from tiny_random import captioned_pipeline

from attnreuse import AttnReuseError, hurry
from attnreuse.search import (
    InProcess,
    Objective,
    RayEngine,
    exhaustive,
    phast,
)
from attnreuse.study.evaluate import Evaluator
from attnreuse.study.setting import Setting

PROMPTS = ("a red circle on gray", "a blue square on white")


def fake(engine=None, **given):
    return phast(None, 8, 3, ["a prompt"], engine=engine or FakeEngine(8), **given)


def outcome(found):
    """All but what it took."""
    return {key: value for key, value in found.to_dict().items() if not key.startswith("calls")}


def best_of_all(steps, reuse):
    engine = FakeEngine(steps)
    rows = itertools.combinations(range(1, steps), reuse)
    return max(engine.score(tuple(i in chosen for i in range(steps))) for chosen in rows)


@pytest.fixture(scope="module")
def evaluator():
    return Evaluator(captioned_pipeline(), Setting(PROMPTS, 6, map_format="fp32", batch=2))


# -- step-wise


@pytest.mark.parametrize("variant", ["greedy", "exhaustive"])
def test_phast_ends_where_no_trade_is_better(variant):
    found, engine = fake(variant=variant), FakeEngine(8)
    row = found.policy.reuse
    assert found.stopped == "local optimum"
    assert sum(row) == 3
    assert not row[0]
    for i, j in itertools.product(range(8), range(1, 8)):
        if row[i] and not row[j]:
            trade = tuple(r != (k in (i, j)) for k, r in enumerate(row))
            assert engine.score(trade) <= engine.score(row)
    assert found.start == pytest.approx(engine.score(hurry(8, 3, None).reuse))
    assert found.policy.metrics["psnr_db"] == pytest.approx(engine.score(row), abs=1e-4)


def test_exhaustive_finds_the_optimum_and_phast_comes_near():
    best = exhaustive(FakeEngine(10), 4)
    assert best.evaluations == math.comb(9, 4)
    assert best.stopped == "all evaluated"
    assert best.policy.metrics["psnr_db"] == pytest.approx(best_of_all(10, 4), abs=1e-4)
    found = phast(None, 10, 4, ["p"], engine=FakeEngine(10), restarts=3)
    gain = (found.policy.metrics["psnr_db"] - found.start) / (best.policy.metrics["psnr_db"] - found.start)
    assert gain > 0.95


def test_too_many_schedules_are_refused():
    with pytest.raises(ValueError, match=r"92,378 schedules of 10 of 20 steps are too many"):
        exhaustive(FakeEngine(20), 10)


def test_the_seed_decides_and_restarts_never_hurt():
    once, again, other = fake(seed=1), fake(seed=1), fake(seed=2)
    assert once.to_dict() == again.to_dict()
    assert list(other.scores) != list(once.scores)
    assert fake(restarts=3).policy.metrics["psnr_db"] >= fake().policy.metrics["psnr_db"]


def test_budget_and_patience_stop_it():
    engine = FakeEngine(8)
    found = fake(engine, budget=7)
    assert (found.evaluations, engine.judged, found.stopped) == (7, 7, "budget")
    found = fake(patience=5, width=1)
    assert found.stopped in ("patience", "local optimum")
    assert found.evaluations < fake().evaluations


def test_a_prediction_decides_what_is_tried_first():
    engine = FakeEngine(8)
    found = fake(rank=lambda policy: -engine.score(policy.reuse), width=1, budget=4)
    tried = list(found.scores.values())[1:]
    assert min(tried) > found.start  # only promising ones within so few


def test_with_a_floor_the_fastest_above_it_is_found(evaluator):
    free = phast(evaluator.pipe, 6, 2, PROMPTS, engine=InProcess(evaluator))
    floor = free.policy.metrics["psnr_db"] - 10
    found = phast(evaluator.pipe, 6, 2, PROMPTS, engine=InProcess(evaluator), objective=Objective("psnr", floor))
    assert found.policy.metrics["psnr_db"] >= floor


def test_a_memory_budget_is_kept():
    found = fake(objective=Objective("psnr", memory_budget=30))
    assert found.policy.reuse_steps == 3
    with pytest.raises(AttnReuseError, match="memory budget of 29 bytes"):
        fake(objective=Objective("psnr", memory_budget=29))


def test_other_metrics_guide_it(evaluator):
    pytest.importorskip("torchmetrics")
    engine = InProcess(evaluator)
    found = phast(evaluator.pipe, 6, 2, PROMPTS, engine=engine, objective="ssim", budget=6)
    assert 0 < found.policy.metrics["ssim"] <= 1
    assert found.policy.metrics["ssim"] == pytest.approx(evaluator.scores(found.policy, ("ssim",))["ssim"], abs=1e-4)


def test_a_policy_remembers_what_it_was_made_for(evaluator):
    found = phast(evaluator.pipe, 6, 2, PROMPTS, engine=InProcess(evaluator), budget=4)
    policy = found.policy
    assert (policy.steps, policy.scheduler, policy.map_format) == (6, "DDIMScheduler", "fp32")
    assert policy.reuse_steps == 2
    assert found.policy.metrics["psnr_db"] >= found.start - 1e-4


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="metric must be one of psnr, ssim, lpips, got 'fid'"):
        fake(objective="fid")
    with pytest.raises(ValueError, match="variant must be"):
        fake(variant="random")
    with pytest.raises(ValueError, match="starts must have one row of 8 executed steps"):
        fake(starts=[hurry(9, 3, None)])
    with pytest.raises(ValueError, match="reuse must be between 0 and 7"):
        phast(None, 8, 8, ["p"], engine=FakeEngine(8))
    with pytest.raises(ValueError, match="engine must be"):
        phast(None, 8, 3, ["p"], engine="slurm")
    with pytest.raises(ValueError, match="an engine at hand has a setting of its own: leave out guidance, batch"):
        fake(guidance=2.0, batch=1)


@pytest.mark.parametrize("reuse", [0, 7])
@pytest.mark.parametrize("variant", ["greedy", "exhaustive"])
def test_where_no_trade_is_possible_the_one_schedule_is_found(reuse, variant):
    found = phast(None, 8, reuse, ["p"], engine=FakeEngine(8), variant=variant)
    assert (found.evaluations, found.policy.reuse_steps, found.stopped) == (1, reuse, "local optimum")


# -- the cache


def test_what_was_judged_is_not_judged_again(tmp_path):
    cache, first, second = tmp_path / "c.jsonl", FakeEngine(8), FakeEngine(8)
    one, two = fake(first, cache=cache), fake(second, cache=cache)
    assert first.judged == one.evaluations > 10
    assert second.judged == two.calls.schedules == 0
    assert outcome(two) == outcome(one)


def test_another_setting_shares_nothing(tmp_path):
    cache = tmp_path / "c.jsonl"
    fake(cache=cache)
    engine = FakeEngine(9)
    phast(None, 9, 3, ["p"], engine=engine, cache=cache)
    assert engine.judged > 10


def test_killed_at_a_random_moment_it_ends_as_if_never_stopped(tmp_path):
    uninterrupted, _ = search_run.run(tmp_path / "whole.jsonl")
    cache, rng = tmp_path / "killed.jsonl", random.Random()
    for _ in range(2):
        made = subprocess.Popen([sys.executable, search_run.__file__, str(cache)], cwd=Path(__file__).parent)
        held = len(cache.read_bytes()) if cache.exists() else 0
        while made.poll() is None and (not cache.exists() or len(cache.read_bytes()) == held):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.6))
        os.kill(made.pid, signal.SIGKILL)
        assert made.wait() == -signal.SIGKILL
    kept = cache.read_bytes().count(b"\n")
    assert 0 < kept < uninterrupted.evaluations
    resumed, engine = search_run.run(cache)
    assert engine.judged == uninterrupted.evaluations - kept
    assert outcome(resumed) == outcome(uninterrupted)


@pytest.mark.parametrize("cut", [1, 10, 30])
def test_a_line_cut_short_is_judged_again(tmp_path, cut):
    cache = tmp_path / "c.jsonl"
    one = fake(cache=cache)
    cache.write_bytes(cache.read_bytes()[:-cut])
    engine = FakeEngine(8)
    assert outcome(fake(engine, cache=cache)) == outcome(one)
    assert engine.judged == 1
    for line in cache.read_text().splitlines():
        json.loads(line)


@pytest.mark.parametrize(
    ("text", "line"),
    [('{"a": 1}', 1), ('{"a": 1}\n', 1), ("garbage\n", 1), ('{"setting": "x"}\nnotes', 2), ("# notes\n", 1)],
)
def test_a_file_of_other_things_is_refused_and_left_as_it_is(tmp_path, text, line):
    (tmp_path / "notes.json").write_text(text)
    with pytest.raises(ValueError, match=rf"notes\.json is not a file of scores \(line {line}\): give another"):
        fake(cache=tmp_path / "notes.json")
    assert (tmp_path / "notes.json").read_text() == text


# -- ray


@pytest.fixture(scope="module")
def cluster(evaluator, tmp_path_factory):
    """Workers import from the current folder first: not from the checkout, the installed package is tested."""
    ray = pytest.importorskip("ray")
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield RayEngine(evaluator, workers=2)
    ray.shutdown()
    os.chdir(before)


def test_ray_finds_what_one_process_finds(cluster, evaluator):
    ours = phast(evaluator.pipe, 6, 2, PROMPTS, engine=cluster)
    here = phast(evaluator.pipe, 6, 2, PROMPTS, engine=InProcess(evaluator))
    assert ours.scores == here.scores
    assert ours.policy == here.policy


def test_a_worker_killed_in_mid_search_loses_nothing(cluster, evaluator, tmp_path):
    import ray

    pids = ray.get([actor.pid.remote() for actor in cluster.actors])
    killed = []

    def kill(evaluations, budget, best):
        if evaluations >= 4 and not killed:
            os.kill(pids[0], signal.SIGKILL)
            killed.append(evaluations)

    given = {"width": 2, "progress": kill, "cache": tmp_path / "c.jsonl"}
    found = phast(evaluator.pipe, 6, 2, PROMPTS, engine=cluster, **given)
    assert killed
    assert set(pids) != set(ray.get([actor.pid.remote() for actor in cluster.actors]))
    here = phast(evaluator.pipe, 6, 2, PROMPTS, engine=InProcess(evaluator), width=2)
    assert found.scores == here.scores
