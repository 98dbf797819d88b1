"""Reuse by the default rule beside fewer plain steps, on the samplers that people use.

    python -m benchmarks.samplers pictures   # 64 held-out captions; 10 to 40 minutes per sampler
    python -m benchmarks.samplers times      # of one batch, in turns; a quiet machine, 4 to 15 minutes per sampler
    python -m benchmarks.samplers table      # both as Markdown

For each sampler: full steps, fewer plain steps (of stochastic ones also with the full run's noise), the rule that
reuses a half and a quarter, and shipped policies. Pictures are judged against those of the full run, and by the caption
oracle and CLIP score. Samplers whose rows are in the files are left out, so a stopped run goes on. Writes
`benchmarks/results/samplers.csv` and `sampler-times.csv`.
"""

import argparse
import csv
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rows import RESULTS, append, has_rows, provenance, ratios
from shipped import pipeline

from attnreuse.demo import tiny_shapes
from attnreuse.planning.rows import strip
from attnreuse.policy import shipped_policies
from attnreuse.study.compare.measure import Measured, at_time, judged, timed
from attnreuse.study.compare.methods import SAME_NOISE, Method, plain_steps, rule_for
from attnreuse.study.metrics import half_width, shown_psnr
from attnreuse.study.setting import Setting

SAMPLERS = {  # name, steps and eta
    "Euler a": ("Euler a", 20, None),
    "DPM2 a": ("DPM2 a", 20, None),
    "DPM++ 2M SDE Karras": ("DPM++ 2M SDE Karras", 20, None),
    "DDIM": ("DDIM", 20, None),
    "Heun": ("Heun", 20, None),
    "DPM2": ("DPM2", 20, None),
    "DPM++ 2M SDE": ("DPM++ 2M SDE", 20, None),
    "DPM++ 2M": ("DPM++ 2M", 20, None),
    "DDIM, eta 1": ("DDIM", 20, 1.0),
    "UniPC": ("UniPC", 20, None),
    "Euler": ("Euler", 20, None),
    "DDPM": ("DDPM", 50, None),
}
BATCH = 4  # pictures, timed at once
SHARES = (0.95, 0.9, 0.85, 0.75)  # of the steps, for the plain steps
SCORES = ("psnr", "psnr_ci", "fid", "clip_score", "background", "color", "shape", "relation")
RULES = ("hurry(reuse=0.5)", "hurry(reuse=0.25)")
PICTURES, TIMES = RESULTS / "samplers.csv", RESULTS / "sampler-times.csv"


def methods(scheduler: object, steps: int) -> list[Method]:
    """What is measured under a sampler, the full run first."""
    found = [Method("full steps", "full", steps)]
    policies = {f"hurry(reuse={share})": rule_for(scheduler, steps, share) for share in (0.5, 0.25)}
    executed, cls = policies["hurry(reuse=0.5)"].steps, type(scheduler).__name__
    policies |= {policy.name: policy for policy in shipped_policies(cls, executed)}
    found += [Method(name, "reuse", steps, policy, "u8") for name, policy in policies.items()]
    return found + plain_steps(round(steps * share) for share in SHARES)


def each(path: Any, guidance: float, images: int, only: list[str] | None) -> Iterator[tuple[str, Any, Setting]]:
    """Name, pipeline and setting of each sampler that has no rows of so many images in `path`."""
    for name in only or SAMPLERS:
        if has_rows(path, sampler=name, guidance=guidance, images=images):
            continue
        sampler, steps, eta = SAMPLERS[name]
        yield (
            name,
            pipeline(sampler),
            Setting(tuple(tiny_shapes.held_out_prompts(images)), steps, guidance=guidance, eta=eta),
        )


def pictures(guidance: float, images: int, only: list[str] | None) -> None:
    """PSNR with its 95 % interval, and what pictures are worth alone, of each method."""
    about = provenance() | {"images": images}
    for name, pipe, setting in each(PICTURES, guidance, images, only):
        notes: list[str] = []
        found = judged(pipe, setting, methods(pipe.scheduler, setting.steps), notes, ("clip", "fid"))
        append(PICTURES, [{"sampler": name, "guidance": guidance, **_picture_row(m), **about} for m in found])
        print(name, *notes, sep="\n", flush=True)


def _picture_row(measured: Measured) -> dict[str, object]:
    method = measured.method
    scores = {key: f"{measured.scores[key]:.5g}" if key in measured.scores else "" for key in SCORES}
    row = {"method": method.name, "family": method.family, "steps": method.steps, "calls": measured.executed_steps}
    return row | {"schedule": strip(method.policy.reuse) if method.policy else ""} | scores


def times(guidance: float, rounds: int, only: list[str] | None) -> None:
    """Time of each method as a ratio to the full run's of the same round."""
    about = provenance() | {"images": BATCH, "rounds": rounds}
    for name, pipe, setting in each(TIMES, guidance, BATCH, only):
        wanted, notes = [m for m in methods(pipe.scheduler, setting.steps) if m.family != SAME_NOISE], []
        found = judged(pipe, setting, wanted, notes, ())  # which warms up
        timed(pipe, setting, found, rounds)
        full = found[0].latencies_s
        rows = [
            {"sampler": name, "guidance": guidance, "method": m.method.name, **ratios(m.latencies_s, full)}
            | {"full_s": f"{np.median(full):.3f}", **about}
            for m in found
        ]
        append(TIMES, rows)
        print(*notes, *(f"{name} {row['method']} {row['of_full']}" for row in rows), sep="\n", flush=True)


def table(guidance: float) -> None:
    """PSNR of each sampler's reuse and plain steps (with the full run's noise in brackets), and at equal time."""
    by_sampler: dict[str, dict[str, dict[str, str]]] = {}
    for row in _read(PICTURES, guidance):
        by_sampler.setdefault(row["sampler"], {})[row["method"]] = row
    taken, line = _times(guidance)
    for method, times in taken.items():
        print(f"{method}: {statistics.mean(times):.3f} ± {half_width(np.array(times)):.3f} of the time")
    print(f"plain steps: {line.intercept:.3f} + {line.slope:.3f} of their share of the steps\n")
    reuse = ("half reuse", "plain steps in that time", "a quarter", "plain steps in that time")
    print("", "sampler, steps", *reuse, *(f"{share:.0%} of the steps" for share in SHARES), "", sep=" | ")
    print("|---|" + "---:|" * (len(reuse) + len(SHARES)))
    for sampler, rows in by_sampler.items():
        cells = [cell for method in RULES for cell in _reused(rows, method, taken, line)]
        steps = int(rows["full steps"]["steps"])
        plain = [_plain(rows, f"{round(steps * share)} plain steps") for share in SHARES]
        print("", f"{sampler}, {steps}", *cells, *plain, "", sep=" | ")


def _read(path: Path, guidance: float) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if float(row["guidance"]) == guidance]


def _times(guidance: float) -> tuple[dict[str, list[float]], Any]:
    """Times of each rule, and the line through those of plain steps by their share of the steps.

    Of all samplers together: what their calls take is the same, and a shared machine moves the times of one.
    """
    reused: dict[str, list[float]] = {}
    points = [(1.0, 1.0)]
    for row in _read(TIMES, guidance):
        steps = SAMPLERS[row["sampler"]][1]
        if row["method"] in RULES:
            reused.setdefault(row["method"], []).append(float(row["of_full"]))
        elif row["method"].endswith(" plain steps"):
            points.append((int(row["method"].split()[0]) / steps, float(row["of_full"])))
    return reused, statistics.linear_regression(*zip(*points, strict=True))


def _reused(rows: dict[str, dict[str, str]], method: str, taken: dict[str, list[float]], line: Any) -> tuple[str, str]:
    """PSNR of a schedule, and that of the plain steps that take as long."""
    row, full = rows[method], int(rows["full steps"]["steps"])
    quality = shown_psnr(float(row["psnr"]), float(row["psnr_ci"]))
    plain = [r for r in rows.values() if r["family"] == "plain steps"]
    points = [(line.intercept + line.slope * int(r["steps"]) / full, [float(r["psnr"])]) for r in plain]
    best = at_time(points, statistics.mean(taken[method]))
    return quality, "" if best is None else f"{best.mean():.1f}"


def _plain(rows: dict[str, dict[str, str]], method: str) -> str:
    """PSNR of plain steps, and in brackets that with the full run's noise."""
    with_noise = rows.get(f"{method}, same noise")
    return f"{float(rows[method]['psnr']):.1f}" + (f" ({float(with_noise['psnr']):.1f})" if with_noise else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pictures", "times", "table"])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--guidance", type=float, default=tiny_shapes.GUIDANCE)
    parser.add_argument("--sampler", action="append", choices=list(SAMPLERS), help="repeatable; default: all")
    args = parser.parse_args()
    if args.what == "pictures":
        pictures(args.guidance, args.images, args.sampler)
    elif args.what == "times":
        times(args.guidance, args.rounds, args.sampler)
    else:
        table(args.guidance)


if __name__ == "__main__":
    main()
