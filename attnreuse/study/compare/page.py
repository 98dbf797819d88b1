"""One HTML file of a comparison: summary, tables, plots, schedules as strips, pictures; and CSV beside it."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from attnreuse.errors import AttnReuseError
from attnreuse.study.compare.groups import Comparison, Group
from attnreuse.study.compare.measure import Measured
from attnreuse.study.plots import INK, QUIET, pyplot

TEMPLATE = Path(__file__).parents[2] / "assets" / "comparison.html"
FAMILY_COLORS = {
    "full": INK, "plain steps": QUIET, "plain steps, same noise": "#9aa5b1", "reuse": "#d64545",
    "reuse + fewer steps": "#e8963c", "other cache": "#3e7cb1",
    "reuse + other cache": "#17a2b8", "student": "#4c9a6b", "student + reuse": "#8a5fb0",
}  # fmt: skip
OTHERS = {"ssim": ".4f", "lpips": ".4f", "fid": ".2f", "clip_score": ".1f", "shape": ".0%", "relation": ".0%"}


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
            "rows": [_cells(r, g) for r in g.rows],
            "pareto": _svg(_pareto(g)),
            "memory": _svg(_memory(g)),
            "grid": _grid(g, list(comparison.setting.prompts)),
        }
        for g in comparison.groups
    ]
    html = page.render(groups=groups, comparison=comparison, command=command, colors=FAMILY_COLORS)
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
    known = [r for r in reuse if r.equal_cost_psnr is not None]
    won = [r.method.name for r in known if r.scores["psnr"] > r.equal_cost_psnr]
    said.append(
        "At equal cost as the paper counts it (attention maps computed), "
        f"{len(won)} of {len(known)} schedules lie above plain steps{_named(won)}."
    )
    faster = [r for r in reuse if r.latency_s < group.full.latency_s]
    gained = [r.method.name for r in faster if r.plain_psnr is not None and r.scores["psnr"] > r.plain_psnr]
    said.append(
        f"At equal measured latency, {len(gained)} do{_named(gained)}; "
        f"{len(faster)} of {len(reuse)} schedules took less time than the full run."
    )
    return said


def _named(names: list[str]) -> str:
    return f" ({', '.join(names)})" if names else ""


def _cells(row: Measured, group: Group) -> dict[str, Any]:
    policy, reference = row.method.policy, row is group.full
    row_of = policy.reuse if policy and not isinstance(policy.reuse, dict) else ()

    def number(value: float | None, form: str) -> str:
        return "" if value is None or np.isnan(value) else f"{value:{form}}"

    ci = row.scores.get("psnr_ci")
    quality = "reference" if reference else number(row.scores["psnr"], ".1f")
    return {
        "name": row.method.name,
        "color": FAMILY_COLORS[row.method.family],
        "strip": list(map(bool, row_of)),
        "latency": f"{row.latency_s:.2f} s",
        "ratio": f"{row.latency_s / group.full.latency_s:.2f}",
        "maps": number(row.maps_computed, ".0%"),
        "memory": f"{row.map_bytes / 2**20:.0f} MiB" if row.map_bytes else "",
        "psnr": quality + (f" ± {ci:.1f}" if ci is not None and not np.isnan(ci) else ""),
        "plain": number(row.plain_psnr, ".1f"),
        "equal_cost": number(row.equal_cost_psnr, ".1f"),
        "others": [number(row.scores.get(key), form) for key, form in OTHERS.items()],
    }


def _pareto(group: Group) -> Any:
    def ratio(row: Measured) -> float:
        return row.latency_s / group.full.latency_s

    figure, axis = pyplot().subplots(figsize=(7, 4.5), layout="constrained")
    _draw_points(axis, group.rows[1:], ratio)
    plain = sorted((ratio(r), r.scores["psnr"]) for r in _family(group, "plain steps"))
    if plain:
        axis.plot(*zip(*plain, strict=True), color=FAMILY_COLORS["plain steps"], lw=1)
    axis.axvline(1, color=QUIET, lw=0.6, ls=":")
    axis.set(xlabel="latency, of the full run's", ylabel="PSNR to the full run, dB")
    return figure


def _memory(group: Group) -> Any:
    figure, axis = pyplot().subplots(figsize=(7, 3.5), layout="constrained")
    _draw_points(axis, [row for row in group.rows[1:] if row.map_bytes], lambda row: row.map_bytes / 2**20)
    axis.set(xlabel="memory of the maps of a batch, MiB", ylabel="PSNR to the full run, dB")
    return figure


def _draw_points(axis: Any, rows: list[Measured], x: Callable[[Measured], float]) -> None:
    """Each row's PSNR at its `x`, by name."""
    for row in rows:
        at = (x(row), row.scores["psnr"])
        axis.plot(*at, "o", color=FAMILY_COLORS[row.method.family], ms=6)
        axis.annotate(row.method.name, at, xytext=(4, 3), textcoords="offset points", fontsize=6)


def _family(group: Group, family: str) -> list[Measured]:
    return [r for r in group.rows if r.method.family == family]


def _svg(figure: Any) -> str:
    held = io.StringIO()
    figure.savefig(held, format="svg")
    pyplot().close(figure)
    return held.getvalue()[held.getvalue().index("<svg") :]


def _grid(group: Group, prompts: list[str]) -> list[dict[str, Any]]:
    """The first pictures of every method, as data URIs."""

    def uri(picture: np.ndarray) -> str:
        image = Image.fromarray((picture * 255).round().astype(np.uint8))
        image.thumbnail((160, 160))
        held = io.BytesIO()
        image.save(held, "PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()

    return [
        {"name": row.method.name, "pictures": list(zip(map(uri, row.pictures), prompts, strict=False))}
        for row in group.rows
    ]
