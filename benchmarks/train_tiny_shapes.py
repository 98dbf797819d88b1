"""Train the pipeline shipped in `attnreuse/assets/tiny-shapes` from nothing, on drawn pictures.

    python benchmarks/train_tiny_shapes.py --work runs/tiny-shapes --export attnreuse/assets/tiny-shapes

Stages, each resumable (a checkpoint every few minutes; run the same command again to go on):
  clip     a CLIP pair, contrastively; its text tower, frozen, conditions the UNet
  vae      an AutoencoderKL, 128 x 128 pictures to 4 x 32 x 32 latents of zero mean and unit deviation
  unet-8   the UNet on 8 x 8 latents (32 x 32 pictures), then
  unet-16  on 16 x 16, then
  unet-32  on 32 x 32: the network is size-agnostic, and most is learned where a step is cheap
  export   fp16 `save_pretrained` folder, with a sheet of samples beside the checkpoints

Three choices make the captions obeyed early. The text tower is taught more than contrast (see
`TaughtClip`). Noise reaches (nearly) zero signal: with Stable
Diffusion's schedule the mean of the noised latent still tells the background colour, so the network
need not read it from the caption (arXiv 2305.08891). And the UNet predicts v (arXiv 2202.00512),
whose target at high noise is the picture, not the noise.
"""

import argparse
import json
import math
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode

from attnreuse import TINY_SHAPES_GUIDANCE
from attnreuse.demo.tiny_shapes import (
    BACKGROUNDS,
    COLORS,
    RELATIONS,
    SHAPES,
    Caption,
    draw,
    held_out_prompts,
    sample_scenes,
)

SEED = 2401_01008
MAX_TOKENS = 24
NOISE = dict(
    num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", prediction_type="v_prediction"
)


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    batch: int
    lr: float
    size: int  # latents per side for the UNet, pixels per side otherwise
    pictures: int = 0  # cached latents the UNet draws its batches from


STAGES = {
    stage.name: stage
    for stage in (
        Stage("clip", 1400, 128, 1e-3, 64),
        Stage("vae", 1100, 16, 1e-3, 64),
        Stage("unet-8", 2000, 64, 1e-3, 8, 30_000),
        Stage("unet-16", 1200, 32, 8e-4, 16, 30_000),
        Stage("unet-32", 900, 16, 6e-4, 32, 16_000),
    )
}


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer in which every word of the grammar is one token."""
    letters = list(bytes_to_unicode().values())
    vocab, merges = letters + [letter + "</w>" for letter in letters], []
    words = {"a", "on", *COLORS, *BACKGROUNDS, *SHAPES, *(w for r in RELATIONS for w in r.split())}
    for word in sorted(words):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merged = parts[0] + parts[1]
            if merged not in vocab:
                vocab.append(merged)
                merges.append((parts[0], parts[1]))
            parts = [merged, *parts[2:]]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(vocab)}, merges=merges, model_max_length=MAX_TOKENS)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    tower = dict(hidden_size=128, intermediate_size=512, num_attention_heads=4, projection_dim=128)
    tokens = dict(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=MAX_TOKENS, num_hidden_layers=2, **tower, **tokens
    )
    vision = CLIPVisionConfig(image_size=64, patch_size=8, num_hidden_layers=3, **tower)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128))


def layout(caption: Caption) -> list[int]:
    """What is where: axis (0 vertical, 1 horizontal, 2 one object), colour and shape near the origin, then far."""
    near, far = caption.objects[0], caption.objects[-1]
    if caption.relation in ("right of", "below"):
        near, far = far, near
    axis = 2 if caption.relation is None else int(caption.relation in ("left of", "right of"))
    return [axis, *(i for color, shape in (near, far) for i in (list(COLORS).index(color), SHAPES.index(shape)))]


LAYOUT_SIZES = (3, len(COLORS), len(SHAPES), len(COLORS), len(SHAPES))


class TaughtClip(nn.Module):
    """The pair, with two linear heads that teach its text tower what contrast alone does not.

    One reads each word back from the last hidden state: with contrast alone, probes read the words of
    captions seen in training, but not of held-out ones. One reads the layout off the tokens behind
    the last word: without it "a red circle left of a blue square" and its inverse are alike to the
    UNet, which then paints both objects in one colour.
    """

    def __init__(self, clip: CLIPModel):
        super().__init__()
        self.clip = clip
        text = clip.config.text_config
        self.words = nn.Linear(text.hidden_size, text.vocab_size)
        self.layout = nn.Linear(text.hidden_size, sum(LAYOUT_SIZES))

    def forward(self, tokens: Tensor, captions: list[Caption], pictures: Tensor | None) -> Tensor:
        """Loss of tokens [B, 24]: words, layout and, with pictures [B, 3, 64, 64], contrast."""
        if pictures is None:
            hidden, contrast = self.clip.text_model(tokens).last_hidden_state, 0.0
        else:
            out = self.clip(input_ids=tokens, pixel_values=pictures, return_loss=True)
            hidden, contrast = out.text_model_output.last_hidden_state, out.loss
        end = tokens == self.clip.config.text_config.eos_token_id  # [B, 24]; padding included
        loss = contrast + F.cross_entropy(self.words(hidden[~end]), tokens[~end])
        rows = end.nonzero()[:, 0]
        wanted = torch.tensor([layout(c) for c in captions])[rows]  # [E, 5]
        read = self.layout(hidden[end]).split(LAYOUT_SIZES, dim=-1)
        return loss + sum(F.cross_entropy(r, w) for r, w in zip(read, wanted.T, strict=True))


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=128,
        scaling_factor=1.0,
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 80, 96),
        layers_per_block=1,
        attention_head_dim=4,  # diffusers' name for the number of heads
        cross_attention_dim=128,
        addition_embed_type="text",  # the pooled caption joins the timestep: colours are learned much sooner
        addition_embed_type_num_heads=4,
        norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
    )


class Run:
    """One stage's training state on disk: model, optimizer, averaged weights, step."""

    def __init__(self, work: Path, stage: Stage, model: nn.Module):
        self.path, self.stage, self.model, self.step = work / f"{stage.name}.pt", stage, model, 0
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=stage.lr, weight_decay=0.01, betas=(0.9, 0.99))
        self.ema = EMAModel(model.parameters(), decay=0.99, use_ema_warmup=True, power=0.75)
        self.losses: list[float] = []
        self.saved_at = self.started_at = time.time()
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema.load_state_dict(state["ema"])
            self.step = state["step"]

    @property
    def done(self) -> bool:
        return self.step >= self.stage.steps

    def generator(self) -> torch.Generator:
        """Randomness of this step alone, so that a resumed run repeats an uninterrupted one."""
        name = sum(map(ord, self.stage.name))
        return torch.Generator().manual_seed(SEED + name * 1_000_003 + self.step)

    def update(self, loss: Tensor) -> None:
        """One optimizer step: warm-up, then cosine decay to a twentieth."""
        warm = min(1.0, (self.step + 1) / 100)
        cosine = 0.525 + 0.475 * math.cos(math.pi * self.step / self.stage.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.stage.lr * warm * cosine
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.model.parameters())
        self.step += 1
        self.losses.append(loss.item())
        if self.step % 50 == 0 or self.done:
            mean = sum(self.losses) / len(self.losses)
            print(f"{self.stage.name} {self.step}/{self.stage.steps} loss {mean:.4f} "
                  f"{time.time() - self.started_at:.0f} s", flush=True)  # fmt: skip
            self.losses.clear()
        if time.time() - self.saved_at > 120 or self.done:
            self.save()

    def save(self) -> None:
        state = dict(
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            ema=self.ema.state_dict(),
            step=self.step,
        )
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.path)
        self.saved_at = time.time()


def averaged(work: Path, stage: Stage, model: nn.Module) -> nn.Module:
    """`model` with the stage's averaged weights, frozen, in eval mode."""
    path = work / f"{stage.name}.pt"
    if not path.exists():
        raise SystemExit(f"{path} is missing: run the stage {stage.name} first")
    state = torch.load(path, weights_only=True)
    if state["step"] < stage.steps:
        print(f"note: {stage.name} stands at step {state['step']} of {stage.steps}", flush=True)
    model.load_state_dict(state["model"])
    for parameter, mean in zip(model.parameters(), state["ema"]["shadow_params"], strict=True):
        parameter.data.copy_(mean)
    return model.eval().requires_grad_(False)


def train_clip(work: Path) -> None:
    """The first half of the steps teach the text tower alone, which is cheap."""
    stage, tokenizer = STAGES["clip"], build_tokenizer()
    run = Run(work, stage, TaughtClip(build_clip(tokenizer)))
    while not run.done:
        scenes = sample_scenes(stage.batch * 2, SEED + run.step)
        scenes = list({str(s.caption): s for s in scenes}.values())[: stage.batch]
        tokens = tokenize(tokenizer, [str(s.caption) for s in scenes])
        pictures = draw(scenes, stage.size) if run.step >= stage.steps // 2 else None
        run.update(run.model(tokens, [s.caption for s in scenes], pictures))


def train_vae(work: Path) -> None:
    stage = STAGES["vae"]
    run = Run(work, stage, build_vae())
    while not run.done:
        pictures = draw(sample_scenes(stage.batch, SEED + 77 + run.step, single=0.5), stage.size)
        posterior = run.model.encode(pictures).latent_dist
        decoded = run.model.decode(posterior.sample(run.generator())).sample
        error = decoded - pictures
        run.update(
            error.abs().mean() + error.square().mean() + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel()
        )


@torch.no_grad()
def standardise(vae: AutoencoderKL) -> AutoencoderKL:
    """Fold zero mean and unit deviation per latent channel into the 1 x 1 convolutions around the latents."""
    means = torch.cat([vae.encode(draw(sample_scenes(64, SEED + i), 128)).latent_dist.mean for i in range(4)])
    mean, deviation = means.mean((0, 2, 3)), means.std((0, 2, 3))  # [4], [4]
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= deviation[None, :, None, None]
    quant.weight[:4] /= deviation[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) / deviation
    quant.bias[4:] -= 2 * deviation.log()
    return vae


@torch.no_grad()
def latents_of(work: Path, stage: Stage, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> dict[str, Tensor]:
    """`latents` [P, 4, S, S] and `tokens` [P, 24] of the stage's pictures, drawn once and kept on disk."""
    path = work / f"{stage.name}.latents.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    scenes = sample_scenes(stage.pictures, SEED + stage.size)
    parts = [scenes[i : i + 64] for i in range(0, len(scenes), 64)]
    latents = torch.cat([vae.encode(draw(part, stage.size * 4)).latent_dist.mean for part in parts])
    data = dict(latents=latents, tokens=tokenize(tokenizer, [str(s.caption) for s in scenes]))
    torch.save(data, path)
    return data


def velocity_loss(
    unet: nn.Module, noise: DDPMScheduler, latents: Tensor, context: Tensor, g: torch.Generator
) -> Tensor:
    """Mean squared error of the predicted v; timesteps lean to high noise, where the caption decides."""
    t = (1000 * torch.rand(len(latents), generator=g) ** 0.6).long()
    eps = torch.randn(latents.shape, generator=g)
    target = noise.get_velocity(latents, eps, t)
    noised = noise.add_noise(latents, eps, t).to(memory_format=torch.channels_last)
    return F.mse_loss(unet(noised, t, context).sample, target)


def train_unet(work: Path, stage: Stage, before: Stage | None) -> None:
    tokenizer = build_tokenizer()
    text = averaged(work, STAGES["clip"], TaughtClip(build_clip(tokenizer))).clip.text_model
    vae = standardise(averaged(work, STAGES["vae"], build_vae()))
    data = latents_of(work, stage, vae, tokenizer)
    unet = build_unet()
    if before:
        averaged(work, before, unet).train().requires_grad_(True)
    run = Run(work, stage, unet.to(memory_format=torch.channels_last))
    noise, empty = DDPMScheduler(**NOISE), tokenize(tokenizer, [""])
    while not run.done:
        g = run.generator()
        rows = torch.randint(len(data["latents"]), (stage.batch,), generator=g)
        tokens = data["tokens"][rows]
        dropped = torch.rand(stage.batch, generator=g) < 0.1  # for guidance
        tokens[dropped] = empty
        with torch.no_grad():
            context = text(tokens).last_hidden_state
        run.update(velocity_loss(run.model, noise, data["latents"][rows], context, g))


def pipeline(work: Path, stage: Stage) -> tuple[StableDiffusionPipeline, CLIPModel]:
    """The pipeline as trained so far, and the CLIP pair whose text tower it carries."""
    tokenizer = build_tokenizer()
    clip = averaged(work, STAGES["clip"], TaughtClip(build_clip(tokenizer))).clip
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict({k: v for k, v in clip.text_model.state_dict().items()}, strict=True)
    pipe = StableDiffusionPipeline(
        vae=standardise(averaged(work, STAGES["vae"], build_vae())),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=averaged(work, stage, build_unet()),
        scheduler=DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe, clip


def save_clip(clip: CLIPModel, folder: Path) -> None:
    """The pair without its text tower, which the pipeline's text encoder holds already."""
    clip.config.save_pretrained(folder)
    rest = {key: value.contiguous() for key, value in clip.state_dict().items() if not key.startswith("text_model.")}
    save_file(rest, folder / "model.safetensors")


def export(work: Path, folder: Path, stage: Stage) -> None:
    pipe, clip = pipeline(work, stage)
    pipe.to(torch.float16).save_pretrained(folder)
    # transformers loads in the dtype a config names, diffusers in fp32: the pipeline must be of one dtype.
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "float32"}, indent=2) + "\n")
    save_clip(clip.half(), folder / "clip")
    training = {s.name: dict(steps=s.steps, batch=s.batch, lr=s.lr, size=s.size) for s in STAGES.values()}
    (folder / "training.json").write_text(json.dumps(dict(seed=SEED, stages=training), indent=2) + "\n")
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    print(f"{folder}: {size / 1e6:.2f} MB")


def sheet(work: Path, stage: Stage, count: int = 16) -> None:
    """Samples for held-out captions at the stage's resolution, as one PNG beside the checkpoints."""
    pipe, _ = pipeline(work, stage)
    pipe.set_progress_bar_config(disable=True)
    prompts, side = held_out_prompts(count), stage.size * 4
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    given = dict(num_inference_steps=20, guidance_scale=TINY_SHAPES_GUIDANCE, height=side, width=side)
    pictures = pipe(prompts, generator=generators, **given).images
    columns, cell, text = count // 2, 150, 46
    canvas = Image.new("RGB", (columns * cell, 2 * (128 + text)), "white")
    for i, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        x, y = i % columns * cell, i // columns * (128 + text)
        canvas.paste(picture.resize((128, 128)), (x + 11, y))
        caption = "\n".join(textwrap.wrap(prompt, 24))
        ImageDraw.Draw(canvas).multiline_text((x + 11, y + 130), caption, "black", ImageFont.load_default(11))
    canvas.save(work / f"{stage.name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--export", type=Path, help="folder to write the finished pipeline to")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    before = None
    for name, stage in STAGES.items():
        if name in args.stages:
            if name == "clip":
                train_clip(args.work)
            elif name == "vae":
                train_vae(args.work)
            else:
                train_unet(args.work, stage, before)
                sheet(args.work, stage)
        before = stage if name.startswith("unet") else None
    if args.export:
        export(args.work, args.export, before)


if __name__ == "__main__":
    main()
