"""The front of the ladder beside fewer steps and other caches, on captions that no search saw.

    python -m benchmarks.ladder search   # 16 training captions, guidance 7.5, confirmed by 32; three hours per sampler
    python -m benchmarks.ladder judge    # 32 held-out captions, all timed in turns on a quiet machine; 35 minutes each
    python -m benchmarks.ladder table    # as Markdown, and what lies above the front
    python -m benchmarks.ladder figure   # of Euler a: docs/front.png

A search goes on from its scores; samplers whose front, or whose rows, are there are left out. Writes
`benchmarks/results/ladder-<sampler>.json` (the front, with its policies) and `ladder.csv`.
"""

import argparse
import csv
import functools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from rows import RESULTS, append, has_rows, provenance, ratios
from shipped import pipeline

from attnreuse.demo import tiny_shapes
from attnreuse.measure.timing import Times
from attnreuse.search import InProcess, ladder
from attnreuse.study.compare.measure import Measured, Plain, at_time, judged, timed
from attnreuse.study.compare.methods import PLAIN, Method, plain_steps, rule_for
from attnreuse.study.compare.other_caches import OTHER_CACHES
from attnreuse.study.evaluate import Evaluator
from attnreuse.study.metrics import shown_psnr
from attnreuse.study.plots import Spot, pareto_figure, spot_name
from attnreuse.study.search.front import Front, Point
from attnreuse.study.setting import Setting

SAMPLERS = ("DDIM", "Euler a")
STEPS, GUIDANCE, ROUNDS = 20, 7.5, 5
CAPTIONS, CONFIRM = 16, 32  # of a search, and those that confirm what it found
POINTS = 24  # of a front, most that are judged
JUDGED = RESULTS / "ladder.csv"
FIGURE = RESULTS.parents[1] / "docs" / "front.png"


def front_of(sampler: str) -> Path:
    return RESULTS / f"ladder-{sampler.lower().replace(' ', '-')}.json"


def search(samplers: list[str], budget: int) -> None:
    """The front of each sampler, on captions of the training set."""
    for sampler in (s for s in samplers if not front_of(s).exists()):
        captions = tiny_shapes.search_prompts(CAPTIONS)
        others = [c for c in tiny_shapes.search_prompts(2 * (CAPTIONS + CONFIRM)) if c not in captions][:CONFIRM]
        setting = Setting(tuple(captions), STEPS, 1000, GUIDANCE, layers="all")
        confirm = replace(setting, prompts=tuple(others), seed=1000 + CAPTIONS)
        engine = InProcess(Evaluator(pipeline(sampler), setting))
        cache = RESULTS / "ladder-scores.jsonl"
        tell = functools.partial(print, flush=True)
        found = ladder(engine, budget=budget, cache=cache, confirm=confirm, progress=tell)
        front_of(sampler).write_text(json.dumps(found.to_dict() | provenance()) + "\n")


def judge(samplers: list[str], images: int) -> None:
    """PSNR and time of the points of the front, of the rule, of plain steps and of other caches, in one run."""
    for sampler in (s for s in samplers if not has_rows(JUDGED, sampler=s, images=images)):
        pipe = pipeline(sampler)
        setting = Setting(tuple(tiny_shapes.held_out_prompts(images)), STEPS, guidance=GUIDANCE, layers="all")
        points = Front.load(front_of(sampler)).points
        wanted = [Method("full steps", "full", STEPS)]
        for point in spread(points):
            name = f"ladder {point.time:.3f}" + (f", {point.steps} steps" if point.steps < STEPS else "")
            wanted.append(Method(name, "ladder", point.steps, point.policy, "u8"))
        for share in (0.5, 0.25):
            wanted.append(Method(f"hurry(reuse={share})", "reuse", STEPS, rule_for(pipe.scheduler, STEPS, share), "u8"))
        wanted += plain_steps((19, 18, 17, 15, 13, 11, 10))
        wanted += [Method(name, "other cache", STEPS, around=around) for name, around in OTHER_CACHES.items()]
        notes: list[str] = []
        rows = judged(pipe, setting, wanted, notes, ())
        print(sampler, *notes, sep="\n", flush=True)
        timed(pipe, setting, rows, ROUNDS)
        about = provenance() | {"images": images, "rounds": ROUNDS}
        append(JUDGED, [{"sampler": sampler, **_row(row, rows[0]), **about} for row in rows])


def _row(measured: Measured, full: Measured) -> dict[str, str]:
    quality = {key: f"{measured.scores[key]:.2f}" if key in measured.scores else "" for key in ("psnr", "psnr_ci")}
    method = {"method": measured.method.name, "family": measured.method.family}
    each = {"psnr_each": " ".join(f"{psnr:.1f}" for psnr in measured.psnrs)}
    return method | ratios(measured.latencies_s, full.latencies_s) | quality | each


def spread(points: list[Point]) -> list[Point]:
    """At most ``POINTS`` of a front, evenly over its times."""
    targets = np.linspace(points[0].time, points[-1].time, POINTS)
    chosen = {min(range(len(points)), key=lambda i: abs(points[i].time - t)) for t in targets}
    return [points[i] for i in sorted(chosen)]


def table() -> None:
    """Each method by its time, and how far plain steps and other caches lie above the front."""
    for sampler in SAMPLERS:
        rows = [row for row in csv.DictReader(JUDGED.open()) if row["sampler"] == sampler]
        rows = sorted(rows[1:], key=lambda row: float(row["of_full"]))
        print(f"\n| {sampler} | time | PSNR | above the front |\n|---|---:|---:|---:|")
        front = [_judged(row) for row in rows if row["family"] == "ladder"]
        for row in rows:
            is_peer = row["family"] in (*PLAIN, "other cache")
            above = above_front(front, *_judged(row)) if is_peer else ""
            psnr = shown_psnr(float(row["psnr"]), float(row["psnr_ci"]))
            print(f"| {row['method']} | {float(row['of_full']):.2f} | {psnr} | {above} |")


def _judged(row: dict[str, str]) -> tuple[float, np.ndarray]:
    """Time, and the PSNR of each picture; their mean alone in rows that do not hold them."""
    return float(row["of_full"]), np.array((row["psnr_each"] or row["psnr"]).split(), dtype=float)


def above_front(front: list[tuple[float, np.ndarray]], time: float, psnrs: np.ndarray) -> str:
    """How far the PSNRs of a run of `time` lie above the line between the front's, picture by picture."""
    line = at_time(front, time)
    if line is None:
        return "outside"
    gap = Plain.of(psnrs, line)
    return f"{gap.gain:+.1f}" + ("" if gap.gain_ci is None else f" ± {gap.gain_ci:.1f}")


def figure() -> None:
    """PSNR over time of what was judged with Euler a, for the README."""
    sampler = "Euler a"
    rows = [row for row in csv.DictReader(JUDGED.open()) if row["sampler"] == sampler and row["psnr_ci"]]
    spots = [
        Spot(
            spot_name(row["method"], row["family"]),
            row["family"],
            Times(*(float(row[key]) for key in ("of_full", "p20", "p80"))),
            float(row["psnr"]),
            float(row["psnr_ci"]),
        )
        for row in rows
        if row["family"] != "full"
    ]
    finding = "from 0.84 of the time on, reuse keeps the picture that fewer steps change"
    drawn = pareto_figure(spots, f"{sampler}: {finding}")
    drawn.savefig(FIGURE, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["search", "judge", "table", "figure"])
    parser.add_argument("--budget", type=int, default=300)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--sampler", action="append", choices=SAMPLERS, help="repeatable; default: both")
    args = parser.parse_args()
    samplers = args.sampler or list(SAMPLERS)
    does = {"search": lambda: search(samplers, args.budget), "judge": lambda: judge(samplers, args.images)}
    (does | {"table": table, "figure": figure})[args.what]()
