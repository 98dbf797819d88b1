"""Reuse on a small FLUX.1 beside fewer steps and the caches that diffusers has for transformers.

    python -m benchmarks.transformer run     # 32 held-out captions, a quiet machine; half an hour per sampler
    python -m benchmarks.transformer table   # as Markdown

The transformer is that of `train_tiny_flux.py`. Samplers whose rows are there are left out. Writes
`benchmarks/results/transformer.csv`.
"""

import argparse
import csv
import functools
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FluxTransformer2DModel
from rows import RESULTS, append, has_rows, provenance, ratios
from train_tiny_flux import GUIDANCE, SHIFT, WEIGHTS, Shipped, pipeline

from attnreuse.demo import tiny_shapes
from attnreuse.measure.timing import keep_freed_memory
from attnreuse.study.compare.groups import compare
from attnreuse.study.compare.measure import at_time
from attnreuse.study.compare.methods import PLAIN
from attnreuse.study.metrics import shown_psnr
from attnreuse.study.setting import Setting

ROWS = RESULTS / "transformer.csv"
SCORES = ("psnr", "psnr_ci", "clip_score", "background", "color", "shape", "relation")
STEPS, SIDE = 20, 128


class OwnLevels:
    """A scheduler with its own noise levels, which FLUX.1's pipeline asks for by those of its making."""

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, mu: float | None = None
    ) -> None:
        super().set_timesteps(num_inference_steps or len(sigmas), device)


class Euler(OwnLevels, FlowMatchEulerDiscreteScheduler):
    """Euler's method."""


class Heun(OwnLevels, FlowMatchHeunDiscreteScheduler):
    """Heun's method: two calls a step but the last."""

    def set_begin_index(self, begin_index: int = 0) -> None:
        self._begin_index = begin_index


SAMPLERS = {"Euler": Euler, "Heun": Heun}


def sampled_by(name: str) -> Any:
    """The small FLUX.1 with one of the samplers; from now on the process keeps freed memory."""
    keep_freed_memory()
    pipe = pipeline(Shipped(), FluxTransformer2DModel.from_pretrained(WEIGHTS))
    pipe.scheduler = SAMPLERS[name](shift=SHIFT)
    return pipe


def run(images: int, rounds: int) -> None:
    """All methods under each sampler that has no rows of so many images."""
    for name in SAMPLERS:
        if has_rows(ROWS, sampler=name, images=images):
            continue
        pipe, prompts = sampled_by(name), tuple(tiny_shapes.held_out_prompts(images))
        setting = Setting(prompts, STEPS, guidance=GUIDANCE, size=(SIDE, SIDE))
        tell = functools.partial(print, flush=True)
        group = compare(pipe, setting, judge=("clip",), rounds=rounds, progress=tell).groups[0]
        about = provenance() | {"images": images, "rounds": rounds}
        rows = [
            {"sampler": name, "method": row.method.name, "family": row.method.family, "steps": row.method.steps}
            | ratios(row.latencies_s, group.full.latencies_s)
            | {key: f"{row.scores[key]:.5g}" if key in row.scores else "" for key in SCORES}
            | about
            for row in group.rows
        ]
        append(ROWS, rows)
        print(name, *group.notes, sep="\n", flush=True)


def table() -> None:
    """Each method by its time, beside the plain steps that take no longer."""
    for sampler in SAMPLERS:
        rows = [row for row in csv.DictReader(ROWS.open()) if row["sampler"] == sampler]
        plain = [(float(r["of_full"]), [float(r["psnr"])]) for r in rows if r["family"] in PLAIN]
        print(f"\n| {sampler} | time | PSNR | plain steps in that time |\n|---|---:|---:|---:|")
        for row in sorted((r for r in rows if r["psnr"]), key=lambda r: float(r["of_full"])):
            best = None if row["family"] in PLAIN else at_time(plain, float(row["of_full"]))
            psnr = shown_psnr(float(row["psnr"]), float(row["psnr_ci"]))
            time, equal = f"{float(row['of_full']):.2f}", "" if best is None else f"{best.mean():.1f}"
            print(f"| {row['method']} | {time} | {psnr} | {equal} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    run(args.images, args.rounds) if args.what == "run" else table()
