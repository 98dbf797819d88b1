"""One HTML file of a comparison: summary, tables, plots, schedules as strips, pictures; and CSV beside it."""

from __future__ import annotations

import base64
import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from attnreuse.errors import AttnReuseError
from attnreuse.study.compare.groups import Comparison, Group
from attnreuse.study.compare.measure import Measured, Plain
from attnreuse.study.metrics import shown_psnr
from attnreuse.study.plots import FAMILIES, Spot, pareto_figure, pyplot, spot_name

TEMPLATE = Path(__file__).parents[2] / "assets" / "comparison.html"
OTHERS = {
    "ssim": ("SSIM", ".4f"), "lpips": ("LPIPS", ".4f"), "fid": ("FID", ".2f"), "clip_score": ("CLIP", ".1f"),
    "shape": ("shape", ".0%"), "relation": ("relation", ".0%"),
}  # fmt: skip


def write(comparison: Comparison, path: Path, command: str) -> list[Path]:
    """Write the page to `path` and its rows to the CSV beside it; `command` made them."""
    try:
        from jinja2 import Environment, FileSystemLoader
    except ImportError as error:
        raise AttnReuseError("the report needs jinja2: pip install 'attnreuse[plot]'") from error
    page = Environment(loader=FileSystemLoader(TEMPLATE.parent), autoescape=True).get_template(TEMPLATE.name)
    groups = [
        {
            "title": f"{g.scheduler}, {g.steps} steps, {g.map_format} maps",
            "summary": summary(g),
            "notes": g.notes,
            "others": [OTHERS[key][0] for key in _known(g)],
            "rows": [_cells(r, g) for r in g.rows],
            "pareto": _svg(pareto_figure([_spot(r, g.full) for r in g.rows[1:]], _finding(g))),
            "grid": _grid(g, list(comparison.setting.prompts)),
        }
        for g in comparison.groups
    ]
    families = {row.method.family for g in comparison.groups for row in g.rows}
    colors = {name: family.color for name, family in FAMILIES.items() if name in families}
    html = page.render(groups=groups, comparison=comparison, command=command, colors=colors)
    path.write_text(html, encoding="utf-8")
    table = path.with_suffix(".csv")
    rows = [row.row() for g in comparison.groups for row in g.rows]
    about = {"images": len(comparison.setting.prompts), "rounds": comparison.rounds, **comparison.environment}
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *about])
        writer.writeheader()
        writer.writerows(row | about for row in rows)
    return [path, table]


def summary(group: Group) -> list[str]:
    """What the group's figures say about reuse, in sentences."""
    reuse = _family(group, "reuse")
    if not reuse:
        return []
    best = max(reuse, key=lambda r: r.scores["psnr"])
    said = [f"Closest to the full run among reuse schedules: {best.method.name}, {best.scores['psnr']:.1f} dB."]
    known = {r.method.name: r.equal_cost for r in reuse if r.equal_cost is not None}
    said.append(f"At equal cost as the paper counts it (attention maps computed), {_above(known, len(known))}.")
    faster = _faster(group)
    known = {r.method.name: r.plain for r in faster if r.plain is not None}
    said.append(
        f"{len(faster)} of {len(reuse)} schedules took less time than the full run; at equal measured time "
        f"{_above(known, len(reuse))}."
    )
    if len(group.full.latencies_s) < 3:
        said.append("Methods were timed less than three times: times this near differ from run to run.")
    if "psnr_ci" not in best.scores:
        said.append("One picture says little: others may order the methods otherwise.")
    return said


def _above(known: dict[str, Plain], of: int) -> str:
    """How many of so many schedules lie above plain steps, and how many of the others may."""
    above = [name for name, plain in known.items() if plain.gain > 0 and plain.is_clear]
    unclear = sum(not plain.is_clear for plain in known.values())
    who = f" ({', '.join(above)})" if 0 < len(above) < of else ""
    said = f"{len(above)} of {of} schedules{who} {'lies' if len(above) == 1 else 'lie'} above plain steps"
    return said + (f", {unclear} within what pictures differ by" if unclear else "")


def _cells(row: Measured, group: Group) -> dict[str, Any]:
    policy, reference = row.method.policy, row is group.full
    row_of = policy.reuse if policy and not isinstance(policy.reuse, dict) else ()

    def number(value: float | None, form: str) -> str:
        return "" if value is None else f"{value:{form}}"

    quality = "reference" if reference else shown_psnr(row.scores["psnr"], row.scores.get("psnr_ci"))
    return {
        "name": row.method.name,
        "color": FAMILIES[row.method.family].color,
        "strip": list(map(bool, row_of)),
        "latency": f"{row.latency_s:.2f} s",
        "ratio": f"{row.of_full(group.full).median:.2f}",
        "maps": number(row.maps_computed, ".0%"),
        "memory": f"{row.map_bytes / 2**20:.0f} MiB" if row.map_bytes else "",
        "psnr": quality,
        "plain": number(row.plain and row.plain.psnr, ".1f"),
        "equal_cost": number(row.equal_cost and row.equal_cost.psnr, ".1f"),
        "others": [number(row.scores.get(key), OTHERS[key][1]) for key in _known(group)],
    }


def _known(group: Group) -> list[str]:
    """Further scores that any method has."""
    return [key for key in OTHERS if key in group.judged]


def _spot(row: Measured, full: Measured) -> Spot:
    """Where a method stands: its times as shares of the full run's of the same round."""
    time = row.of_full(full)
    name = spot_name(row.method.name, row.method.family)
    return Spot(name, row.method.family, time, row.scores["psnr"], row.scores.get("psnr_ci"))


def _finding(group: Group) -> str:
    """How the best of the schedules that reuse stands to plain steps of its time, in a line."""
    faster = _faster(group)
    known = [r for r in faster if r.plain is not None]
    if not known:
        return "No plain steps of the same time to compare with" if faster else "No schedule takes less time than full"
    clear = [r for r in known if r.plain.is_clear]
    best = max(clear or known, key=lambda r: r.plain.gain)
    if best.plain.gain > 0 and clear:
        return f"{best.method.name}: {best.plain.gain:.1f} dB above plain steps of the same time"
    if len(clear) < len(known):
        return "No schedule is clearly above plain steps of the same time"
    return "Plain steps of the same time are better than every schedule"


def _faster(group: Group) -> list[Measured]:
    """Schedules that take less time than the full run."""
    return [r for r in _family(group, "reuse") if r.of_full(group.full).median < 1]


def _family(group: Group, family: str) -> list[Measured]:
    return [r for r in group.rows if r.method.family == family]


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    pyplot().close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _grid(group: Group, prompts: list[str]) -> list[dict[str, Any]]:
    """The first pictures of every method, as data URIs."""

    def uri(picture: np.ndarray) -> str:
        image = Image.fromarray((picture * 255).round().astype(np.uint8))
        image.thumbnail((160, 160))
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

    return [
        {"name": row.method.name, "pictures": list(zip(map(uri, row.pictures), prompts, strict=False))}
        for row in group.rows
        if row.pictures is not None  # as in a comparison that was loaded
    ]
