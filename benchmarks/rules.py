"""How well rules know which schedules are good: predicted against measured errors, and the pictures they keep.

    python -m benchmarks.rules measure    # 100 random schedules of half the calls per sampler; some 10 minutes each
    python -m benchmarks.rules ranks      # rank correlation of each prediction with them; a moment
    python -m benchmarks.rules pictures   # PSNR of the rule's schedules beside those by call counts; a minute each

Samplers whose rows are in the files are left out, so a stopped run goes on. Writes `benchmarks/results/schedules.jsonl`
and `benchmarks/results/rules.csv`.
"""

import argparse
import json
import random
from typing import Any

import transformer
from rows import RESULTS, append, has_rows, provenance
from scipy.stats import spearmanr
from shipped import pipeline
from train_tiny_flux import SHIFT

from attnreuse import hurry
from attnreuse.demo import tiny_shapes
from attnreuse.planning.levels import influences, noise_levels
from attnreuse.planning.rows import call_age_error, count_of, level_error, parse, schedule_error, strip
from attnreuse.planning.samplers import make_scheduler
from attnreuse.policy import Policy
from attnreuse.study.analysis import distance
from attnreuse.study.evaluate import Evaluator
from attnreuse.study.setting import Setting

FLOW = "flow matching"  # Euler's method, of the small FLUX.1
MEASURED = [
    ("DDIM", 20), ("Euler a", 20), ("Heun", 11), ("DPM2", 11), ("DPM++ 2M SDE Karras", 20), ("PNDM", 20),
    ("DPM2 a", 11), ("DPM2 a", 20), (FLOW, 20),
]  # fmt: skip
PICTURED = [
    ("DPM2", 2.5), ("Heun", 2.5), ("DPM2 a", 2.5), ("Euler a", 2.5), ("DDIM", 2.5), ("DPM++ 2M SDE", 2.5),
    ("PNDM", 2.5), ("Euler Karras", 2.5), ("UniPC", 2.5), ("Euler a", 7.5), ("DPM2 a", 7.5),
]  # fmt: skip


def evaluator(sampler: str, steps: int, prompts: list[str], seed: int, guidance: float) -> Evaluator:
    pipe = transformer.sampled_by("Euler") if sampler == FLOW else pipeline(sampler)
    return Evaluator(pipe, Setting(tuple(prompts), steps, seed, guidance, size=(128, 128)))


def scheduler_of(sampler: str) -> Any:
    if sampler == FLOW:
        return transformer.SAMPLERS["Euler"](shift=SHIFT)
    config = json.loads((tiny_shapes.FOLDER / "scheduler" / "scheduler_config.json").read_text())
    return make_scheduler(config, sampler)


def measure() -> None:
    """Distance of the final latents under random schedules, of four training captions at guidance 2.5."""
    path = RESULTS / "schedules.jsonl"
    held = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    done = {(line["sampler"], line["steps"]) for line in held}
    for sampler, steps in MEASURED:
        if (sampler, steps) in done:
            continue
        judge, rng, rows = evaluator(sampler, steps, tiny_shapes.search_prompts(4), 2000, 2.5), random.Random(0), set()
        count = judge.executed_steps
        while len(rows) < 100:
            chosen = rng.sample(range(1, count), count // 2)
            rows.add(tuple(i in chosen for i in range(count)))
        found = [distance(judge.sample(Policy(steps=count, reuse=row)), judge.full) for row in sorted(rows)]
        line = {"sampler": sampler, "steps": steps, "schedules": [strip(r) for r in sorted(rows)], "distances": found}
        with path.open("a") as file:
            file.write(json.dumps(line | provenance()) + "\n")


def ranks() -> None:
    """Spearman correlation of predicted with measured distances."""
    print("sampler, calls, by call age, by noise level, by noise level and influence (the rule)")
    for line in map(json.loads, (RESULTS / "schedules.jsonl").read_text().splitlines()):
        scheduler = scheduler_of(line["sampler"])
        scheduler.set_timesteps(line["steps"])
        levels = noise_levels(scheduler)
        influence = influences(scheduler)
        errors = (call_age_error(levels), level_error(levels), level_error(levels, influence))
        predicted = [[schedule_error(parse(row), error) for row in line["schedules"]] for error in errors]
        found = [f"{spearmanr(p, line['distances']).statistic:.3f}" for p in predicted]
        print(line["sampler"], len(levels), *found, sep=", ")


def pictures() -> None:
    """Mean PSNR of four held-out captions, 20 steps, u8 maps."""
    path = RESULTS / "rules.csv"
    for sampler, guidance in PICTURED:
        if has_rows(path, sampler=sampler, guidance=guidance):
            continue
        judge, rows = evaluator(sampler, 20, tiny_shapes.held_out_prompts(4), 0, guidance), []
        for share in (0.5, 0.25):
            steps, count = judge.executed_steps, count_of(share, judge.executed_steps)
            policies = {
                "call counts": hurry(steps, count),
                "noise level": hurry(reuse=share).resolve(steps, judge.levels),
                "noise level and influence": hurry(reuse=share).resolve(steps, judge.levels, judge.influence),
            }
            about = {"sampler": sampler, "guidance": guidance, "share": share}
            for rule, policy in policies.items():
                row = {"rule": rule, "schedule": strip(policy.reuse), "psnr": f"{judge.scores(policy)['psnr']:.2f}"}
                rows.append(about | row | provenance())
        append(path, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "ranks", "pictures"])
    {"measure": measure, "ranks": ranks, "pictures": pictures}[parser.parse_args().what]()
