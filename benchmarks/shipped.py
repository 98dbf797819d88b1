"""The shipped pipeline, as benchmarks sample with it."""

from typing import Any

from diffusers import StableDiffusionPipeline

from attnreuse.demo import tiny_shapes
from attnreuse.measure.timing import keep_freed_memory
from attnreuse.planning.samplers import make_scheduler


def pipeline(sampler: str) -> Any:
    """tiny-shapes with this sampler, without progress bars; from now on the process keeps freed memory."""
    keep_freed_memory()
    pipe = StableDiffusionPipeline.from_pretrained(tiny_shapes.FOLDER)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_scheduler(pipe.scheduler.config, sampler)
    return pipe
