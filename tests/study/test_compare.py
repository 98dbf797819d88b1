"""The comparison: every method puts the pipeline back, figures are what they say, the page holds them all."""

import copy
import csv
import json
import re
import sys

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from rich.console import Console
from tiny_random import captioned_pipeline, random_unet
from typer.testing import CliRunner

from attnreuse import AttnReuseError, Policy, enable, hurry
from attnreuse.binding.processors import attention_layers
from attnreuse.cli import app
from attnreuse.cli import compare as command
from attnreuse.measure.timing import Times
from attnreuse.study.compare import groups, measure, methods, other_caches, page
from attnreuse.study.compare.other_caches import OTHER_CACHES
from attnreuse.study.plots import FAMILIES, Spot, pareto_figure
from attnreuse.study.setting import Setting

for package in ("DeepCache", "tomesd", "scipy", "matplotlib", "jinja2", "torchmetrics"):
    pytest.importorskip(package)
PROMPTS = ("a red circle on gray", "a blue square on white", "a cyan triangle on black")


def stock(pipe):
    g = torch.Generator().manual_seed(0)
    return pipe(PROMPTS[0], num_inference_steps=4, generator=g, output_type="np").images


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    torch.manual_seed(7)
    random_unet().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def measured(student):
    pipe = captioned_pipeline()
    mine = Policy(steps=8, reuse=[0, 1, 0, 0, 1, 0, 0, 1], name="mine")
    elsewhere = Policy(steps=8, reuse=[0, 1, 1, 0, 0, 0, 0, 1], name="elsewhere", scheduler="PNDMScheduler")
    shorter = Policy(steps=6, reuse="..R.HR", name="shorter")
    before = stock(pipe)
    found = groups.compare(
        pipe, Setting(PROMPTS, 8, map_format="fp32", batch=2), policies=[mine, elsewhere, shorter], student=student,
        judge=("ssim", "fid", "clip"), rounds=2,
    )  # fmt: skip
    assert np.array_equal(stock(pipe), before)
    return found


def row(measured, name):
    return next(r for r in measured.groups[0].rows if r.method.name == name)


@pytest.mark.parametrize("make", list(OTHER_CACHES.values()))
def test_other_caches_change_pictures_repeatably_and_leave_nothing(make):
    pipe = captioned_pipeline()
    before = stock(pipe)
    with make(pipe):
        changed = stock(pipe)
    with make(pipe):
        again = stock(pipe)
    assert np.array_equal(changed, again)
    assert not np.array_equal(changed, before)
    assert np.array_equal(stock(pipe), before)


def test_pab_leaves_the_hooks_of_others():
    from diffusers.hooks import HookRegistry, ModelHook

    pipe = captioned_pipeline()
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    HookRegistry.check_if_exists_or_initialize(layer).register_hook(ModelHook(), "theirs")
    with OTHER_CACHES["PAB(2)"](pipe):
        assert len(layer._diffusers_hook.hooks) == 2
    assert list(layer._diffusers_hook.hooks) == ["theirs"]


def test_holding_every_second_self_attention_is_pab():
    pipe = captioned_pipeline()
    with OTHER_CACHES["PAB(2)"](pipe):
        theirs = stock(pipe)
    with enable(pipe, Policy(steps=4, reuse=".H.H")):
        ours = stock(pipe)
    assert np.array_equal(ours, theirs)


def test_layers_that_match_none_are_refused_before_a_picture():
    pipe = captioned_pipeline()
    pipe.unet.forward = None  # any call would fail
    with pytest.raises(ValueError, match="layers must be 'self', 'cross', 'all' or patterns"):
        groups.compare(pipe, Setting(PROMPTS, 8, layers="nope"))


def test_every_kind_of_method_is_there(measured):
    families = {r.method.family for r in measured.groups[0].rows}
    assert families == set(FAMILIES) - {methods.SAME_NOISE, "ladder"}  # DDIM draws none
    names = [r.method.name for r in measured.groups[0].rows]
    assert len(set(names)) == len(names)
    assert "mine" in names
    assert "elsewhere" not in names
    assert "elsewhere was left out: it is for PNDMScheduler and 8 calls, this is DDIMScheduler and 8" in (
        measured.groups[0].notes
    )
    shorter = row(measured, "shorter on 6 steps")
    assert (shorter.method.steps, shorter.method.family) == (6, "reuse + fewer steps")
    assert shorter.maps_computed == pytest.approx(3 / 8)
    assert any(
        "is the schedule of" in note for note in measured.groups[0].notes
    )  # periodic(8,2) is hurry(8,4,max_age=1)


def test_the_table_of_a_terminal_is_whole_in_80_columns(measured, capsys):
    Console(width=80).print(command._table(measured.groups[0]))
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert "…" not in said
    for r in measured.groups[0].rows[1:]:
        assert f"{r.scores['psnr']:.1f} ± {r.scores['psnr_ci']:.1f}  " in said
        assert all(word in said for word in r.method.name.split())


def test_a_comparison_is_kept_without_its_pictures(measured, tmp_path):
    measured.save(tmp_path / "c.json")
    again = groups.Comparison.load(tmp_path / "c.json")
    assert again.to_dict() == measured.to_dict()
    assert again.groups[0].rows[1].pictures is None
    page.write(again, tmp_path / "again.html", "attnreuse compare")
    assert "<th>SSIM</th>" in (tmp_path / "again.html").read_text()
    ours, theirs = row(again, "mine"), row(measured, "mine")
    assert (ours.method.policy, ours.latencies_s) == (theirs.method.policy, theirs.latencies_s)
    assert np.mean(ours.psnrs) == pytest.approx(theirs.scores["psnr"])


def test_layers_that_another_cache_skips_are_noted_not_warned_of(recwarn):
    captured_where_skipped = Policy(steps=8, reuse=".RR.R...")
    both = methods.Method(
        "both", "reuse + other cache", 8, captured_where_skipped, "fp32", OTHER_CACHES["DeepCache(2)"]
    )  # fmt: skip
    pipe, notes = captioned_pipeline(), []
    measure.judged(pipe, Setting(PROMPTS[:1], 8), [methods.Method("full steps", "full", 8), both], notes, ())
    assert len(notes) == 1
    assert re.match(
        r"both: \d+ layers computed instead of reusing: it wrote no map .*another tool skipped it", notes[0]
    )
    assert not [w for w in recwarn if str(w.message).startswith("attnreuse")]


def test_layers_that_never_meant_to_reuse_are_not_noted():
    """One whose processor is not served is counted once, and only where the policy names it."""
    pipe, notes = captioned_pipeline(), []
    blocks = pipe.unet.mid_block.attentions[0].transformer_blocks[0]

    class Mine(AttnProcessor2_0):
        pass

    wanted = [methods.Method("full steps", "full", 4)]
    for pattern in ("*attn1", "*attn2"):
        policy = Policy(steps=4, reuse={pattern: "..R."})
        wanted.append(methods.Method(pattern, "reuse", 4, policy, "fp32"))
    blocks.attn2.set_processor(Mine())
    measure.judged(pipe, Setting(PROMPTS[:1], 4, layers="all"), wanted, notes, ())
    assert len(notes) == 1
    assert notes[0].startswith("*attn2: 1 layer computed instead of reusing: ")


def test_costs_are_counted_as_the_paper_does(measured):
    assert row(measured, "full steps").maps_computed == 1
    assert row(measured, "hurry(8,4,max_age=None)").maps_computed == pytest.approx(0.5)
    assert row(measured, "mine").maps_computed == pytest.approx(5 / 8)
    assert row(measured, "4 plain steps").maps_computed == 0.5
    assert row(measured, "PAB(2)").maps_computed is None
    equal = row(measured, "4 plain steps").scores["psnr"]
    assert row(measured, "hurry(8,4,max_age=None)").equal_cost.psnr == pytest.approx(equal)


def test_plain_steps_at_a_time_are_the_best_up_to_it():
    measured = [(3.0, [40.0, 44.0]), (1.0, [31.0, 29.0]), (2.0, [39.0, 41.0]), (2.5, [42.0, 30.0])]
    assert measure.at_time(measured, 0.9) is None
    assert measure.at_time(measured, 1.0).tolist() == [31, 29]
    assert measure.at_time(measured, 1.5).tolist() == [35, 35]
    assert measure.at_time(measured, 2.5).tolist() == [39, 41]  # though these more steps are worse
    assert measure.at_time(measured, 9.0).tolist() == [40, 44]
    assert measure.at_time([], 1.0) is None


@pytest.mark.parametrize(
    ("psnrs", "clear", "finding"),
    [
        ([31.0, 41.2, 51.1], True, "mine: 1.1 dB above plain steps of the same time"),
        ([36.0, 38.0, 53.0], False, "No schedule is clearly above plain steps of the same time"),
        ([29.0, 38.9, 48.9], True, "Plain steps of the same time are better than every schedule"),
    ],
)
def test_a_gain_is_what_pictures_agree_on(psnrs, clear, finding):
    def method(name, family, psnrs, time, steps=8):
        scores = {"psnr": np.mean(psnrs)} if psnrs else {}
        one = methods.Method(name, family, steps)
        return measure.Measured(one, steps, 0, scores, psnrs=psnrs, latencies_s=[time])

    rows = [method("full steps", "full", [], 1.0), method("mine", "reuse", psnrs, 0.75)]
    rows += [method(f"{n} plain steps", "plain steps", [30.0, 40.0, 50.0], n / 8, n) for n in (4, 6)]
    measure._at_equal(rows)
    assert rows[1].plain.psnr == 40
    assert rows[1].plain.gain == pytest.approx(np.mean(psnrs) - 40)
    assert rows[1].plain.is_clear == clear
    group = groups.Group(scheduler="DDIM", steps=8, map_format="u8", rows=rows, notes=[])
    assert page._finding(group) == finding
    said = " ".join(page.summary(group))
    assert ("1 within what pictures differ by" in said) is not clear


def test_rows_are_told_plain_steps_of_their_time_and_maps(measured):
    """With latencies that no clock decides."""
    rows = [copy.copy(r) for r in measured.groups[0].rows]
    for r in rows:
        r.latencies_s = [r.method.steps / 8]
        r.plain = None
    mine = next(r for r in rows if r.method.name == "mine")
    plain = {r.method.steps: r.scores["psnr"] for r in rows if r.method.family == "plain steps"}
    for latency, psnr in ((0.1, None), (0.5, max(v for k, v in plain.items() if k <= 4)), (1.1, None)):
        mine.latencies_s = [latency]
        mine.plain = None
        measure._at_equal(rows)
        assert (mine.plain and mine.plain.psnr) == (None if psnr is None else pytest.approx(psnr))
    assert mine.equal_cost.psnr == pytest.approx(plain[5])  # 5 of 8 calls compute


def test_a_stochastic_sampler_is_compared_with_its_noise_held_fixed():
    """Plain steps of the same noise take their twins' time, and count among plain steps."""
    found = groups.compare(
        captioned_pipeline(), Setting(PROMPTS, 8, map_format="fp32"), schedulers=["Euler a", "DPM2 a"], others=False,
        rounds=1,
    )  # fmt: skip
    rows = {r.method.name: r for r in found.groups[0].rows}
    for steps in (7, 6):
        plain, same = rows[f"{steps} plain steps"], rows[f"{steps} plain steps, same noise"]
        assert same.scores["psnr"] != plain.scores["psnr"]
        assert same.latencies_s == plain.latencies_s
    assert "same noise was left out: the noise of KDPM2Ancestral" in " ".join(found.groups[1].notes)


def test_figures_belong_to_their_method(measured):
    reuse = row(measured, "hurry(8,4,max_age=None)")
    assert reuse.map_bytes > 0
    assert row(measured, "tomesd(0.5)").map_bytes == 0
    assert all(len(r.latencies_s) == 2 for r in measured.groups[0].rows)
    assert "psnr" not in measured.groups[0].full.scores
    assert {"psnr", "psnr_ci", "ssim", "fid", "clip_score", "shape"} <= set(reuse.scores)
    student = next(r for r in measured.groups[0].rows if r.method.family == "student")
    assert student.executed_steps == 4
    assert student.scores["psnr"] < reuse.scores["psnr"]


def test_a_method_that_cannot_run_is_a_note(monkeypatch):
    monkeypatch.setattr(other_caches, "package_version", lambda name: None)
    found = groups.compare(captioned_pipeline(), Setting(PROMPTS, 4, map_format="fp32"), rounds=1)
    notes = " ".join(found.groups[0].notes)
    assert "DeepCache(2) was left out: DeepCache is not installed" in notes
    assert "tomesd(0.5) was left out" in notes


def test_pictures_that_are_not_numbers_leave_a_method_out_or_end_the_comparison():
    pipe, setting = captioned_pipeline(), Setting(PROMPTS[:2], 4, map_format="fp32")
    attn = next(iter(attention_layers(pipe.unet).values()))
    broken_by: list[str] = ["ReuseAttnProcessor"]

    def spoil(module, args, out):
        return torch.full_like(out, torch.nan) if type(attn.processor).__name__ in broken_by else None

    pipe.unet.conv_out.register_forward_hook(spoil)
    group = groups.compare(pipe, setting, others=False, rounds=1).groups[0]
    assert {row.method.family for row in group.rows} & {"reuse", "plain steps"} == {"plain steps"}
    assert "hurry(4,2,max_age=1) was left out: pictures hold values that are not numbers" in " ".join(group.notes)
    broken_by.append("AttnProcessor2_0")
    with pytest.raises(AttnReuseError, match="pictures hold values that are not numbers"):
        groups.compare(pipe, setting, others=False, rounds=1)


def test_a_metric_that_cannot_be_had_is_said_before_anything_is_sampled(monkeypatch):
    pipe = captioned_pipeline()
    monkeypatch.setattr(type(pipe), "__call__", lambda *a, **k: pytest.fail("sampled"))
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(AttnReuseError, match=r"SSIM needs more: pip install 'attnreuse\[eval\]'"):
        groups.compare(pipe, Setting(PROMPTS, 4), others=False, rounds=1)


def test_policies_that_never_reuse_are_plain_steps():
    pipe = captioned_pipeline()
    all_computed = [Policy(steps=8, reuse="........", name="all"), Policy(steps=3, reuse="...", name="three")]
    found, notes = methods.methods(pipe, Setting(PROMPTS, 8), all_computed, None, False)
    assert "all never reuses: it is the full run" in notes
    assert "three never reuses: it is 3 plain steps" in notes
    assert "3 plain steps" in [m.name for m in found]
    assert not {"all", "three"} & {m.name for m in found}


def test_the_scheduler_is_put_back_and_groups_multiply():
    pipe = captioned_pipeline()
    own = pipe.scheduler
    found = groups.compare(
        pipe, Setting(PROMPTS[:1], 4), schedulers=["DPM", "Heun"], formats=["u8", "u4"], others=False, rounds=1
    )
    assert pipe.scheduler is own
    titles = [(g.scheduler, g.map_format) for g in found.groups]
    assert titles == [(s, f) for s in ("DPM", "Heun") for f in ("u8", "u4")]
    assert found.groups[2].full.executed_steps == 7
    rows = {r.method.name: r for r in found.groups[2].rows}
    assert rows["2 plain steps"].maps_computed == pytest.approx(3 / 7)  # Heun calls once in the last step
    near = [rows[f"{n} plain steps"].scores["psnr"] for n in (2, 3)]  # 3 and 5 calls, about 4
    assert rows["hurry(7,3,max_age=1)"].equal_cost.psnr == pytest.approx(max(near))


def test_the_page_and_its_table_hold_every_figure(measured, tmp_path):
    written = page.write(measured, tmp_path / "c.html", "the command")
    assert written == [tmp_path / "c.html", tmp_path / "c.csv"]
    text = written[0].read_text()
    for r in measured.groups[0].rows:
        assert r.method.name in text
    assert "the command" in text
    assert text.count("<svg") == 1
    assert text.count("data:image/png;base64") == 3 * len(measured.groups[0].rows)
    assert not re.findall(r"(?:src|href)=[\"']?https?:", text)  # one file, read offline
    with written[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["method"] for r in rows] == [r.method.name for r in measured.groups[0].rows]
    by_name = {r["method"]: r for r in rows}
    assert by_name["mine"]["reuse"] == ".R..R..R"
    assert float(by_name["mine"]["psnr"]) == pytest.approx(row(measured, "mine").scores["psnr"], rel=1e-3)
    assert float(by_name["mine"]["latency_s"]) == pytest.approx(row(measured, "mine").latency_s, rel=1e-3)
    assert all(r["torch"] and r["device"] for r in rows)


def test_the_summary_says_who_won(measured):
    said = " ".join(page.summary(measured.groups[0]))
    reuse = [r for r in measured.groups[0].rows if r.method.family == "reuse"]
    best = max(reuse, key=lambda r: r.scores["psnr"])
    assert f"{best.method.name}, {best.scores['psnr']:.1f} dB" in said
    faster = sum(r.of_full(measured.groups[0].full).median < 1 for r in reuse)
    assert f"{faster} of {len(reuse)} schedules took less time" in said


@pytest.mark.parametrize("psnr", [50.0, 20.0, None])  # all at one place, high or low, or all over
def test_names_beside_a_plot_are_whole_and_apart(psnr):
    from matplotlib.text import Text

    time = Times(0.9, 0.8, 0.95)
    at = [20 + 1.5 * i if psnr is None else psnr for i in range(20)]
    spots = [Spot(f"a schedule of a long name, {i}", "reuse", time, y, 0.4) for i, y in enumerate(at)]
    line = [Spot("", "ladder", Times(x, x, x), y) for x, y in ((0.5, 20), (1, 50))]
    figure = pareto_figure([*spots, *line], "it")
    figure.canvas.draw()
    names = [text for text in figure.axes[0].texts if text.get_text()]
    boxes = [Text.get_window_extent(name) for name in names]  # without the lines to the points
    assert len(boxes) == 20
    for i, box in enumerate(boxes):
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert 0 <= box.y0 < box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_a_page_leaves_out_what_nobody_measured(measured, tmp_path):
    text = page.write(measured, tmp_path / "c.html", "the command")[0].read_text()
    assert "<th>SSIM</th>" in text
    assert "<th>LPIPS</th>" not in text
    assert "student" in text  # a family of this comparison, in the legend
    assert "same noise" not in text  # none of DDIM's


def test_the_command(tmp_path):
    hurry(4, 2, None).save(tmp_path / "p.json")
    out = tmp_path / "c.html"
    args = [
        "compare",
        "--steps",
        "4",
        "--images",
        "1",
        "--rounds",
        "1",
        "--no-others",
        "--policy",
        str(tmp_path / "p.json"),
    ]
    result = CliRunner().invoke(app, [*args, "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert "hurry(4,2,max_age=None)" in [r["method"]["name"] for r in data["groups"][0]["rows"]]
    assert out.exists()
    assert out.with_suffix(".csv").exists()
    refused = CliRunner().invoke(app, ["compare", "--out", str(tmp_path / "c.pdf")])
    assert refused.exit_code == 2
    assert "--out must end in .html" in refused.output
