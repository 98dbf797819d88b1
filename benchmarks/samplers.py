"""Reuse by the default rule beside fewer plain steps, on the samplers that people use.

    python -m benchmarks.samplers --images 64

For each sampler: full steps, fewer plain steps, and `hurry(reuse=0.5)` and `hurry(reuse=0.25)`, judged on held-out
captions against the full run's pictures and by the caption oracle and CLIP score, and timed in turns. A sampler whose
rows are in the file is left out, so a stopped run goes on. Appends to `benchmarks/results/samplers.csv`.
"""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from rows import RESULTS, append, provenance

from attnreuse import tiny_shapes
from attnreuse.compare import SAME_NOISE, Measured, Method, measure, rule_for
from attnreuse.evaluate import Setting
from attnreuse.policy import shipped_policies
from attnreuse.samplers import make_scheduler

SAMPLERS = {  # name, steps and eta
    "Euler a": ("Euler a", 20, None),
    "DPM++ 2M SDE Karras": ("DPM++ 2M SDE Karras", 20, None),
    "DDIM": ("DDIM", 20, None),
    "DPM2 a": ("DPM2 a", 20, None),
    "Heun": ("Heun", 20, None),
    "DPM2": ("DPM2", 20, None),
    "DPM++ 2M": ("DPM++ 2M", 20, None),
    "DPM++ 2M SDE": ("DPM++ 2M SDE", 20, None),
    "DDIM, eta 1": ("DDIM", 20, 1.0),
    "Euler": ("Euler", 20, None),
    "UniPC": ("UniPC", 20, None),
    "DDPM": ("DDPM", 50, None),
}
SHARES = (0.95, 0.9, 0.85, 0.75)  # of the steps, for the plain steps


def methods(scheduler: object, steps: int, map_format: str) -> list[Method]:
    """What is measured under a sampler, the full run first."""
    found = [Method("full steps", "full", steps)]
    policies = {f"hurry(reuse={share})": rule_for(scheduler, steps, share) for share in (0.5, 0.25)}
    executed, cls = policies["hurry(reuse=0.5)"].steps, type(scheduler).__name__
    policies |= {policy.name: policy for policy in shipped_policies(cls, executed)}
    found += [Method(name, "reuse", steps, policy, map_format) for name, policy in policies.items()]
    for count in (round(steps * share) for share in SHARES):
        found.append(Method(f"{count} plain steps", "plain steps", count))
        found.append(Method(f"{count} plain steps, same noise", SAME_NOISE, count))
    return found


def row(sampler: str, guidance: float, measured: Measured, full: Measured) -> dict[str, object]:
    """A row of the result file."""
    about = {"sampler": sampler, "guidance": guidance, **measured.row()}
    ratios = [mine / theirs for mine, theirs in zip(measured.latencies_s, full.latencies_s, strict=True)]
    median, low, high = torch.tensor(ratios).quantile(torch.tensor([0.5, 0.2, 0.8])).tolist()
    return about | {"of_full": f"{median:.4f}", "of_full_p20": f"{low:.4f}", "of_full_p80": f"{high:.4f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of one batch of four, all methods in turns")
    parser.add_argument("--guidance", type=float, default=tiny_shapes.GUIDANCE)
    parser.add_argument("--sampler", action="append", choices=list(SAMPLERS), help="repeatable; default: all")
    parser.add_argument("--out", type=Path, default=RESULTS / "samplers.csv")
    args = parser.parse_args()
    done = args.out.read_text() if args.out.exists() else ""
    for name in args.sampler or list(SAMPLERS):
        if f"{name},{args.guidance}," in done.replace('"', ""):
            continue
        sampler, steps, eta = SAMPLERS[name]
        pipe = StableDiffusionPipeline.from_pretrained(tiny_shapes.FOLDER)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = make_scheduler(pipe.scheduler.config, sampler)
        prompts = tuple(tiny_shapes.held_out_prompts(args.images))
        setting = Setting(prompts, steps, guidance=args.guidance, eta=eta)
        notes: list[str] = []
        found = measure(pipe, setting, methods(pipe.scheduler, steps, "u8"), notes, ("clip", "fid"), args.rounds)
        about = provenance(torch.device("cpu")) | {"images": args.images}
        append(args.out, [row(name, args.guidance, m, found[0]) | about for m in found])
        for m in found:
            print(name, m.method.name, f"{m.latency_s / found[0].latency_s:.3f}", m.scores.get("psnr"), flush=True)
        print(*notes, sep="\n")


if __name__ == "__main__":
    main()
