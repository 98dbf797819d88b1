"""`attnreuse bench`: capture and reuse beside exact fused attention."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from attnreuse.cli.console import clear_errors, faint, out, progress
from attnreuse.cli.inputs import default_dtype
from attnreuse.cli.options import AsJson, Formats
from attnreuse.progress import Progress

EXAMPLES = (
    "    attnreuse bench\n\n    attnreuse bench --shape 2,10,4096,64 --format u8 --format u4\n\n"
    "    attnreuse bench --tune --shape 2,10,4096,64"
)
LEGEND = (
    "ratio: of exact attention's time. roofline: share of what memory and arithmetic allow; above 100 % where inputs "
    "stay in a cache. even at: reuses of a map after which it and its capture took no longer than exact attention."
)


def command(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="B,H,N,D of self-attention, or B,H,M,N,D. Repeatable. Default: layers of known models."),
    ] = None,
    map_format: Formats = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often each op is timed, all in turns.")] = 10,
    tune: Annotated[bool, typer.Option(help="Time the launch configurations of the Triton kernels instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Time capture and reuse beside exact fused attention on this machine.

    Default shapes: layers of SD1.5, SDXL and Flux on CUDA, those of tiny-shapes on a CPU.

    Default formats: fp16, u8, u4.
    """
    with clear_errors():
        from attnreuse.measure.environment import default_device, environment
        from attnreuse.study import bench as measuring
        from attnreuse.study import tuning

        device = default_device()
        dtype = default_dtype(device)
        formats = [f.value for f in map_format or []] or ["fp16", "u8", "u4"]
        default = measuring.SHAPES if device.type == "cuda" else measuring.CPU_SHAPES
        shapes = {text: _shape(text) for text in shape} if shape else default
        with progress("shapes") as tell:
            if tune:
                rows = [row for _, sizes in _told(shapes, tell) for row in tuning.tune(device, sizes, formats, repeats)]
                measured = {"configurations": [row.to_dict() for row in rows]}
            else:
                limits = measuring.ceilings(device, dtype)
                rows = [
                    row
                    for name, sizes in _told(shapes, tell)
                    for row in measuring.measure(name, sizes, formats, dtype, device, limits, repeats)
                ]
                measured = {"rows": measuring.to_dicts(rows, limits)}
        data = measured | {"environment": environment(device)}
    if as_json:
        print(json.dumps(data, indent=2))
        return
    for table in [_tune_table(rows)] if tune else _tables(rows):
        out.print(table)
    if not tune:
        out.print(LEGEND)
    faint(f"{data['environment']['device']}, {dtype}, medians of {repeats}")


def _told(shapes: dict[str, Any], tell: Progress) -> Iterator[tuple[str, Any]]:
    for done, (name, sizes) in enumerate(shapes.items()):
        tell(done, len(shapes), name)
        yield name, sizes


def _shape(text: str) -> tuple[int, ...]:
    """``B,H,N,D`` or ``B,H,M,N,D`` as five numbers."""
    parts = text.split(",")
    if len(parts) not in (4, 5) or not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise ValueError(f"--shape must be B,H,N,D or B,H,M,N,D, got {text!r}")
    sizes = tuple(map(int, parts))
    return sizes if len(sizes) == 5 else (*sizes[:3], *sizes[2:])


def _tables(rows: list[Any]) -> Iterator[Table]:
    for _, of_shape in itertools.groupby(rows, key=lambda row: row.shape):
        group = list(of_shape)
        first = group[0]
        title = f"{first.shape}: B {first.b} H {first.h} M {first.m} N {first.n} D {first.d}"
        table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
        for column in ("op", "ms", "ratio", "roofline", "even at", "MiB", "error"):
            table.add_column(column, justify="left" if column == "op" else "right", no_wrap=True)
        for row in group:
            figures = ["wrong: no speed", "", "", ""]
            if row.median_s is not None:
                pays = row.break_even
                pays = "" if pays is None else "never" if pays == math.inf else f"{pays:.1f}"
                figures = [f"{1e3 * row.median_s:.3f}", f"{row.of_exact:.2f}", f"{row.of_roofline:.0%}", pays]
            size = f"{row.map_bytes / 2**20:.1f}" if row.map_bytes else ""
            table.add_row(f"{row.op} {row.kind} {row.backend}", *figures, size, f"{row.error:.1e}")
        yield table


def _tune_table(rows: list[Any]) -> Table:
    table = Table(title="launch configurations, fastest first")
    for column in ("op", "format", "D", "rows", "warps", "stages", "registers", "time", ""):
        table.add_column(column, justify="left" if column in ("op", "format", "") else "right")
    for t in rows:
        config = [str(x or "") for x in (t.config.block_m, t.config.warps, t.config.stages, t.config.registers)]
        taken = f"{1e3 * t.times.median:.3f} ms" if t.times else t.reason
        table.add_row(t.op, t.map_format, str(t.head_dim), *config, taken, "shipped" if t.shipped else "")
    return table
