"""PSNR and latency of reuse schedules against full steps and against fewer steps, on the shipped pipeline.

    python benchmarks/schedules.py --images 16 --out benchmarks/results/schedules.csv

Appends one row per schedule: held-out prompts, the same seeds for all, PSNR to the full-step pictures
(mean, p20, p80 over the pictures), latency (median, p20, p80 over rounds taken in turns).
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from rows import RESULTS, append, provenance

import attnreuse
from attnreuse import Policy, hurry, periodic
from attnreuse.environment import default_device
from attnreuse.metrics import psnr
from attnreuse.tiny_shapes import held_out_prompts

STEPS = 20


@dataclass
class Schedule:
    """`policy` on `steps` plain steps; latencies of all pictures, and their PSNR."""

    name: str
    steps: int = STEPS
    policy: Policy | None = None
    map_bytes: int = 0
    latencies: list[float] = field(default_factory=list)
    psnr_db: list[float] = field(default_factory=list)


def schedules() -> list[Schedule]:
    """Full steps first; then reuse, early and late, fresh and stale; then fewer steps."""
    half = [Policy(steps=STEPS, reuse=[0] + [1] * 10 + [0] * 9, name="early(20,10)")]
    reuse = [hurry(STEPS, 5), hurry(STEPS, 5, 1), hurry(STEPS, 10), hurry(STEPS, 10, 2), hurry(STEPS, 10, 1), *half]
    rows = [Schedule("full"), *(Schedule(p.name, policy=p) for p in [*reuse, periodic(STEPS, 3)])]
    return rows + [Schedule(f"{n} steps", steps=n) for n in (19, 18, 17, 15, 13, 10)]


def run(pipe: StableDiffusionPipeline, schedule: Schedule, prompts: list[str], map_format: str) -> np.ndarray:
    """All pictures of a schedule, in batches of four prompts; its latency is noted."""

    def sample() -> np.ndarray:
        parts = []
        for start in range(0, len(prompts), 4):
            generators = [torch.Generator().manual_seed(start + i) for i in range(4)]
            call = {"num_inference_steps": schedule.steps, "guidance_scale": attnreuse.TINY_SHAPES_GUIDANCE}
            call |= {"generator": generators, "output_type": "np"}
            parts.append(pipe(prompts[start : start + 4], **call).images)
        return np.concatenate(parts)

    if schedule.policy is None:
        return timed(schedule, sample)
    with attnreuse.enable(pipe, schedule.policy, map_format=map_format) as session:
        pictures = timed(schedule, sample)
        schedule.map_bytes = session.report().allocated_bytes
    return pictures


def timed(schedule: Schedule, sample: Callable[[], np.ndarray]) -> np.ndarray:
    start = time.perf_counter()
    pictures = sample()
    schedule.latencies.append(time.perf_counter() - start)
    return pictures


def spread(values: list[float]) -> tuple[float, float, float]:
    """p20, median, p80."""
    low, middle, high = np.percentile(values, [20, 50, 80])
    return float(low), float(middle), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16, help="a multiple of four")
    parser.add_argument("--rounds", type=int, default=1, help="timed rounds of all schedules, in turns")
    parser.add_argument("--format", default="fp32")
    parser.add_argument("--out", type=Path, default=RESULTS / "schedules.csv")
    args = parser.parse_args()

    device = default_device()
    pipe = StableDiffusionPipeline.from_pretrained(attnreuse.tiny_shapes_path()).to(device)
    pipe.set_progress_bar_config(disable=True)
    prompts, rows = held_out_prompts(args.images), schedules()
    run(pipe, Schedule("warm-up", steps=2), prompts[:4], args.format)
    for turn in range(args.rounds):
        for schedule in rows:
            pictures = run(pipe, schedule, prompts, args.format)
            if schedule is rows[0] and turn == 0:
                full = pictures
            if turn == 0:
                schedule.psnr_db = [psnr(p, f) for p, f in zip(pictures, full, strict=True)]
    about = provenance(device)
    append(args.out, [row_of(s, args, rows[0]) | about for s in rows])


def row_of(schedule: Schedule, args: argparse.Namespace, full: Schedule) -> dict[str, object]:
    low, middle, high = spread(schedule.latencies)
    row = {
        "schedule": schedule.name,
        "reuse": "".join(".R"[r] for r in schedule.policy.reuse) if schedule.policy else "",
        "scheduler": "DDIMScheduler",
        "steps": schedule.steps,
        "format": args.format if schedule.policy else "",
        "map_bytes": schedule.map_bytes,
        "images": args.images,
        "latency_s": f"{middle:.2f}",
        "latency_p20_s": f"{low:.2f}",
        "latency_p80_s": f"{high:.2f}",
        "latency_ratio": f"{middle / spread(full.latencies)[1]:.3f}",
        "psnr_db": "",
        "psnr_p20_db": "",
        "psnr_p80_db": "",
    }
    if schedule is not full:
        low, _, high = spread(schedule.psnr_db)
        mean = statistics.mean(schedule.psnr_db)
        row |= {"psnr_db": f"{mean:.2f}", "psnr_p20_db": f"{low:.2f}", "psnr_p80_db": f"{high:.2f}"}
    print({k: v for k, v in row.items() if v != ""}, flush=True)
    return row


if __name__ == "__main__":
    main()
