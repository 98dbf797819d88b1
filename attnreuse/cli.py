"""The command line: `attnreuse sample`, `search`, `analyze`, `compare`, `plan`, `bench`, `doctor`."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from attnreuse.errors import AttnReuseError

app = typer.Typer(
    help="Reuse attention maps between diffusion steps.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console()
err = Console(stderr=True)

PROMPTS = (
    "a red circle left of a blue square on gray",
    "a yellow triangle above a green circle on white",
    "a cyan square below a purple triangle on black",
    "a blue circle on pink",
)

Model = Annotated[str, typer.Option(help="Pipeline folder or hub name. Default: the shipped tiny-shapes.")]
Steps = Annotated[int, typer.Option(min=1, help="num_inference_steps of the full run.")]
Reuse = Annotated[int, typer.Option(min=0, help="Executed steps that reuse.")]
Share = Annotated[
    float, typer.Option(min=0, help="Share of the executed steps that reuse, such as 0.5; from 1 on, their number.")
]
MaxAge = Annotated[
    int | None,
    typer.Option(min=0, help="Reuse at the latest steps, maps at most so many steps old; 0: of any age (the paper)."),
]
PolicyFile = Annotated[
    str | None, typer.Option("--policy", help="File or hub name of a policy or rule. Default: shipped, or HURRY.")
]
Fit = Annotated[str, typer.Option(help="exact, or stretch a policy of other steps to this run, by noise level.")]
Format = Annotated[
    str | None, typer.Option("--format", help="fp32, fp16, bf16, u8, u7, u4. Default: u8 where a kernel serves it.")
]
Guidance = Annotated[float | None, typer.Option(help="guidance_scale. Default: what suits the model.")]
Eta = Annotated[float | None, typer.Option(min=0, max=1, help="Share of the noise that DDIM or TCD adds anew.")]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="Repeatable. Default (shipped model): captions.")]
Images = Annotated[int, typer.Option(min=1, help="Pictures, of as many captions, without --prompt.")]
Seed = Annotated[int, typer.Option(help="Seed of the first picture; the next ones count up.")]
Batch = Annotated[int, typer.Option(min=1, help="Pictures sampled at once.")]
Layers = Annotated[
    str | None,
    typer.Option(
        help="self, cross, all, or a pattern of layer names. Default: self, and layers that a policy names; "
        "search --method ladder: all."
    ),
]
MemoryBudget = Annotated[str | None, typer.Option(help="Most memory of maps, such as 4GiB.")]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="Sampler: DDIM, Euler a, 'DPM++ 2M SDE Karras', Heun ..., or diffusers' class. Default: the model's."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def main() -> None:
    """Entry point of the `attnreuse` command."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app()


@app.command(
    epilog="Examples:\n\n    attnreuse sample\n\n    attnreuse sample --scheduler Heun --reuse 0.25\n\n"
    '    attnreuse sample --model user/pipeline --prompt "a red fox" --steps 30 --reuse 0.4 --format u8'
)
def sample(
    model: Model = "",
    steps: Steps = 20,
    reuse: Share = 0.5,
    max_age: MaxAge = None,
    policy: PolicyFile = None,
    fit: Fit = "exact",
    map_format: Format = None,
    scheduler: Annotated[
        str | None, typer.Option(help="As elsewhere. Default: the model's; Euler a for the shipped model.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="guidance_scale. Default: the model's; 7.5 for the shipped model.")
    ] = None,
    eta: Eta = None,
    seed: Seed = 0,
    prompt: Prompts = None,
    out_path: Annotated[Path, typer.Option("--out", help="The picture; the JSON goes beside it.")] = Path(
        "attnreuse-sample.png"
    ),
    as_json: AsJson = False,
) -> None:
    """Sample with full steps, with reuse, and with fewer steps of equal measured latency."""
    with _clear_errors():
        from rich.progress import Progress, SpinnerColumn, TextColumn

        from attnreuse import sampling
        from attnreuse.samplers import step_options

        _suffix("--out", out_path, ".png")
        if not model:
            scheduler, guidance = scheduler or "Euler a", 7.5 if guidance is None else guidance
        pipe = _load_pipeline(model, scheduler)
        step_options(pipe.scheduler, eta)
        chosen = _policy(policy, fit, model, pipe.scheduler, steps, reuse, max_age)
        with Progress(
            SpinnerColumn(), TextColumn("{task.description}"), console=err, transient=True, disable=not err.is_terminal
        ) as progress:
            task = progress.add_task("warming up")
            result = sampling.sample(
                pipe,
                prompt or list(PROMPTS),
                steps=steps,
                policy=chosen,
                map_format=map_format or _default_format(pipe.unet.device, pipe.unet.dtype),
                seed=seed,
                guidance=guidance,
                eta=eta,
                advance=lambda label, count: progress.update(task, description=f"timed {label} ({count} steps)"),
            )
        sampling.sheet(result).save(out_path)
        json_path = out_path.with_suffix(".json")
        data = result.to_dict()
        json_path.write_text(json.dumps(data, indent=2) + "\n")
    if as_json:
        print(json.dumps(data, indent=2))
        return
    out.print(_comparison_table(result))
    out.print(_verdict(result))
    out.print(f"[dim]{out_path}, {json_path}; {data['environment']['device']}[/dim]", highlight=False)


@app.command(
    epilog="Examples:\n\n    attnreuse search --out policy.json\n\n    attnreuse search --metric ssim --floor 0.98\n\n"
    "    attnreuse search --method exhaustive --steps 10 --reuse 4\n\n"
    "    attnreuse search --method ladder --scheduler 'Euler a' --images 16 --floor 45\n\n"
    '    attnreuse search --model user/pipeline --prompt "a red fox" --prompt "a harbour" --engine ray'
)
def search(
    context: typer.Context,
    model: Model = "",
    steps: Steps = 20,
    reuse: Reuse = 10,
    method: Annotated[str, typer.Option(help="phast, exhaustive, or ladder.")] = "phast",
    variant: Annotated[str, typer.Option(help="phast: greedy, or exhaustive in each neighbourhood.")] = "greedy",
    metric: Annotated[str, typer.Option(help="psnr, ssim or lpips, against the full-step pictures.")] = "psnr",
    floor: Annotated[float | None, typer.Option(help="Seek the fastest schedule with at least this metric.")] = None,
    time: Annotated[
        float | None, typer.Option(help="ladder: seek the best schedule within this share of the full run's time.")
    ] = None,
    memory_budget: MemoryBudget = None,
    budget: Annotated[int, typer.Option(min=1, help="Most schedules to judge.")] = 200,
    budget_time: Annotated[
        float | None, typer.Option(min=0, help="ladder: minutes to search. Default: no limit.")
    ] = None,
    patience: Annotated[int | None, typer.Option(min=1, help="phast: give a start up after so many in vain.")] = None,
    restarts: Annotated[int, typer.Option(min=0, help="phast: random schedules to start from besides HURRY.")] = 0,
    analysis: Annotated[
        Path | None, typer.Option(help="phast: file of `attnreuse analyze`; its prediction seeds the search.")
    ] = None,
    by: Annotated[str, typer.Option(help="ladder: layers that share a row: kind, level or layer.")] = "level",
    prompt: Prompts = None,
    images: Annotated[
        int | None,
        typer.Option(min=1, help="Pictures, of as many captions, without --prompt. Default: 8; ladder: 16."),
    ] = None,
    seed: Seed = 1000,
    guidance: Guidance = None,
    eta: Eta = None,
    layers: Layers = None,
    map_format: Format = None,
    scheduler: Scheduler = None,
    batch: Batch = 4,
    engine: Annotated[str, typer.Option(help="local, or ray (extra `ray`).")] = "local",
    address: Annotated[str | None, typer.Option(help="Of a ray cluster. Default: a local one.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="ray: workers. Default: as many as fit.")] = None,
    cache: Annotated[Path, typer.Option(help="Scores, kept as they come: run again to go on.")] = Path(
        "attnreuse-search.jsonl"
    ),
    out_path: Annotated[Path, typer.Option("--out", help="The policy found.")] = Path("attnreuse-policy.json"),
    as_json: AsJson = False,
) -> None:
    """Search the schedule that keeps the full-step pictures best (PHAST), or the front of time and quality (ladder)."""
    with _clear_errors():
        from attnreuse import search as searching
        from attnreuse.evaluate import Evaluator
        from attnreuse.front import ladder
        from attnreuse.planner import parse_bytes

        _one_of("--method", method, "phast", "exhaustive", "ladder")
        _one_of("--engine", engine, "local", "ray")
        _one_of("--by", by, "kind", "level", "layer")
        _refuse_ignored(context, "--method", method, ONLY_FOR_METHOD)
        _refuse_ignored(context, "--engine", engine, dict.fromkeys(("address", "workers"), ("ray",)))
        is_ladder = method == "ladder"
        if is_ladder and floor is None and time is None:
            raise ValueError(
                "--method ladder finds a front: say which point to save by --floor (dB) or --time (a share)"
            )
        objective = searching.Objective(metric, floor, parse_bytes(memory_budget))
        _suffix("--out", out_path, ".json")
        layers = layers or ("all" if is_ladder else None)
        images = images or (16 if is_ladder else 8)
        setting = _setting(model, prompt, images, steps, seed, guidance, eta, map_format, layers, batch)
        evaluator = Evaluator(_load_pipeline(model, scheduler), setting)
        chosen = searching.RayEngine(evaluator, workers, address) if engine == "ray" else searching.InProcess(evaluator)
        with _progress() as advance:
            given: dict[str, Any] = {"cache": cache, "progress": advance}
            if method == "phast":
                starts, rank = _predicted(analysis, evaluator, reuse)
                found: Any = searching.phast(
                    evaluator.pipe, steps, reuse, evaluator.setting.prompts, objective=objective, variant=variant,
                    starts=starts, rank=rank, restarts=restarts, budget=budget, patience=patience, seed=seed,
                    engine=chosen, **given,
                )  # fmt: skip
            elif method == "exhaustive":
                found = searching.exhaustive(chosen, reuse, objective=objective, **given)
            else:
                seconds = None if budget_time is None else 60 * budget_time
                found = ladder(
                    chosen, by=by, budget=budget, budget_time=seconds, memory_budget=objective.memory_budget,
                    seed=seed, **given,
                )  # fmt: skip
        picked = found.pick(floor, time) if is_ladder else found
        picked.policy.save(out_path)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    out.print(_front_table(found, picked) if is_ladder else _search_table(found, metric))
    if is_ladder and picked.steps != steps:
        out.print(f"Run the saved policy with --steps {picked.steps}.", highlight=False)
    out.print(f"[dim]{out_path}; scores in {cache}[/dim]", highlight=False)


@app.command(
    epilog="Examples:\n\n    attnreuse analyze\n\n    attnreuse analyze --scheduler DPM --out dpm.json\n\n"
    "    attnreuse search --analysis attnreuse-analysis.json"
)
def analyze(
    model: Model = "",
    steps: Steps = 20,
    prompt: Prompts = None,
    images: Images = 4,
    seed: Seed = 2000,
    guidance: Guidance = None,
    eta: Eta = None,
    layers: Layers = None,
    scheduler: Scheduler = None,
    batch: Batch = 4,
    schedules: Annotated[int, typer.Option(min=0, help="Random schedules to test the prediction on.")] = 100,
    reuse: Annotated[int | None, typer.Option(min=1, help="Reuse steps of each. Default: half.")] = None,
    noise: Annotated[float, typer.Option(min=1e-4, help="Relative size of the perturbation of the maps.")] = 0.05,
    out_path: Annotated[Path, typer.Option("--out", help="Measurements; plots go beside it as PNG.")] = Path(
        "attnreuse-analysis.json"
    ),
    as_json: AsJson = False,
) -> None:
    """How errors grow, maps drift and age costs; and how well that predicts a schedule's error."""
    with _clear_errors():
        from attnreuse import analysis, plots
        from attnreuse.evaluate import Evaluator

        plots.pyplot()
        _suffix("--out", out_path, ".json")
        setting = _setting(model, prompt, images, steps, seed, guidance, eta, "fp32", layers, batch)
        evaluator = Evaluator(_load_pipeline(model, scheduler), setting)
        with _progress() as advance:
            found = analysis.analyze(evaluator, schedules=schedules, reuse=reuse, noise=noise, progress=advance)
        found.save(out_path)
        pictures = {out_path.with_suffix(".png"): plots.analysis_figure(found)}
        pictures[out_path.with_name(f"{out_path.stem}-layers.png")] = plots.layer_drift_figure(found)
        for path, figure in pictures.items():
            figure.savefig(path, dpi=120)
    if as_json:
        print(found.model_dump_json(indent=2))
        return
    for table in _analysis_tables(found):
        out.print(table)
    out.print(f"[dim]{', '.join(map(str, [out_path, *pictures]))}[/dim]", highlight=False)


@app.command(
    epilog="Examples:\n\n    attnreuse compare\n\n    attnreuse compare --scheduler DDIM --scheduler DPM --images 8\n\n"
    "    attnreuse compare --steps 10 --steps 50 --format u8 --format u4 --images 8\n\n"
    '    attnreuse compare --model user/pipeline --prompt "a red fox" --policy policy.json'
)
def compare(
    model: Model = "",
    steps: Annotated[
        list[int] | None, typer.Option("--steps", min=2, help="num_inference_steps; repeatable. Default: 20.")
    ] = None,
    scheduler: Annotated[
        list[str] | None, typer.Option(help="Sampler, such as 'Euler a'; repeatable. Default: the model's.")
    ] = None,
    map_format: Annotated[
        list[str] | None, typer.Option("--format", help="fp32, fp16, bf16, u8, u7, u4; repeatable.")
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="Policy file or hub name; repeatable. Default: those shipped.")
    ] = None,
    student: Annotated[Path | None, typer.Option(help="Folder of a distilled UNet.")] = None,
    others: Annotated[bool, typer.Option(help="Also DeepCache, tomesd and PAB.")] = True,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Besides PSNR: ssim, lpips, fid, clip; repeatable. Default: ssim; shipped model: no lpips."),
    ] = None,
    prompt: Prompts = None,
    images: Images = 16,
    seed: Seed = 0,
    guidance: Guidance = None,
    eta: Eta = None,
    layers: Layers = None,
    batch: Batch = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds, all methods in turns.")] = 3,
    out_path: Annotated[Path, typer.Option("--out", help="The report (.html); a CSV goes beside it.")] = Path(
        "attnreuse-compare.html"
    ),
    as_json: AsJson = False,
) -> None:
    """Reuse, fewer steps and other caches at equal measured latency: the paper's comparison, as one page."""
    with _clear_errors():
        import sys

        from attnreuse import compare as comparing
        from attnreuse import page, plots
        from attnreuse.policy import load_policy, shipped_policies

        plots.pyplot()
        _suffix("--out", out_path, ".html")
        judge = tuple(metric or (["ssim"] if model else ["ssim", "fid", "clip"]))
        for name in judge:
            _one_of("--metric", name, "ssim", "lpips", "fid", "clip")
        count = (steps or [20])[0]
        formats = map_format or [None]
        setting = _setting(model, prompt, images, count, seed, guidance, eta, formats[0], layers, batch, held_out=True)
        shipped = shipped_policies() if not model else []
        with _progress() as advance:
            found = comparing.compare(
                _load_pipeline(model, None), setting, schedulers=scheduler or [None], steps=steps, formats=map_format,
                policies=[load_policy(p) for p in policy] if policy else shipped, student=student, others=others,
                judge=judge, rounds=rounds, progress=advance,
            )  # fmt: skip
        written = page.write(found, out_path, " ".join(["attnreuse", *sys.argv[1:]]))
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    for group in found.groups:
        out.print(_group_table(group))
        for sentence in page.summary(group) + group.notes:
            out.print(sentence, highlight=False)
    out.print(f"[dim]{', '.join(map(str, written))}[/dim]", highlight=False)


@app.command(
    epilog="Examples:\n\n    attnreuse plan\n\n    attnreuse plan --height 256 --width 256 --format u4\n\n"
    "    attnreuse plan --model user/pipeline --steps 30 --reuse 12 --memory-budget 2GiB"
)
def plan(
    model: Model = "",
    steps: Steps = 20,
    reuse: Share = 0.5,
    max_age: MaxAge = None,
    policy: PolicyFile = None,
    fit: Fit = "exact",
    map_format: Format = None,
    scheduler: Scheduler = None,
    layers: Layers = None,
    height: Annotated[int | None, typer.Option(min=8, help="Pixels. Default: the model's own.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="Pixels. Default: the model's own.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at once; guidance doubles it.")] = 4,
    guidance: Annotated[bool, typer.Option(help="Classifier-free guidance.")] = True,
    memory_budget: MemoryBudget = None,
    measure: Annotated[bool, typer.Option(help="Time each distinct layer here, to predict the gain.")] = True,
    as_json: AsJson = False,
) -> None:
    """Memory and predicted attention time of a policy, before running it (only configs are loaded)."""
    with _clear_errors():
        from attnreuse import forecast
        from attnreuse.environment import default_device

        blueprint = forecast.Blueprint.load(_model(model), scheduler)
        device = default_device()
        dtype = _default_dtype(device)
        chosen = _policy(policy, fit, model, blueprint.scheduler, steps, reuse, max_age)
        result = forecast.forecast(
            blueprint,
            chosen,
            map_format=map_format or _default_format(device, dtype),
            layers=layers,
            size=(height or blueprint.side, width or blueprint.side),
            batch=batch * (2 if guidance else 1),
            memory_budget=memory_budget,
            dtype=dtype,
            measure_on=device if measure else None,
        )
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
        return
    out.print(result)


@app.command(
    epilog="Examples:\n\n    attnreuse bench\n\n    attnreuse bench --shape 2,10,4096,64 --format u8 --format u4\n\n"
    "    attnreuse bench --tune --shape 2,10,4096,64"
)
def bench(
    shape: Annotated[
        list[str] | None, typer.Option(help="B,H,N,D (self-attention) or B,H,M,N,D; repeatable. Default: known layers.")
    ] = None,
    map_format: Annotated[
        list[str] | None,
        typer.Option("--format", help="fp32, fp16, bf16, u8, u7, u4; repeatable. Default: fp16, u8, u4."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 10,
    tune: Annotated[bool, typer.Option(help="Time the Triton kernels' launch configurations instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Capture and reuse beside exact fused attention, on this machine.

    Default shapes: layers of SD1.5, SDXL and Flux on CUDA, those of tiny-shapes on a CPU.
    """
    with _clear_errors():
        from attnreuse import bench as measuring
        from attnreuse.environment import default_device, environment
        from attnreuse.formats import map_format as format_named

        device = default_device()
        dtype = _default_dtype(device)
        formats = [format_named(name).name for name in map_format or ["fp16", "u8", "u4"]]
        default = measuring.SHAPES if device.type == "cuda" else measuring.CPU_SHAPES
        shapes = {text: _shape(text) for text in shape} if shape else default
        if tune:
            found = list(measuring.tune(device, list(shapes.values()), formats, repeats))
            data: dict[str, Any] = {"configurations": [t.to_dict() for t in found], "environment": environment(device)}
        else:
            limits = measuring.ceilings(device, dtype)
            found = []
            for name, sizes in shapes.items():
                found += measuring.measure(name, sizes, formats, dtype, device, limits, repeats)
            data = {"rows": measuring.to_dicts(found, limits), "environment": environment(device)}
    if as_json:
        print(json.dumps(data, indent=2))
        return
    for table in [_tune_table(found)] if tune else _bench_tables(found):
        out.print(table)
    out.print(f"[dim]{data['environment']['device']}, {dtype}, medians of {repeats}[/dim]", highlight=False)


@app.command(epilog="Examples:\n\n    attnreuse doctor\n\n    attnreuse doctor --json")
def doctor(as_json: AsJson = False) -> None:
    """What is installed, and which backend serves which map format here, and why."""
    import torch

    from attnreuse import native, ops
    from attnreuse.environment import default_device, environment
    from attnreuse.formats import FORMATS

    found: dict[str, Any] = dict(environment(default_device()))
    found["cuda"] = torch.version.cuda if torch.cuda.is_available() else "no CUDA device"
    found["extension"] = native.INFO
    devices = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
    for device in devices:
        for name in FORMATS:
            dtype = _default_dtype(device)
            backend = ops.backend_for(name, device, dtype, 64)
            reasons = ops.unserved_reasons(name, device, dtype, 64)
            found[f"{name} maps on {device.type}"] = backend + "".join(f"; {b}: {why}" for b, why in reasons.items())
    for name, named in ops.NAMED.items():
        reason = named.unserved(FORMATS["u8"], devices[-1], torch.float16, 64)
        found[f"reuse by the {name} kernel"] = reason or "u8 and u4 maps of fp16 tensors, where it is named"
    if as_json:
        print(json.dumps(found, indent=2))
        return
    table = Table(show_header=False)
    for key, value in found.items():
        table.add_row(key, str(value))
    out.print(table)


def _shape(text: str) -> tuple[int, ...]:
    """``B,H,N,D`` or ``B,H,M,N,D`` as five numbers."""
    parts = text.split(",")
    if len(parts) not in (4, 5) or not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise ValueError(f"--shape must be B,H,N,D or B,H,M,N,D, got {text!r}")
    sizes = tuple(map(int, parts))
    return sizes if len(sizes) == 5 else (*sizes[:3], *sizes[2:])


def _bench_tables(rows: list[Any]) -> Iterator[Table]:
    for _, of_shape in itertools.groupby(rows, key=lambda row: row.shape):
        group = list(of_shape)
        first = group[0]
        table = Table(title=f"{first.shape}: B {first.b} H {first.h} M {first.m} N {first.n} D {first.d}")
        for column in ("op", "time", "of exact", "of roofline", "break-even", "map", "error"):
            table.add_column(column, justify="left" if column == "op" else "right")
        for row in group:
            figures = ["wrong: no speed", "", "", ""]
            if row.median_s is not None:
                pays = row.break_even
                pays = "" if pays is None else "never" if pays == math.inf else f"{pays:.1f}"
                figures = [f"{1e3 * row.median_s:.3f} ms", f"{row.of_exact:.2f}", f"{row.of_roofline:.0%}", pays]
            held = f"{row.map_bytes / 2**20:.1f} MiB" if row.map_bytes else ""
            table.add_row(f"{row.op} {row.kind} {row.backend}", *figures, held, f"{row.error:.1e}")
        yield table


def _tune_table(found: list[Any]) -> Table:
    table = Table(title="launch configurations, fastest first")
    for column in ("op", "format", "D", "rows", "warps", "stages", "registers", "time", ""):
        table.add_column(column, justify="left" if column in ("op", "format", "") else "right")
    for t in found:
        config = [str(x or "") for x in (t.config.block_m, t.config.warps, t.config.stages, t.config.registers)]
        taken = f"{1e3 * t.times.median:.3f} ms" if t.times else t.reason
        table.add_row(t.op, t.map_format, str(t.head_dim), *config, taken, "shipped" if t.shipped else "")
    return table


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    """Bad input ends in one clear line and exit code 2."""
    try:
        yield
    except (AttnReuseError, ValueError, OSError) as error:
        err.print(f"[red]error:[/red] {str(error).splitlines()[0]}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


def _model(model: str) -> str:
    from attnreuse import tiny_shapes_path

    return model or str(tiny_shapes_path())


def _default_dtype(device: Any) -> Any:
    import torch

    return torch.float16 if device.type == "cuda" else torch.float32


def _default_format(device: Any, dtype: Any) -> str:
    """u8 where a kernel serves it; through plain torch fp32 maps are the fastest."""
    from attnreuse import ops

    return "fp32" if ops.backend_for("u8", device, dtype, 64) == "torch" else "u8"


def _load_pipeline(model: str, scheduler: str | None) -> Any:
    from diffusers import DiffusionPipeline

    from attnreuse.environment import default_device
    from attnreuse.samplers import make_scheduler

    device = default_device()
    pipe = DiffusionPipeline.from_pretrained(_model(model)).to(device, _default_dtype(device))
    pipe.set_progress_bar_config(disable=True)
    if scheduler:
        pipe.scheduler = make_scheduler(pipe.scheduler.config, scheduler)
    return pipe


def _policy(
    file: str | None, fit: str, model: str, scheduler: Any, steps: int, reuse: float, max_age: int | None
) -> Any:
    """The policy for a run: of the file; else, for the shipped model, the shipped one that fits; else HURRY."""
    from attnreuse.clock import executed_steps
    from attnreuse.levels import resolved
    from attnreuse.policy import Policy, Stretched, hurry, load_policy, shipped_policies
    from attnreuse.rows import count_of

    _one_of("--fit", fit, "exact", "stretch")
    executed = executed_steps(scheduler, steps)
    if not math.isfinite(reuse) or (reuse >= 1 and reuse != int(reuse)):
        raise ValueError(f"--reuse must be a share below 1 or a whole number of steps, got {reuse}")
    count = int(reuse) if reuse >= 1 else count_of(reuse, executed) if reuse >= 0 else -1
    if file is None and not 0 <= count < executed:
        raise ValueError(f"--reuse must be between 0 and {executed - 1} for {executed} steps, got {reuse:g}")
    if file is not None:
        found = load_policy(file)
        if isinstance(found, Policy) and fit == "exact" and found.steps != executed:
            raise ValueError(
                f"--policy {file} is for {found.steps} executed steps, this run executes {executed}: --fit stretch"
            )
        if isinstance(found, Policy) and found.steps == executed:
            return found
        rule = Stretched(policy=found) if isinstance(found, Policy) else found
        return resolved(rule, scheduler, executed)
    if max_age is not None:
        return hurry(executed, count, max_age or None)
    fitting = shipped_policies(type(scheduler).__name__, executed) if not model else []
    fitting = [p for p in fitting if p.reuse_steps == count]
    return fitting[0] if fitting else resolved(hurry(reuse=count / executed), scheduler, executed)


def _suffix(option: str, path: Path, suffix: str) -> None:
    """Refuse a bad place to write to before hours are spent."""
    if path.suffix.lower() != suffix:
        raise ValueError(f"{option} must end in {suffix}, got {path}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{option}: no such folder: {path.absolute().parent}")


def _one_of(option: str, given: str, *known: str) -> None:
    if given not in known:
        raise ValueError(f"{option} must be one of {', '.join(known)}, got {given!r}")


ONLY_FOR_METHOD = {  # options of `search`, by their parameters
    **dict.fromkeys(("variant", "patience", "restarts", "analysis"), ("phast",)),
    **dict.fromkeys(("reuse", "metric"), ("phast", "exhaustive")),
    **dict.fromkeys(("time", "budget_time", "by"), ("ladder",)),
    "budget": ("phast", "ladder"),
}


def _refuse_ignored(context: typer.Context, option: str, chosen: str, only_for: dict[str, tuple[str, ...]]) -> None:
    """Refuse options that were given, and that `option` as `chosen` makes no use of."""
    for name, users in only_for.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and chosen not in users:
            raise ValueError(f"--{name.replace('_', '-')} is for {option} {' or '.join(users)}, not for {chosen}")


def _guidance(model: str, given: float | None) -> float | None:
    """guidance_scale as given, or what suits the shipped model; None: the model's default."""
    from attnreuse import TINY_SHAPES_GUIDANCE

    return TINY_SHAPES_GUIDANCE if given is None and not model else given


def _setting(
    model: str,
    prompts: list[str] | None,
    images: int,
    steps: int,
    seed: int,
    guidance: float | None,
    eta: float | None,
    map_format: str | None,
    layers: str | None,
    batch: int,
    held_out: bool = False,
) -> Any:
    """What to sample: the prompts given, or `images` captions of the shipped pipeline's grammar."""
    from attnreuse import tiny_shapes
    from attnreuse.environment import default_device
    from attnreuse.evaluate import Setting

    if not prompts and model:
        raise ValueError("--model needs --prompt (repeatable): the default captions are those of the shipped pipeline")
    draw = tiny_shapes.held_out_prompts if held_out else tiny_shapes.search_prompts
    device = default_device()
    return Setting(
        tuple(prompts or draw(images)),
        steps,
        seed,
        _guidance(model, guidance),
        eta,
        map_format=map_format or _default_format(device, _default_dtype(device)),
        layers=layers,
        batch=batch,
    )


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    """A bar with the time left; gives the function to call with (done, of, a figure)."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, of, best: bar.update(task, completed=done, total=of, description=f"{best:.4g}")


def _front_table(found: Any, picked: Any) -> Table:
    """The points of a front, and which of them is saved."""
    table = Table(title=f"{found.evaluations} schedules judged, stopped at: {found.stopped}; time as a share of "
                  f"{found.full_s:.2f} s, predicted")  # fmt: skip
    for column in ("time", "PSNR, dB", "steps", "schedule", ""):
        table.add_column(column, justify="right" if column in ("time", "PSNR, dB", "steps") else "left")
    for point in found.points:
        does = "reuses" if point.policy.reuse_steps else "computes all"
        saved = "saved" if point is picked else ""
        table.add_row(f"{point.time:.3f}", f"{point.psnr_db:.2f}", str(point.steps), does, saved)
    return table


def _search_table(found: Any, metric: str) -> Table:
    """Improvements of a step-wise search."""
    table = Table(title=f"{found.policy.name}: {found.evaluations} schedules, stopped at: {found.stopped}; "
                  f"{found.calls.saved:.0%} of denoiser calls replayed")  # fmt: skip
    for column in ("schedule", metric, "after"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    for step in found.history:
        table.add_row(step.reuse, f"{step.metric:.3f}", str(step.evaluations))
    return table


def _predicted(analysis: Path | None, evaluator: Any, reuse: int) -> tuple[list[Any], Any]:
    """Where a search starts, and how it ranks: by an analysis; else by noise levels; else from HURRY, unranked."""
    from attnreuse.rows import best_row, level_error, schedule_error

    if analysis is None and evaluator.levels is None:
        return [], None
    if analysis is None:
        error, executed = level_error(evaluator.levels, evaluator.influence), evaluator.executed_steps
        row = best_row(executed, reuse, error)
        return [evaluator.policy(row, "start")], lambda policy: schedule_error(policy.reuse, error)
    from attnreuse.analysis import Analysis, best_predicted, predict
    from attnreuse.policy import hurry

    found = Analysis.load(analysis)
    made_for, here = (found.scheduler, found.steps), (evaluator.scheduler, evaluator.executed_steps)
    if made_for != here:
        raise ValueError(
            f"--analysis {analysis} is of {made_for[0]}, {made_for[1]} steps; this run: {here[0]}, {here[1]}"
        )
    return [best_predicted(found, reuse), hurry(found.steps, reuse, None)], lambda policy: predict(policy, found)


def _analysis_tables(found: Any) -> Iterator[Table]:
    growth = Table(title=f"growth of a perturbation at one of {found.steps} steps, {found.scheduler}")
    for column in ("perturbation", "rate per step", "95 % interval", "R²", "off the fit at steps"):
        growth.add_column(column)
    for g in (found.growth, found.noise):
        what = "reuse of the last map" if g.size is None else f"noise of relative size {g.size:g}"
        interval = f"{g.rate_low:.3f} to {g.rate_high:.3f}"
        growth.add_row(what, f"{g.rate:.3f}", interval, f"{g.r2:.2f}", ", ".join(map(str, g.misfits)) or "none")
    yield growth
    stale = Table(title="distance of the final latent when one step applies maps of this age")
    stale.add_column("step")
    for age in found.staleness.ages:
        stale.add_column(str(age), justify="right")
    for step, distances in zip(found.staleness.steps, found.staleness.distances, strict=True):
        stale.add_row(str(step), *("" if d is None else f"{d:.2e}" for d in distances))
    yield stale
    if found.prediction is not None:
        ranks = Table(
            "predicted from", title=f"rank correlation with the error of {len(found.prediction.schedules)} schedules"
        )
        ranks.add_column("rank", justify="right")
        p = found.prediction
        for column, rank in (
            ("growth and drift, measured (attnreuse.predict)", p.rank),
            ("noise levels (the rule hurry)", p.rank_level),
            ("the same, ages in calls", p.rank_age),
            ("growth fit alone", p.rank_growth),
            ("latest is best (the paper)", p.rank_hurry),
        ):
            ranks.add_row(column, "" if rank is None else f"{rank:.3f}")
        yield ranks


def _comparison_table(result: Any) -> Table:
    table = Table(title=f"{len(result.prompts)} pictures, {result.policy}, {result.report.map_format} maps")
    for column in ("", "steps", "latency", "against full", "PSNR", "map memory"):
        table.add_column(column, justify="left" if not column else "right")
    for row in result.rows:
        reference = row is result.baseline
        quality = "reference" if reference else "equal" if row.mean_psnr_db is None else f"{row.mean_psnr_db:.2f} dB"
        table.add_row(
            row.label,
            str(row.steps),
            f"{row.latency_s:.2f} s",
            f"{row.latency_s / result.baseline.latency_s:.2f}x",
            quality,
            f"{result.report.allocated_bytes / 2**20:.1f} MiB" if row is result.reuse else "",
        )
    return table


MEAN_QUALITY = {"shape": ".0%", "relation": ".0%", "clip_score": ".1f", "fid": ".1f"}  # what pictures are worth alone


def _group_table(group: Any) -> Table:
    """One line per method, within 80 columns; the page and the CSV hold the rest."""
    title = f"{group.scheduler}, {group.steps} steps, {group.map_format} maps; time as a ratio to the full run's"
    table = Table(title=title, box=None)
    judged = {key: form for key, form in MEAN_QUALITY.items() if key in group.full.scores or key == "fid"}
    for column in ("method", "time", "maps", "PSNR, dB", "plain, same time", "same maps", *judged):
        table.add_column(column.replace("_score", ""), justify="left" if column == "method" else "right")
    for row in group.rows:
        quality = "reference" if row is group.full else f"{row.scores['psnr']:.1f} ± {row.scores['psnr_ci']:.1f}"
        table.add_row(
            row.method.name,
            f"{row.latency_s / group.full.latency_s:.2f}",
            "" if row.maps_computed is None else f"{row.maps_computed:.0%}",
            quality,
            *("" if v is None else f"{v:.1f}" for v in (row.plain_psnr, row.equal_cost_psnr)),
            *(f"{row.scores[key]:{form}}" if key in row.scores else "" for key, form in judged.items()),
        )
    return table


def _verdict(result: Any) -> str:
    """Honest lines about what was measured."""
    share = result.attention_s / result.baseline.latency_s
    limit = (
        f"Attention with its projections takes {share:.0%} of full steps' time in the layers with maps; reuse "
        f"could save {result.at_most_s:.2f} s at most, and saved {result.saved_s:.2f} s."
    )
    ratio = result.baseline.latency_s / result.reuse.latency_s
    speed = f"Reuse ran {ratio:.2f} times as fast as full steps" if ratio >= 1 else (
        f"Reuse did not pay here: it took {1 / ratio:.2f} times as long as full steps"
    )  # fmt: skip
    ours, theirs = result.reuse.mean_psnr_db, result.fewer.mean_psnr_db
    if ours is None or theirs is None:
        return f"{speed}. {limit}"
    better = "above" if ours > theirs else "below"
    gap = f"its PSNR is {abs(ours - theirs):.2f} dB {better} that of {result.fewer.steps} plain steps"
    return f"{speed}; {gap}. {limit}"
