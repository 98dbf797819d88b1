"""`attnreuse compare`: reuse beside fewer steps and other caches, as one page."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from attnreuse.cli.console import clear_errors, faint, out, progress
from attnreuse.cli.inputs import check_prompts, load_pipeline, read_policy, setting_for, writable
from attnreuse.cli.options import AsJson, Batch, Eta, Formats, Guidance, Images, Layers, Metrics, Model, Prompts, Seed

EXAMPLES = (
    "    attnreuse compare\n\n    attnreuse compare --scheduler DDIM --scheduler DPM --images 8\n\n"
    "    attnreuse compare --steps 10 --steps 50 --format u8 --format u4 --images 8\n\n"
    '    attnreuse compare --model user/pipeline --prompt "a red fox" --policy policy.json'
)


def command(
    context: typer.Context,
    model: Model = "",
    steps: Annotated[
        list[int] | None, typer.Option("--steps", min=2, help="num_inference_steps. Repeatable. Default: 20.")
    ] = None,
    scheduler: Annotated[
        list[str] | None, typer.Option(help="Sampler, such as 'Euler a'. Repeatable. Default: the model's.")
    ] = None,
    map_format: Formats = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Policy: a file, or a name on the hub. Repeatable. Default: those shipped for tiny-shapes."),
    ] = None,
    student: Annotated[Path | None, typer.Option(help="Folder of a distilled UNet that also takes part.")] = None,
    others: Annotated[bool, typer.Option(help="Whether DeepCache, tomesd and PAB take part.")] = True,
    metric: Metrics = None,
    prompt: Prompts = None,
    images: Images = 16,
    seed: Seed = 0,
    guidance: Guidance = None,
    eta: Eta = None,
    layers: Layers = None,
    batch: Batch = 4,
    rounds: Annotated[int, typer.Option(min=1, help="How often each method is timed, all in turns.")] = 3,
    out_path: Annotated[
        Path, typer.Option("--out", help="Where the report goes (.html). A CSV file goes beside it.")
    ] = Path("attnreuse-compare.html"),
    as_json: AsJson = False,
) -> None:
    """Compare reuse with fewer steps and other caches at equal measured latency, on one page."""
    with clear_errors():
        from attnreuse.policy import shipped_policies
        from attnreuse.study import plots
        from attnreuse.study.compare import groups, page

        check_prompts(context, model, prompt)
        plots.pyplot()
        writable("--out", out_path, ".html")
        writable("--out", out_path.with_suffix(".csv"))
        judge = tuple(m.value for m in metric or []) or (("ssim",) if model else ("ssim", "fid", "clip"))
        count, formats = (steps or [20])[0], [f.value for f in map_format or []]
        policies = [read_policy(p) for p in policy] if policy else [] if model else shipped_policies()
        first = formats[0] if formats else None
        setting = setting_for(model, prompt, images, count, seed, guidance, eta, first, layers, batch, held_out=True)
        pipe = load_pipeline(model, None)
        with progress("runs") as tell:
            comparison = groups.compare(
                pipe, setting, schedulers=scheduler or [None], steps=steps, formats=formats or None, policies=policies,
                student=student, others=others, judge=judge, rounds=rounds, progress=tell,
            )  # fmt: skip
        written = page.write(comparison, out_path, shlex.join(["attnreuse", *sys.argv[1:]]))
    if as_json:
        print(comparison.model_dump_json(indent=2))
        return
    for group in comparison.groups:
        out.print(_table(group))
        for sentence in page.summary(group) + group.notes:
            out.print(sentence)
    faint(", ".join(map(str, written)))


MEAN_QUALITY = {  # what pictures are worth alone
    "shape": (".0%", "pictures whose first shape the caption oracle finds"),
    "clip_score": (".1f", "how well pictures match their prompts, the higher the better"),
    "fid": (".1f", "distance of all pictures from the full run's, as a set"),
}


def _table(group: Any) -> Table:
    """One line per method, within 80 columns; the page and the CSV hold the rest."""
    from attnreuse.study.metrics import shown_psnr

    title = f"{group.scheduler}, {group.steps} steps, {group.map_format} maps"
    judged = {key: told for key, told in MEAN_QUALITY.items() if key in group.judged}
    legend = ["time: of the full run's; plain: PSNR of plain steps in the same time"]
    legend += [f"{key.replace('_score', '')}: {what}" for key, (_, what) in judged.items()]
    table = Table(title=title, caption="\n".join(legend), box=None, caption_justify="left")
    table.add_column("method", overflow="fold")
    for column in ("time", "PSNR, dB", "plain", *judged):
        table.add_column(column.replace("_score", ""), justify="right", no_wrap=True)
    for row in group.rows:
        known = row.scores
        quality = "reference" if row is group.full else shown_psnr(known["psnr"], known.get("psnr_ci"))
        table.add_row(
            row.method.name,
            f"{row.of_full(group.full).median:.2f}",
            quality,
            "" if row.plain is None else f"{row.plain.psnr:.1f}",
            *(f"{known[key]:{form}}" if key in known else "" for key, (form, _) in judged.items()),
        )
    return table
