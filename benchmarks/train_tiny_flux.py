"""Train a small FLUX.1-shaped transformer on the shipped pipeline's drawn pictures, by flow matching.

    python benchmarks/train_tiny_flux.py --work runs/tiny-flux   # an hour on two cores

It shows what reuse does to the pictures of a transformer, beside the caches that diffusers has for it. VAE,
tokenizer and text encoder are those of `attnreuse/assets/tiny-shapes`; the text encoder stands in for both of FLUX.1.
Guidance is by two calls (`true_cfg_scale`), since nothing was distilled. Stages as in `train_tiny_shapes.py`, each
resumable: latents of 8, 16 and 32 a side, parted into tokens of 2 x 2.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel, StableDiffusionPipeline
from torch import Tensor
from train_tiny_shapes import SEED, Run, Stage, averaged

import attnreuse
from attnreuse.demo.tiny_shapes import draw, held_out_prompts, sample_scenes

STAGES = (
    Stage("flux-8", 4000, 64, 1e-3, 8, 30_000),
    Stage("flux-16", 3500, 32, 8e-4, 16, 20_000),
    Stage("flux-32", 1500, 16, 5e-4, 32, 12_000),
)
SHIFT = 3.0  # of noise levels towards high noise, where the caption decides; of training and sampling
GUIDANCE = 2.5
WEIGHTS = Path(__file__).parent / "tiny-flux"  # fp16


def build() -> FluxTransformer2DModel:
    """2.8 million weights, 5.6 MB in fp16."""
    return FluxTransformer2DModel(
        in_channels=16,  # 4 of the latents, 2 x 2
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        axes_dims_rope=(8, 12, 12),
    )


class Shipped:
    """The parts that the transformer shares with the shipped pipeline, frozen."""

    def __init__(self) -> None:
        self.pipe = StableDiffusionPipeline.from_pretrained(attnreuse.tiny_shapes_path())
        for part in (self.pipe.vae, self.pipe.text_encoder):
            part.requires_grad_(False)

    def tokens(self, captions: list[str]) -> Tensor:
        return self.pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids

    @torch.no_grad()
    def text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states ``[B, 24, 128]`` and pooled ones ``[B, 128]``."""
        out = self.pipe.text_encoder(tokens)
        return out.last_hidden_state, out.pooler_output

    @torch.no_grad()
    def data(self, work: Path, stage: Stage) -> dict[str, Tensor]:
        """`latents` ``[P, S/2 S/2, 16]`` and `tokens` ``[P, 24]`` of the stage's pictures, kept on disk."""
        path = work / f"{stage.name}.latents.pt"
        if not path.exists():
            scenes = sample_scenes(stage.pictures, SEED + stage.size)
            parts = [scenes[i : i + 64] for i in range(0, len(scenes), 64)]
            encode = self.pipe.vae.encode
            latents = torch.cat([packed(encode(draw(part, stage.size * 4)).latent_dist.mean) for part in parts])
            torch.save(dict(latents=latents, tokens=self.tokens([str(s.caption) for s in scenes])), path)
        return torch.load(path, weights_only=True)


def packed(latents: Tensor) -> Tensor:
    """``[B, 4, S, S]`` to ``[B, S/2 S/2, 16]``, as FLUX.1's pipeline does."""
    b, c, h, w = latents.shape
    return FluxPipeline._pack_latents(latents, b, c, h, w)


def flow_loss(model: FluxTransformer2DModel, side: int, latents: Tensor, text: tuple, g: torch.Generator) -> Tensor:
    """Mean squared error of the predicted ``noise - latents``."""
    u = torch.rand(len(latents), generator=g)
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    noise = torch.randn(latents.shape, generator=g)
    noised = torch.lerp(latents, noise, sigma[:, None, None])
    places = FluxPipeline._prepare_latent_image_ids(1, side // 2, side // 2, latents.device, latents.dtype)
    hidden, pooled = text
    out = model(
        noised,
        timestep=sigma,
        encoder_hidden_states=hidden,
        pooled_projections=pooled,
        img_ids=places,
        txt_ids=torch.zeros(hidden.shape[1], 3),
    ).sample
    return F.mse_loss(out, noise - latents)


def train(work: Path, shipped: Shipped, stage: Stage, before: Stage | None) -> None:
    data, model = shipped.data(work, stage), build()
    if before:
        averaged(work, before, model).train().requires_grad_(True)
    run, empty = Run(work, stage, model), shipped.tokens([""])
    while not run.done:
        g = run.generator()
        rows = torch.randint(len(data["latents"]), (stage.batch,), generator=g)
        tokens = data["tokens"][rows]
        tokens[torch.rand(stage.batch, generator=g) < 0.1] = empty  # for guidance
        run.update(flow_loss(run.model, stage.size, data["latents"][rows], shipped.text(tokens), g))


class DrawnFluxPipeline(FluxPipeline):
    """FLUX.1's pipeline with the shipped text encoder, which takes no more than its own number of tokens."""

    def _get_t5_prompt_embeds(self, *args: Any, max_sequence_length: int = 512, **kwargs: Any) -> Tensor:
        most = self.text_encoder_2.config.max_position_embeddings
        return super()._get_t5_prompt_embeds(*args, max_sequence_length=min(most, max_sequence_length), **kwargs)


def pipeline(shipped: Shipped, model: FluxTransformer2DModel) -> DrawnFluxPipeline:
    parts = shipped.pipe
    parts.vae.register_to_config(shift_factor=0.0)
    pipe = DrawnFluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        text_encoder_2=parts.text_encoder,
        tokenizer_2=parts.tokenizer,
        transformer=model.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sheet(pipe: FluxPipeline, side: int, path: Path, count: int = 8) -> None:
    """Samples for held-out captions beside each other, as one PNG."""
    from PIL import Image

    prompts = held_out_prompts(count)
    given = dict(num_inference_steps=20, height=side, width=side, negative_prompt=[""] * count)
    pictures = pipe(prompts, true_cfg_scale=GUIDANCE, generator=torch.Generator().manual_seed(0), **given).images
    canvas = Image.new("RGB", (count * 130, 128), "white")
    for i, picture in enumerate(pictures):
        canvas.paste(picture.resize((128, 128)), (i * 130, 0))
    canvas.save(path)
    print(*prompts, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder to write the transformer to, in fp16")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    shipped, before = Shipped(), None
    for stage in STAGES:
        train(args.work, shipped, stage, before)
        pipe = pipeline(shipped, averaged(args.work, stage, build()))
        sheet(pipe, 4 * stage.size, args.work / f"{stage.name}.png")
        before = stage
    pipe.transformer.half().save_pretrained(args.out)


if __name__ == "__main__":
    main()
