"""The science: probes see and change what they say, growth is fitted, drift and staleness agree with sessions."""

import math

import numpy as np
import pytest
import torch
from tiny_random import captioned_pipeline

import attnreuse
from attnreuse import Policy, hurry, predict
from attnreuse.study import analysis
from attnreuse.study.analysis import distance
from attnreuse.study.evaluate import Evaluator, Sampled
from attnreuse.study.findings import Analysis, Drift, Growth, Staleness, best_predicted
from attnreuse.study.probe import noisy as noise_of
from attnreuse.study.probe import probing
from attnreuse.study.setting import Setting

pytest.importorskip("scipy")
PROMPTS = ("a red circle on gray", "a blue square on white")

pytestmark = pytest.mark.filterwarnings("error:attnreuse")


@pytest.fixture(scope="module")
def evaluator():
    return Evaluator(captioned_pipeline(), Setting(PROMPTS, 6, map_format="fp32", batch=2))


@pytest.fixture(scope="module")
def found(evaluator):
    return attnreuse.analyze(evaluator, schedules=12, reuse=3)


def made_up(steps=5):
    """An analysis in which later reuses do less harm, and drift is proportional to age."""
    places = list(range(1, steps))
    fit = {"rate": 1.0, "rate_low": 0.9, "rate_high": 1.1, "offset": 0.0, "r2": 1.0, "misfits": []}
    grown = Growth(
        perturbation="reuse", size=None, steps=places, distances=[2.0 ** (steps - p) for p in places],
        psnr_db=[30.0] * len(places), **fit,
    )  # fmt: skip
    table = [[0.1 * (lag + 1) if lag < step else None for lag in range(steps)] for step in range(steps)]
    drift = Drift(frobenius={"a": table, "b": table}, variation={"a": table, "b": table})
    stale = Staleness(steps=[1], ages=[1], distances=[[1.0]])
    about = {"model": "m", "scheduler": "s", "steps": steps, "images": 1}
    return Analysis(**about, growth=grown, noise=grown, drift=drift, staleness=stale)


def test_a_probe_that_replaces_nothing_changes_nothing_but_rounding(evaluator):
    seen = []
    sampled = evaluator.run(
        lambda start: probing(evaluator, {1, 3}, lambda step, name, m: seen.append((step, name, m)))
    )
    assert distance(sampled, evaluator.full) < 1e-5
    assert {step for step, *_ in seen} == {1, 3}
    assert {name for _, name, _ in seen} == set(evaluator.served())
    for _, _, attn_map in seen:
        torch.testing.assert_close(attn_map.sum(-1), torch.ones(attn_map.shape[:3]))
    assert {type(p).__name__ for p in evaluator.pipe.unet.attn_processors.values()} == {"AttnProcessor2_0"}


def test_a_probe_restores_after_an_exception(evaluator):
    def fail(step, name, attn_map):
        raise KeyError(name)

    with pytest.raises(KeyError):
        evaluator.run(lambda start: probing(evaluator, {1}, fail))
    assert {type(p).__name__ for p in evaluator.pipe.unet.attn_processors.values()} == {"AttnProcessor2_0"}
    assert not evaluator.pipe.unet._forward_pre_hooks


def test_noise_has_its_size_and_keeps_rows_normalised():
    attn_map = torch.rand(2, 3, 5, 7).softmax(-1)
    noisy = noise_of(0.05, 0)(2, "layer", attn_map)
    assert (noisy - attn_map).norm() / attn_map.norm() == pytest.approx(0.05, rel=1e-4)
    torch.testing.assert_close(noisy.sum(-1), torch.ones(2, 3, 5))


def test_growth_is_fitted_with_its_interval(evaluator, monkeypatch):
    steps = 40

    class Fixed:
        executed_steps, full = steps, Sampled(np.zeros((1, 2, 2, 3)), torch.ones(1, 4), 0.0)

        def sample(self, policy):
            at = policy.reuse.index(True)
            wobble = 0.2 * math.sin(7 * at) + (2 if at == 20 else 0)
            return Sampled(np.ones((1, 2, 2, 3)), torch.ones(1, 4) + 1e-3 * math.exp(0.1 * (steps - at) + wobble), 0.0)

    grown = analysis.growth(Fixed())
    assert grown.rate == pytest.approx(0.1, abs=0.02)
    assert grown.rate_low < 0.1 < grown.rate_high
    assert grown.r2 > 0.8
    assert grown.misfits == [20]
    assert grown.fitted(10, steps) == pytest.approx(1e-3 * math.exp(0.1 * 30), rel=0.3)


def test_drift_is_the_distance_of_the_maps(evaluator, found):
    held = {}
    evaluator.run(
        lambda start: probing(evaluator, {2, 4}, lambda step, name, m: held.update({(step, name): m.clone()}))
    )
    for name in evaluator.served():
        now, then = held[4, name], held[2, name]
        relative = (now - then).flatten(2).norm(dim=2) / now.flatten(2).norm(dim=2)
        assert found.drift.between(2, 4, name) == pytest.approx(relative.mean().item(), rel=1e-4)
        variation = (now - then).abs().sum(-1).mean().item() / 2
        assert found.drift.variation[name][4][1] == pytest.approx(variation, rel=1e-4)
    means = [found.drift.between(2, 4, name) for name in evaluator.served()]
    assert found.drift.between(2, 4) == pytest.approx(np.mean(means))


def test_staleness_of_one_step_is_a_session_reusing_at_that_step(found):
    """Two ways to the same figure: a probe that holds the map, and a policy that reuses it."""
    for step, distances in zip(found.staleness.steps, found.staleness.distances, strict=True):
        assert distances[0] == pytest.approx(found.growth.distances[step - 1], rel=0.02)


def test_of_one_reuse_the_prediction_is_the_measurement(found):
    for step in range(1, 6):
        policy = Policy(steps=6, reuse=[at == step for at in range(6)])
        assert predict(policy, found) == pytest.approx(found.growth.distances[step - 1])


def test_a_prediction_adds_up_and_weighs_age():
    known = made_up()
    one = predict(Policy(steps=5, reuse=[0, 0, 0, 1, 0]), known)
    other = predict(Policy(steps=5, reuse=[0, 1, 0, 0, 0]), known)
    assert (one, other) == (pytest.approx(4), pytest.approx(16))
    assert predict(Policy(steps=5, reuse=[0, 1, 0, 1, 0]), known) == pytest.approx(20)
    assert predict(Policy(steps=5, reuse=[0, 0, 0, 1, 1]), known) == pytest.approx(4 + 2 * 2)
    half = Policy(steps=5, reuse={"a": [0, 0, 0, 1, 0]})
    assert predict(half, known) == pytest.approx(2)
    with pytest.raises(ValueError, match="of 5 executed steps, the policy for 6"):
        predict(hurry(6, 2, None), known)


def test_the_best_predicted_schedule_has_no_better_neighbour():
    known = made_up(8)
    row = best_predicted(known, 3).reuse
    assert sum(row) == 3
    error = predict(Policy(steps=8, reuse=row), known)
    for i in range(1, 8):
        for j in range(1, 8):
            if row[i] and not row[j]:
                trade = [r != (k in (i, j)) for k, r in enumerate(row)]
                assert predict(Policy(steps=8, reuse=trade), known) >= error


def test_the_prediction_is_put_to_the_test(evaluator, found):
    test = found.prediction
    assert len(set(test.schedules)) == 10  # all there are: 3 of 5
    for text, measured in zip(test.schedules, test.measured, strict=True):
        policy = Policy(steps=6, reuse=[c == "R" for c in text])
        assert measured == pytest.approx(distance(evaluator.sample(policy), evaluator.full))
    assert test.rank > 0.5
    assert all(-1 <= rank <= 1 for rank in (test.rank, test.rank_hurry, test.rank_growth))


def test_an_analysis_is_saved_and_read(found, tmp_path):
    found.save(tmp_path / "a.json")
    assert Analysis.load(tmp_path / "a.json") == found
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ValueError, match="is not an analysis file"):
        Analysis.load(tmp_path / "b.json")


def test_it_is_drawn(found, tmp_path):
    pytest.importorskip("matplotlib")
    from attnreuse.study import plots

    for name, figure in (("a", plots.analysis_figure(found)), ("b", plots.layer_drift_figure(found))):
        figure.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    titled = [axis for axis in plots.analysis_figure(found).axes if axis.get_title()]
    untested = plots.analysis_figure(found.model_copy(update={"prediction": None}))
    assert [axis.get_title() for axis in untested.axes if axis.get_title()] == [a.get_title() for a in titled[:3]]
    assert all(axis.has_data() for axis in untested.axes)
