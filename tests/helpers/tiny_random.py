"""A Stable-Diffusion-shaped pipeline with random weights, made offline in a moment."""

import os
import threading

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from attnreuse.demo.tiny_shapes import FOLDER

TOKENS, WIDTH = 7, 32
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2  # side by side, programs of two threads slow each other


def random_unet(**changes) -> UNet2DConditionModel:
    torch.manual_seed(0)
    config = dict(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,  # diffusers' name for the number of heads
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    return UNet2DConditionModel(**{**config, **changes}).eval()


def random_pipeline(**unet_changes) -> StableDiffusionPipeline:
    unet = random_unet(**unet_changes)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
        )
    )
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def captioned_pipeline(**unet_changes) -> StableDiffusionPipeline:
    """A random pipeline that reads prompts: the shipped tokenizer, a random text encoder."""
    pipe = random_pipeline(**unet_changes)
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    torch.manual_seed(1)
    config = pipe.text_encoder.config.to_dict() | {"vocab_size": len(tokenizer), "max_position_embeddings": 24}
    pipe.register_modules(tokenizer=tokenizer, text_encoder=CLIPTextModel(CLIPTextConfig(**config)).eval())
    return pipe


def prompt(batch: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    """`prompt_embeds` and `negative_prompt_embeds` for a pipeline call."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(batch, TOKENS, WIDTH, generator=g) for name in ("prompt_embeds", "negative_prompt_embeds")
    }


def sample(pipe, steps: int = 6, seed: int = 0, batch: int = 1, **call) -> torch.Tensor:
    """Latents of one seeded run."""
    g = [torch.Generator().manual_seed(seed + i) for i in range(batch * call.get("num_images_per_prompt", 1))]
    given = {**prompt(batch, seed), "generator": g, "num_inference_steps": steps, "output_type": "latent", **call}
    return pipe(**given).images


def from_another_thread(call):
    """A pipeline's callback that has `call` made by another thread after step 1, and waits for it."""

    def callback(pipe, step, t, kwargs):
        if step == 1:
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
        return kwargs

    return callback


def compile_denoiser(pipe, whole: bool, backend, fullgraph: bool = True) -> None:
    """Compile the denoiser as a `whole`, or each of its repeated blocks."""
    torch._dynamo.reset()
    if whole:
        pipe.unet = torch.compile(pipe.unet, backend=backend, fullgraph=fullgraph)
    else:
        pipe.unet.compile_repeated_blocks(backend=backend, fullgraph=fullgraph)


def guided(cls, **extra):
    """A pipeline of this class around the random parts, whose output stays calm."""
    base = captioned_pipeline()
    parts = {n: getattr(base, n) for n in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    pipe = cls(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False, **extra)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.conv_out.weight.data.mul_(0.3)
    return pipe
