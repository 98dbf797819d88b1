"""The commands as a user types them: files written, JSON, clear errors with exit code 2."""

import json
import re
import sys
from importlib.util import find_spec

import diffusers
import huggingface_hub
import pytest
import transformers
from PIL import Image
from tiny_random import random_pipeline, random_unet
from typer.testing import CliRunner
from zoo import ZOO

from attnreuse import Policy, hurry, load_policy
from attnreuse.binding.report import LayerReport, Report
from attnreuse.cli import app, console, doctor
from attnreuse.cli.inputs import load_pipeline, writable
from attnreuse.policy import shipped_policies
from attnreuse.search import InProcess
from attnreuse.study.sample import SampleResult

runner = CliRunner()


def run(*args):
    return runner.invoke(app, [str(a) for a in args])


def test_sample_writes_picture_and_json(tmp_path):
    out = tmp_path / "s.png"
    prompts = ("a red circle on gray", "a blue square on white")
    result = run("sample", "--steps", 4, "--reuse", 2, "--prompt", prompts[0], "--prompt", prompts[1], "--out", out)
    assert result.exit_code == 0, result.output
    picture = Image.open(out)
    assert picture.width > 2 * 256
    assert picture.height > 5 * 256  # each way to sample, and what two of them change
    data = json.loads((tmp_path / "s.json").read_text())
    assert data["prompts"] == list(prompts)
    assert data["baseline"]["latency_s"] > 0
    assert data["policy"]["reuse"].count("R") == 2
    assert len(data["reuse"]["psnr_db"]) == 2
    assert 15 < data["reuse"]["mean_psnr_db"] < 100
    assert 1 <= data["fewer"]["steps"] <= 3
    assert data["report"]["allocated_bytes"] == data["report"]["predicted_bytes"] > 0
    assert 0 < data["at_most_s"] < data["attention_s"] < data["baseline"]["latency_s"]
    assert data["saved_s"] == data["baseline"]["latency_s"] - data["reuse"]["latency_s"]
    assert json.loads(SampleResult.load(tmp_path / "s.json").model_dump_json()) == data
    assert {"device", "torch", "diffusers", "threads"} <= set(data["environment"])
    assert "full steps" in result.output


def test_plan_predicts_what_a_run_allocates(tmp_path):
    args = ("--steps", 4, "--reuse", 2, "--format", "u8", "--scheduler", "Euler a")
    planned = json.loads(run("plan", *args, "--batch", 1, "--no-measure", "--json").stdout)
    sampled = run("sample", *args, "--prompt", "a red circle on gray", "--out", tmp_path / "s.png", "--json")
    assert planned["predicted_bytes"] == json.loads(sampled.stdout)["report"]["allocated_bytes"]


def test_plan_measures_and_advises():
    args = ("plan", "--steps", 6, "--reuse", 3, "--batch", 1, "--height", 64, "--width", 64)
    result = run(*args)
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert re.search(
        r"The layers above take \d+% of a step's time here. A step that reuses takes \d\.\d\d of a full one, a step "
        r"that captures \d\.\d\d. (No, it does not pay: t|T)his policy should take \d\.\d\d of the time of 6 full "
        r"steps \(\d+\.\d\d s\), as \d\.\d plain steps would\.",
        said,
    )
    assert max(map(len, result.stdout.splitlines())) <= 80
    found = json.loads(run(*args, "--json").stdout)["run"]
    assert 0.02 < found["attention_share"] < 0.7
    assert found["ratio"] == found["policy_s"] / found["full_s"]
    assert found["pays"] == (found["ratio"] <= 0.97)
    assert found["plain_steps"] / 6 == pytest.approx(found["ratio"], abs=0.2)  # a run does more than its steps
    assert 0.3 < found["reuse_step"] < found["capture_step"]


def test_plan_says_no_where_nothing_can_be_won():
    result = run("plan", "--steps", 6, "--reuse", 0, "--batch", 1, "--height", 64, "--width", 64)
    assert "No, it does not pay: this policy should take 1.00 of the time" in " ".join(result.stdout.split())


def test_what_plan_predicts_is_what_sample_measures(tmp_path):
    """Within 0.15 on a busy machine; within 0.05 on a quiet one, which a benchmark shows."""
    args = ("--steps", 12, "--scheduler", "Euler a", "--format", "u8")
    one = "a red circle on gray"
    found = json.loads(run("plan", *args, "--batch", 1, "--json").stdout)["run"]
    sampled = json.loads(run("sample", *args, "--prompt", one, "--out", tmp_path / "s.png", "--json").stdout)
    ratio = sampled["reuse"]["latency_s"] / sampled["baseline"]["latency_s"]
    assert found["ratio"] == pytest.approx(ratio, abs=0.15)
    share = sampled["attention_s"] / sampled["baseline"]["latency_s"]
    assert found["attention_share"] == pytest.approx(share, abs=0.15)


def test_plan_and_sample_take_the_same_sampler_by_default(tmp_path):
    planned = json.loads(run("plan", "--steps", 3, "--no-measure", "--json").stdout)["policy"]
    one = ("--prompt", "a red circle on gray", "--out", tmp_path / "s.png", "--json")
    sampled = json.loads(run("sample", "--steps", 3, *one).stdout)
    assert planned == sampled["policy"]
    assert sampled["environment"]["scheduler"] == "EulerAncestralDiscreteScheduler"
    heun = json.loads(run("plan", "--steps", 3, "--scheduler", "Heun", "--no-measure", "--json").stdout)["policy"]
    assert planned["levels"] != heun["levels"]


def planned_policy(*args):
    return json.loads(run("plan", *args, "--no-measure", "--json").stdout)["policy"]["name"]


def test_the_shipped_pipeline_comes_with_policies():
    ddim = ("--scheduler", "DDIM")
    assert planned_policy(*ddim) == "phast(20,10)"
    assert planned_policy(*ddim, "--reuse", 5) == "phast(20,5)"
    assert planned_policy(*ddim, "--reuse", 0.25) == "phast(20,5)"
    assert planned_policy(*ddim, "--reuse", 7) == "hurry(reuse=0.35)"
    assert planned_policy("--max-age", 0) == "hurry(20,10,max_age=None)"
    assert planned_policy("--max-age", 2) == "hurry(20,10,max_age=2)"
    assert planned_policy("--scheduler", "Euler") == "hurry(reuse=0.5)"
    assert planned_policy("--scheduler", "Heun", "--steps", 4) == "hurry(reuse=0.5)"  # 3 of 7 calls
    for policy in shipped_policies():
        assert policy.model == "tiny-shapes"
        assert policy.metrics["psnr_db"] > 0


def test_a_policy_file_is_a_rule_or_is_stretched(tmp_path):
    path = tmp_path / "policy.json"
    hurry(reuse=0.25).save(path)
    for steps in (8, 12):
        result = run("plan", "--policy", path, "--steps", steps, "--no-measure", "--json")
        assert json.loads(result.stdout)["policy"]["reuse"].count("R") == steps // 4
    hurry(6, 3).save(path)
    result = run("plan", "--policy", path, "--steps", 8, "--fit", "stretch", "--no-measure", "--json")
    assert json.loads(result.stdout)["policy"]["name"] == "hurry(6,3,max_age=1) stretched from 6 steps"


def test_the_sampler_and_its_noise_are_chosen_by_name(tmp_path):
    out = tmp_path / "s.png"
    args = ("sample", "--steps", 3, "--reuse", 1, "--prompt", "a red circle on gray", "--out", out, "--json")
    for name, eta in (("dpm++ 2m sde karras", ()), ("DDIMScheduler", ("--eta", 1))):
        result = run(*args, "--scheduler", name, *eta)
        assert result.exit_code == 0, result.output
        scheduler = json.loads(result.stdout)["environment"]["scheduler"]
        assert scheduler == ("DDIMScheduler" if eta else "DPMSolverMultistepScheduler")


@pytest.mark.parametrize(("name", "executed"), [("heun", 7), ("PNDM", 5), ("ddim", 4)])
def test_plan_counts_executed_steps(name, executed):
    result = run("plan", "--steps", 4, "--reuse", 2, "--scheduler", name, "--no-measure", "--json")
    assert json.loads(result.stdout)["policy"]["steps"] == executed
    shown = " ".join(run("plan", "--steps", 4, "--reuse", 2, "--scheduler", name, "--no-measure").stdout.split())
    assert shown.startswith("4 steps;" if executed == 4 else f"4 steps, {executed} denoiser calls;")


def test_plan_drops_layers_for_a_budget():
    planned = json.loads(run("plan", "--no-measure", "--memory-budget", "4MiB", "--batch", 1, "--json").stdout)
    assert planned["predicted_bytes"] <= 4 << 20
    assert planned["dropped"]


def test_the_tables_of_plans_and_reports_are_whole_in_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    budget = run("plan", "--memory-budget", "4MiB", "--batch", 1, "--steps", 6).stdout
    assert "no room" in budget
    assert "computes" in run("plan", "--reuse", 0, "--steps", 6, "--no-measure").stdout
    layers = [LayerReport(name="a.0.b", kind="cross", shape=(8, 16, 16384, 16384), map_bytes=1 << 34, computed=10)]
    layers[0].planned |= {"computed": 1000, "captured": 1000, "reused": 1000}
    report = str(Report(policy="mine", map_format="u8", layers=layers))
    for said in (budget, report):
        assert "…" not in said
        assert max(map(len, said.splitlines())) <= 80
    assert "256x256" in budget
    assert "0 of 1000" in report
    assert "16,384.0" in report


def save_configs(folder, pipeline, **parts):
    """A pipeline's folder without weights."""
    for name, part in parts.items():
        part.save_config(folder / name) if hasattr(part, "save_config") else part.save_pretrained(folder / name)
    index = {name: ["diffusers", type(part).__name__] for name, part in parts.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **index}))


def test_plan_tells_of_calls_and_pictures_beside_those_it_counts(tmp_path):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = dict(transformer=ZOO["Flux"]().model, vae=random_pipeline().vae, scheduler=scheduler)
    save_configs(tmp_path, "FluxKontextPipeline", **parts)
    told = " ".join(run("plan", "--model", tmp_path, "--height", 64, "--width", 64, "--no-measure").stdout.split())
    assert (
        "A picture that FluxKontextPipeline is given stands beside the one it makes: plan the pixels of both." in told
    )
    assert "Guidance by true_cfg_scale is a call of its own: it takes such a buffer once more." in told


@pytest.mark.parametrize(
    ("pipeline", "guidance", "rows"),
    [
        ("StableDiffusionPipeline", 7.5, 2),
        ("StableDiffusionPipeline", 1.0, 1),
        ("StableDiffusionXLPAGPipeline", 7.5, 3),
        ("StableDiffusionPAGPipeline", 1.0, 2),
        ("StableDiffusionInstructPix2PixPipeline", 7.5, 3),
        ("DDPMPipeline", 7.5, 1),
        ("LatentConsistencyModelPipeline", 7.5, 1),
        ("DreamLitePipeline", 1.0, 2),
        ("DreamLiteMobilePipeline", 7.5, 1),
        ("FluxPipeline", 7.5, 1),
    ],
)
def test_plan_counts_the_rows_of_a_picture(pipeline, guidance, rows, tmp_path):
    models = {"DDPM": "UNet2DModel", "DreamLite": "DreamLite", "Flux": "Flux"}
    name = next((model for family, model in models.items() if pipeline.startswith(family)), "UNet2DConditionModel")
    denoiser = ZOO[name]().model
    if pipeline == "LatentConsistencyModelPipeline":
        denoiser = random_unet(time_cond_proj_dim=8)  # guidance is embedded
    part = {("transformer" if name == "Flux" else "unet"): denoiser}
    save_configs(tmp_path, pipeline, **part, vae=random_pipeline().vae, scheduler=diffusers.DDIMScheduler())
    told = run("plan", "--model", tmp_path, "--batch", 1, "--guidance", guidance, "--no-measure", "--json")
    assert {layer["shape"][0] for layer in json.loads(told.stdout)["layers"]} == {rows}


@pytest.mark.parametrize("name", ["AudioLDM", "AudioLDM 2"])
def test_plan_of_sound_is_of_spectrograms(name, tmp_path):
    own = dict(class_embed_type="simple_projection", projection_class_embeddings_input_dim=12)
    unet = ZOO[name]().model if name in ZOO else random_unet(cross_attention_dim=(16, 32), **own)
    vae, scheduler = random_pipeline().vae, diffusers.DDIMScheduler()
    vocoder = transformers.SpeechT5HifiGanConfig(model_in_dim=8)
    save_configs(tmp_path, f"{name.replace(' ', '')}Pipeline", unet=unet, vae=vae, vocoder=vocoder, scheduler=scheduler)
    said = run("plan", "--model", tmp_path, "--layers", "all").stdout
    rows = [line.split() for line in said.splitlines()]
    assert [row for row in rows if row[1:3] == ["self", "32x32"]]  # 8 frames of 4 latents
    given_text = name != "AudioLDM"  # whose cross-attention is given nothing, and only computes
    assert any(row[1:2] == ["cross"] for row in rows) == given_text
    assert "only pipelines of pictures are timed" in " ".join(said.split())


def test_plan_refuses_sizes_that_the_pipeline_refuses(tmp_path):
    result = run("plan", "--height", 65, "--width", 64, "--no-measure")
    assert result.exit_code == 2
    assert "height and width must be multiples of 4 for this model, got 65x64" in result.stderr
    save_configs(tmp_path, "DDPMPipeline", unet=ZOO["UNet2DModel"]().model, scheduler=diffusers.DDIMScheduler())
    result = run("plan", "--model", tmp_path, "--height", 9, "--width", 8)
    assert result.exit_code == 2
    assert "height and width must be multiples of 2 for this model, got 9x8" in result.stderr


@pytest.mark.parametrize(
    ("pipeline", "reason"),
    [
        ("DDPMPipeline", "DDPMPipeline takes no prompt"),
        ("StableDiffusionImg2ImgPipeline", "StableDiffusionImg2ImgPipeline is given image beside a prompt"),
        ("StableDiffusionPipeline", "a run ended in AttributeError: "),  # it has no tokenizer
    ],
)
def test_plan_says_why_a_pipeline_cannot_be_timed(pipeline, reason, tmp_path):
    pipe = random_pipeline()
    pipe.save_pretrained(tmp_path)
    if pipeline == "DDPMPipeline":
        save_configs(tmp_path, pipeline, unet=ZOO["UNet2DModel"]().model, scheduler=pipe.scheduler)
    else:
        index = json.loads((tmp_path / "model_index.json").read_text())
        (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": pipeline}))
    args = ("plan", "--model", tmp_path, "--steps", 4, "--batch", 1)
    planned = json.loads(run(*args, "--json").stdout)
    assert planned["run"] is None
    assert reason in planned["not_timed"]
    assert reason in " ".join(run(*args).stdout.split())


@pytest.mark.parametrize("name", [["pipeline", "Mine"], "Mine", None])
def test_a_pipeline_of_its_own_code_is_planned_and_not_loaded(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_configs(tmp_path, name, unet=random_unet(), vae=random_pipeline().vae, scheduler=diffusers.DDIMScheduler())
    said = "diffusers has no Mine" if name else "diffusers has no None"
    assert json.loads(run("plan", "--model", tmp_path, "--json").stdout)["not_timed"] == said
    result = run("sample", "--model", tmp_path, "--prompt", "a")
    assert result.exit_code == 2
    assert f"--model: {said}: load it in a program, and call attnreuse.enable(pipe)" in result.stderr


@pytest.mark.parametrize("command", ["sample", "search", "analyze", "compare"])
def test_pipelines_of_more_than_prompts_are_refused_by_name(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = diffusers.DDPMPipeline(unet=ZOO["UNet2DModel"]().model, scheduler=diffusers.DDPMScheduler())
    pipe.save_pretrained(tmp_path / "m")
    result = run(command, "--model", tmp_path / "m", "--prompt", "a", "--steps", 4)
    assert result.exit_code == 2
    assert "only pipelines that draw by prompts alone are sampled here: DDPMPipeline takes no prompt" in result.stderr


def test_plan_says_which_layers_it_does_not_find(tmp_path):
    policy = {"mid_block*": "..R.", "nothing*": ".R.R"}
    Policy(steps=4, reuse=policy).save(tmp_path / "p.json")
    args = ("plan", "--policy", tmp_path / "p.json", "--steps", 4, "--no-measure")
    assert "The policy names layers that are not served here: nothing*." in " ".join(run(*args).stdout.split())
    save_configs(tmp_path, "DDPMPipeline", unet=ZOO["UNet2DModel"]().model, scheduler=diffusers.DDIMScheduler())
    result = run("plan", "--model", tmp_path, "--layers", "cross")
    assert result.exit_code == 2
    assert "UNet2DModel has no layers 'cross' that can be served" in result.stderr


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is there")
def test_doctor_gives_remedies_that_fit_on_a_line(tmp_path, monkeypatch):
    """A torchvision of another build does not load; its metadata tells that it is installed."""
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (tmp_path / "torchvision-0.1.dist-info").mkdir()
    (tmp_path / "torchvision-0.1.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 0.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(doctor.EXTRAS, "plot", ("matplotlib", "no-such-package"))
    said = run("doctor").stdout.splitlines()
    assert "pip install 'attnreuse[plot]' brings no-such-package" in said
    assert "pip uninstall torchvision: pipelines fail beside one that was built for another torch" in said
    assert "does not load with this torch: operator torchvision::nms" in " ".join(" ".join(said).split())


def test_doctor_tells_what_is_there():
    found = json.loads(run("doctor", "--json").stdout)
    assert found["torch"]
    assert found["u8 maps on cpu"].startswith(("torch", "native"))
    assert all(found[f"reuse by the {kernel} kernel"] for kernel in ("cuda", "hopper"))
    assert run("doctor").exit_code == 0


def test_a_policy_file_is_used(tmp_path):
    path = tmp_path / "p.json"
    hurry(4, 1, None).save(path)
    planned = json.loads(run("plan", "--steps", 4, "--policy", path, "--no-measure", "--json").stdout)
    assert planned["policy"]["name"] == "hurry(4,1,max_age=None)"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("plan", "--reuse", 20), "reuse must be between 0 and 19 for 20 steps, got 20"),
        (("plan", "--scheduler", "magic"), "--scheduler must be one of DDIM, DDPM, PNDM, LMS, Euler, Euler a"),
        (("plan", "--layers", "nothing*"), "matches none of the 20 layers"),
        (("plan", "--memory-budget", "100"), "holds no map at all"),
        (("plan", "--policy", "/does/not/exist.json"), "--policy: no such policy file: /does/not/exist.json"),
        (("plan", "--policy", "nofile"), "--policy: no such policy file: nofile (a hub name is like user/name)"),
        (("plan", "--layers", "[a-b]*"), "'[a-b]*' matches none"),
        (("plan", "--layers", "[/a]"), "'[/a]' matches none"),
        (("plan", "--model", "./play"), "--model: no such folder: ./play"),
        (("plan", "--policy", "user/name", "--reuse", 4), "--policy decides that already: leave out --reuse"),
        (("plan", "--guidance", "nan"), "--guidance must be a finite number, got nan"),
        (("sample", "--guidance", "inf"), "--guidance must be a finite number, got inf"),
        (("plan", "--fit", "stretch"), "--fit is for --policy, which is not given"),
        (("sample", "--fit", "stretch"), "--fit is for --policy, which is not given"),
        (("plan", "--policy", "/"), "--policy: /: Is a directory"),
        (("compare", "--policy", "nofile.json"), "--policy: "),
        (("search", "--images", 4, "--prompt", "a"), "--prompt decides that already: leave out --images"),
        (("analyze", "--images", 4, "--prompt", "a"), "--prompt decides that already: leave out --images"),
        (("compare", "--images", 4, "--prompt", "a"), "--prompt decides that already: leave out --images"),
        (("analyze", "--schedules", 0, "--reuse", 3), "--schedules 0 decides that already: leave out --reuse"),
        (("sample", "--model", "user/name"), "--model needs --prompt"),
        (("sample", "--policy", "p.json", "--max-age", 4), "--policy decides that already: leave out --max-age"),
        (("sample", "--out", "[/x].jpg"), "--out must end in .png, got [/x].jpg"),
        (("sample", "--out", "/proc/x.png"), "--out: /proc/x.png cannot be written: No such file"),
        (("search", "--cache", "/does/not/c.jsonl"), "--cache: no such folder: /does/not"),
        (("sample", "--out", "picture.jpg"), "--out must end in .png, got picture.jpg"),
        (("sample", "--out", "/does/not/exist/s.png"), "no such folder: /does/not/exist"),
        (("sample", "--model", "/does/not/exist", "--prompt", "a"), "/does/not/exist"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(args, said):
    result = run(*args)
    assert result.exit_code == 2
    assert said in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert "Traceback" not in result.output


def test_a_policy_of_the_wrong_length_is_refused(tmp_path):
    hurry(5, 1, None).save(tmp_path / "p.json")
    result = run("plan", "--steps", 4, "--policy", tmp_path / "p.json")
    assert result.exit_code == 2
    assert "is for 5 executed steps, this run executes 4" in result.output


@pytest.mark.parametrize("command", ["sample", "plan", "search", "analyze", "compare", "bench", "doctor"])
def test_help_has_examples(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"attnreuse {command}" in result.output.split("Examples")[1]


def test_search_finds_a_policy_and_goes_on_from_its_cache(tmp_path):
    args = ("--steps", 4, "--reuse", 2, "--images", 1, "--cache", tmp_path / "c.jsonl", "--out", tmp_path / "p.json")
    first = run("search", *args, "--json")
    assert first.exit_code == 0, first.output
    found = json.loads(first.stdout)
    assert found["policy"]["reuse"].count("R") == 2
    assert found["policy"]["metrics"]["psnr_db"] >= found["start"] - 1e-4
    judged = (tmp_path / "c.jsonl").read_text()
    again = run("search", *args, "--method", "exhaustive")
    assert again.exit_code == 0, again.output
    assert "all evaluated" in " ".join(again.output.split())
    assert (tmp_path / "c.jsonl").read_text().startswith(judged)
    sampled = run("plan", "--steps", 4, "--policy", tmp_path / "p.json", "--no-measure", "--json")
    assert json.loads(sampled.stdout)["policy"]["reuse"] == found["policy"]["reuse"]


def test_ladder_search_saves_the_point_asked_for(tmp_path):
    args = ("--steps", 3, "--images", 1, "--method", "ladder", "--budget", 12, "--cache", tmp_path / "c.jsonl")
    result = run("search", *args, "--time", 0.999, "--out", tmp_path / "p.json", "--json")
    assert result.exit_code == 0, result.output
    points = json.loads(result.stdout)["points"]
    assert load_policy(tmp_path / "p.json") == Policy.model_validate(points[-1]["policy"])
    fewer = run("search", *args, "--floor", 0, "--out", tmp_path / "p.json")
    steps = load_policy(tmp_path / "p.json").steps
    assert steps < 3
    assert f"Run the saved policy with --steps {steps}." in fewer.output
    confirmed = run("search", *args, "--floor", 0, "--confirm", 2, "--out", tmp_path / "p.json", "--json")
    assert json.loads(confirmed.stdout)["pictures"] == 2
    lost = run("search", *args, "--floor", 500, "--out", tmp_path / "p.json")
    assert lost.exit_code == 2
    assert "schedules has at least 500 dB" in lost.output


def test_analyze_writes_figures_and_seeds_a_search(tmp_path):
    out = tmp_path / "a.json"
    result = run("analyze", "--steps", 4, "--images", 1, "--schedules", 3, "--reuse", 2, "--out", out)
    assert result.exit_code == 0, result.output
    assert "rank correlation" in " ".join(result.output.split())
    assert (tmp_path / "a.png").exists()
    assert (tmp_path / "a-layers.png").exists()
    args = ("--images", 1, "--cache", tmp_path / "c.jsonl", "--out", tmp_path / "p.json", "--analysis", out)
    assert run("search", "--steps", 4, "--reuse", 2, *args, "--budget", 2).exit_code == 0
    refused = run("search", "--steps", 5, "--reuse", 2, *args)
    assert refused.exit_code == 2
    assert "this run: DDIMScheduler, 5" in " ".join(refused.output.split())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ("analyze", "--images", 1, "--steps", 3, "--reuse", 9),
            "--reuse must be between 0 and 2 for 3 steps, got 9",
        ),
        (("analyze", "--images", 1, "--steps", 2), "an analysis needs a run of at least 3 executed steps, got 2"),
        (
            ("analyze", "--images", 1, "--steps", 4, "--reuse", 3),
            "--schedules must be 0, for no rank, where there are fewer than 3: 3 reuses in 4 steps can stand in 1 way",
        ),
        (
            ("analyze", "--images", 1, "--schedules", 1),
            "--schedules must be at least 3, or 0 for no rank, got 1",
        ),
        (("analyze", "--images", 1, "--layers", "x*"), "--layers must be 'self', 'cross', 'all' or patterns"),
        (("compare", "--images", 1, "--student", "nowhere"), "--student must be the folder of a UNet, with a config"),
        (("search", "--method", "ladder"), "say which point to save by --floor (dB) or --time"),
        (("search", "--method", "ladder", "--floor", "0.9", "--metric", "ssim"), "--metric is for --method phast or"),
        (("search", "--method", "ladder", "--time", "0.9", "--patience", "2"), "--patience is for --method phast, not"),
        (("search", "--method", "exhaustive", "--budget", "9"), "--budget is for --method phast or ladder, not for"),
        (("search", "--budget-time", "9"), "--budget-time is for --method ladder, not for phast"),
        (("search", "--confirm", "2"), "--confirm is for --method ladder, not for phast"),
        (("search", "--method", "ladder", "--time", "0.9", "--prompt", "a", "--confirm", "1"), "leaves no picture"),
        (("search", "--floor", "nan"), "--floor must be a finite number, got nan"),
        (("search", "--method", "ladder", "--floor", "inf"), "--floor must be a finite number, got inf"),
        (("search", "--method", "ladder", "--time", "nan"), "--time must be a finite number, got nan"),
        (("search", "--images", "1", "--reuse", "2.5"), "--reuse must be a share below 1 or a whole number of steps"),
        (("search", "--images", "1", "--reuse", "20"), "--reuse must be between 0 and 19 for 20 steps, got 20"),
        (("plan", "--memory-budget", "1K"), "--memory-budget of 1000 bytes"),
        (("search", "--workers", "2"), "--workers is for --engine ray, not for local"),
        (("search", "--out", "p.yaml"), "--out must end in .json, got p.yaml"),
        (("search", "--model", "user/model"), "--model needs --prompt"),
    ],
)
def test_bad_input_to_the_science_is_one_clear_line(args, said):
    result = run(*args)
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("args", "choices"),
    [
        (("plan", "--format", "u2"), "'fp32', 'fp16', 'bf16', 'u8', 'u7', 'u4'"),
        (("search", "--metric", "fid"), "'psnr', 'ssim', 'lpips'"),
        (("search", "--method", "random"), "'phast', 'exhaustive', 'ladder'"),
        (("compare", "--metric", "mse"), "'ssim', 'lpips', 'fid', 'clip'"),
    ],
)
def test_choices_are_named_where_another_is_given(args, choices):
    result = run(*args)
    assert result.exit_code == 2
    assert choices in " ".join(re.sub("[│╭╮╰╯─]", " ", result.output).split())


def test_a_missing_extra_is_named_with_its_remedy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("analyze", "--out", tmp_path / "a.json")
    assert result.exit_code == 2
    assert "pip install 'attnreuse[eval,plot]'" in result.output


def test_files_are_tried_before_anything_is_sampled(tmp_path):
    (tmp_path / "folder.png").mkdir()
    result = run("sample", "--out", tmp_path / "folder.png")
    assert result.exit_code == 2
    assert "cannot be written: Is a directory" in result.output
    writable("--out", tmp_path / "new.png", ".png")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.png"]


def test_an_interrupt_says_what_is_kept_and_how_to_go_on(tmp_path, monkeypatch):
    judge = InProcess.run

    def interrupted(self, policies, metrics, steps):
        yield next(judge(self, policies, metrics, steps))
        raise KeyboardInterrupt

    monkeypatch.setattr(InProcess, "run", interrupted)
    args = ("--steps", 3, "--reuse", 1, "--images", 1, "--cache", tmp_path / "c.jsonl", "--out", tmp_path / "p.json")
    result = run("search", *args)
    assert result.exit_code == 130
    assert (
        f"stopped: the scores so far are in {tmp_path / 'c.jsonl'}; run the same command again to go on"
        in result.output
    )


def test_without_a_terminal_progress_is_a_line_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(console, "EVERY", 0)
    args = ("--steps", 3, "--images", 1, "--cache", tmp_path / "c.jsonl", "--out", tmp_path / "p.json")
    result = run("search", "--reuse", 1, *args, "--json")
    assert re.search(r"2 of at most 200 schedules; PSNR \d+\.\d+ dB at the start, best \d+\.\d+", result.stderr)
    json.loads(result.stdout)
    out = tmp_path / "s.png"
    result = run("sample", "--steps", 2, "--reuse", 1, "--prompt", "a red circle on gray", "--out", out, "--json")
    assert "0 of 15 runs; warm-up, 2 steps" in result.stderr
    assert "14 of 15 runs; " in result.stderr
    confirmed = ("--method", "ladder", "--floor", 0, "--budget", 4, "--confirm", 1)
    told = run("search", *confirmed, *args, "--out", tmp_path / "l.json").stderr
    for said in (
        "0 of 14 runs; warm-up",
        "of 14 runs; timing reuse",
        "4 of at most 4 schedules; ",
        "4 of 4 schedules to confirm; judged by other pictures",
        "0 of 21 runs; timing ",
    ):
        assert said in told


def test_pipelines_load_silently(capfd):
    load_pipeline("", None)
    assert capfd.readouterr() == ("", "")


def test_without_a_network_the_cause_is_named_at_once(monkeypatch):
    def unreachable(url, **given):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    for args in (("sample", "--model", "user/x", "--prompt", "a"), ("plan", "--policy", "user/x")):
        result = run(*args)
        assert result.exit_code == 2
        assert (
            "user/x is neither a file nor a folder here, and the hub cannot be reached: Name or service not known"
            in result.output
        )
