"""What `attnreuse plan` foretells, beside what `attnreuse sample` then measures.

    python -m benchmarks.plan   # half an hour, on a quiet machine; 4 GB on the disk meanwhile

Half of the calls reuse u8 maps. Each model is planned and sampled in turn, three times. Appends to
`benchmarks/results/plan.csv`.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from gpu import UNETS
from rows import RESULTS, append, provenance

import attnreuse

ROWS = RESULTS / "plan.csv"
COMMON = ("--steps", "20", "--reuse", "0.5", "--format", "u8", "--json")


def random_sd15(folder: Path) -> None:
    """Stable Diffusion 1.5 with random weights at 256 x 256, which reads with the tokenizer of tiny-shapes."""
    tiny = StableDiffusionPipeline.from_pretrained(attnreuse.tiny_shapes_path())
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNETS["SD1.5 512"] | {"sample_size": 32})
    sizes = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=256)
    kinds = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    widths = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    text = transformers.CLIPTextConfig(**{**tiny.text_encoder.config.to_dict(), **widths})
    made = StableDiffusionPipeline(
        vae=AutoencoderKL(**sizes, **kinds), text_encoder=transformers.CLIPTextModel(text), tokenizer=tiny.tokenizer,
        unet=unet, scheduler=tiny.scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    made.save_pretrained(folder)


def told(folder: Path, *args: str) -> dict:
    """What a command prints as JSON, run in `folder`."""
    made = subprocess.run(["attnreuse", *args, *COMMON], capture_output=True, text=True, check=True, cwd=folder)
    return json.loads(made.stdout)


def measure(name: str, folder: Path, model: list[str], planned: list[str], sampled: list[str]) -> None:
    """One row of what is foretold and measured."""
    plan, sample = told(folder, "plan", *model, *planned), told(folder, "sample", *model, *sampled)
    if plan["run"] is None:
        raise SystemExit(f"{name} was not timed: {plan['not_timed']}")
    full = sample["baseline"]["latency_s"]
    row = {
        "model": name,
        "pictures": len(sample["prompts"]),
        "share_plan": f"{plan['run']['attention_share']:.3f}",
        "share_sample": f"{sample['attention_s'] / full:.3f}",
        "ratio_plan": f"{plan['run']['ratio']:.3f}",
        "ratio_sample": f"{sample['reuse']['latency_s'] / full:.3f}",
        "plain_steps_plan": f"{plan['run']['plain_steps']:.1f}",
        "plain_steps_sample": sample["fewer"]["steps"],
    }
    append(ROWS, [row | provenance()])
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3, help="how often each model is planned and sampled")
    times = parser.parse_args().times
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for _ in range(times):
            measure("tiny-shapes, Euler a", folder, [], [], [])
        random_sd15(folder / "sd15")
        size, prompt = ["--batch", "1", "--height", "256", "--width", "256"], ["--prompt", "a red circle on gray"]
        for _ in range(times):
            measure("SD1.5 256, random weights", folder, ["--model", "sd15"], size, prompt)
