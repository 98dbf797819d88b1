"""Distil the shipped pipeline's UNet into a student of half the steps that needs no guidance.

    python benchmarks/distill_tiny_shapes.py --work runs/student --out runs/student/student

One student step learns where two guided DDIM steps of the teacher lead (progressive distillation,
arXiv 2202.00512, with the guidance distilled too, arXiv 2210.03142). The student starts as the teacher;
a run that was stopped goes on when called again. Compare with
`attnreuse compare --student runs/student/student`.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from train_tiny_shapes import SEED, Run, Stage, averaged

import attnreuse
from attnreuse.demo.tiny_shapes import draw, sample_scenes

STUDENT_STEPS = 10


class Teacher:
    """The shipped pipeline: latents of drawn pictures, and two guided DDIM steps.

    Args:
        steps: of the teacher; the student makes half as many.
    """

    def __init__(self, steps: int):
        self.pipe = StableDiffusionPipeline.from_pretrained(attnreuse.tiny_shapes_path())
        for part in (self.pipe.unet, self.pipe.vae, self.pipe.text_encoder):
            part.requires_grad_(False)
        self.alphas = self.pipe.scheduler.alphas_cumprod
        self.stride = len(self.alphas) // steps
        self.times = torch.arange(len(self.alphas), 0, -2 * self.stride) - 1  # where a student step begins

    @torch.no_grad()
    def latents(self, pictures: Tensor) -> Tensor:
        """``[P, 3, 128, 128]`` in [-1, 1] to ``[P, 4, 32, 32]``."""
        vae = self.pipe.vae
        return vae.encode(pictures).latent_dist.mean * vae.config.scaling_factor

    @torch.no_grad()
    def context(self, captions: list[str]) -> Tensor:
        given = self.pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return self.pipe.text_encoder(given.input_ids).last_hidden_state

    def signal_and_noise(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Square roots of alpha-bar and of its complement at `time` [P], each [P, 1, 1, 1]; past the end as at 0."""
        alpha = self.alphas[time.clamp(min=0)][:, None, None, None]
        return alpha.sqrt(), (1 - alpha).sqrt()

    @torch.no_grad()
    def target(self, noised: Tensor, time: Tensor, context: Tensor, empty: Tensor, guidance: float) -> Tensor:
        """The velocity with which one step from `time` lands where two guided steps do: [P, 4, S, S]."""
        z = noised
        for begin in (time, time - self.stride):
            both = self.pipe.unet(
                torch.cat([z, z]), torch.cat([begin, begin]), torch.cat([empty.expand_as(context), context])
            )
            without, with_caption = both.sample.chunk(2)
            v = without + guidance * (with_caption - without)
            signal, noise = self.signal_and_noise(begin)
            next_signal, next_noise = self.signal_and_noise(begin - self.stride)
            z = next_signal * (signal * z - noise * v) + next_noise * (noise * z + signal * v)
        signal, noise = self.signal_and_noise(time)
        end_signal, end_noise = self.signal_and_noise(time - 2 * self.stride)
        picture = (z - end_noise / noise * noised) / (end_signal - end_noise / noise * signal)
        return (signal * noised - picture) / noise


def train(work: Path, stage: Stage, guidance: float) -> None:
    teacher = Teacher(2 * STUDENT_STEPS)
    student = UNet2DConditionModel.from_pretrained(attnreuse.tiny_shapes_path(), subfolder="unet")
    run = Run(work, stage, student.to(memory_format=torch.channels_last).train())
    empty = teacher.context([""])
    while not run.done:
        g = run.generator()
        scenes = sample_scenes(stage.batch, SEED + 31 + run.step)
        latents = teacher.latents(draw(scenes, 4 * stage.size))
        context = teacher.context([str(scene.caption) for scene in scenes])
        time = teacher.times[torch.randint(len(teacher.times), (stage.batch,), generator=g)]
        signal, noise = teacher.signal_and_noise(time)
        noised = signal * latents + noise * torch.randn(latents.shape, generator=g)
        target = teacher.target(noised, time, context, empty, guidance)
        run.update(F.mse_loss(run.model(noised, time, context).sample, target))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="folder of the student's UNet, fp16")
    parser.add_argument("--iterations", type=int, default=700)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    stage = Stage(f"student-{STUDENT_STEPS}", args.iterations, batch=12, lr=2e-4, size=32)
    train(args.work, stage, attnreuse.TINY_SHAPES_GUIDANCE)
    student = UNet2DConditionModel.from_pretrained(attnreuse.tiny_shapes_path(), subfolder="unet")
    averaged(args.work, stage, student).half().save_pretrained(args.out)


if __name__ == "__main__":
    main()
