"""What others do to save time on the same pipelines, as contexts that leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from attnreuse.binding.denoiser import find_denoiser
from attnreuse.errors import AttnReuseError
from attnreuse.measure.environment import package_version

Around = Callable[[Any], AbstractContextManager[None]]  # of a pipeline


def _needs(package: str) -> None:
    if package_version(package) is None:
        raise AttnReuseError(f"{package} is not installed: pip install 'attnreuse[eval]'")


def deepcache(interval: int) -> Around:
    """DeepCache (arXiv 2312.00858): deep features of every `interval`-th step, branch 0."""

    @contextmanager
    def around(pipe: Any) -> Iterator[None]:
        _needs("DeepCache")
        from DeepCache import DeepCacheSDHelper

        helper = DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=interval, cache_branch_id=0)
        helper.enable()
        try:
            yield
        finally:
            helper.disable()

    return around


def token_merging(ratio: float) -> Around:
    """Token merging (arXiv 2303.17604), without its random choice of tokens."""

    @contextmanager
    def around(pipe: Any) -> Iterator[None]:
        _needs("tomesd")
        import tomesd

        tomesd.apply_patch(pipe, ratio=ratio, use_rand=False)
        try:
            yield
        finally:
            tomesd.remove_patch(pipe)

    return around


def attention_broadcast(interval: int) -> Around:
    """Pyramid attention broadcast (arXiv 2408.12588) as diffusers has it: self-attention outputs, at every timestep."""

    @contextmanager
    def around(pipe: Any) -> Iterator[None]:
        try:
            from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
        except ImportError as error:
            raise AttnReuseError(f"this diffusers has no pyramid attention broadcast ({error})") from error

        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=interval,
            spatial_attention_timestep_skip_range=(-1, 10**9),
            current_timestep_callback=lambda: 0,
        )
        try:
            apply_pyramid_attention_broadcast(pipe.unet, config)
            yield
        finally:  # diffusers has no way back; its state would leak into the next run
            for module in pipe.unet.modules():
                if hasattr(module, "_diffusers_hook"):
                    module._diffusers_hook.remove_hook("pyramid_attention_broadcast", recurse=False)

    return around


def of_diffusers(config: str, **options: Any) -> Around:
    """A cache of diffusers for transformers (``CacheMixin``), by the name of its config and what is set in it."""

    @contextmanager
    def around(pipe: Any) -> Iterator[None]:
        import diffusers

        made_by = getattr(diffusers, config, None)
        if made_by is None:
            raise AttnReuseError(f"this diffusers has no {config}")
        denoiser = find_denoiser(pipe)
        denoiser.enable_cache(made_by(**options))
        try:
            yield
        finally:
            denoiser.disable_cache()

    return around


def caches_for(pipe: Any) -> dict[str, Around]:
    """Those that apply to the pipeline's denoiser, by name.

    MagCache is left out, since it needs figures of the very model, and FasterCache, which fails on FLUX.1 in
    diffusers 0.42. PAB takes guidance by two calls for two steps there.
    """
    denoiser = find_denoiser(pipe)
    if hasattr(denoiser, "enable_cache"):
        return TRANSFORMER_CACHES
    return OTHER_CACHES if type(denoiser).__name__ == "UNet2DConditionModel" else {}


OTHER_CACHES: dict[str, Around] = {
    "DeepCache(2)": deepcache(2),
    "DeepCache(3)": deepcache(3),
    "tomesd(0.5)": token_merging(0.5),
    "PAB(2)": attention_broadcast(2),
}
ALWAYS = (-1, 10**9)  # timesteps at which outputs may be skipped
ATTENTION = ("transformer_blocks.*attn", "single_transformer_blocks.*attn")
TRANSFORMER_CACHES: dict[str, Around] = {
    "FirstBlockCache(0.05)": of_diffusers("FirstBlockCacheConfig", threshold=0.05),
    "FirstBlockCache(0.1)": of_diffusers("FirstBlockCacheConfig", threshold=0.1),
    "TaylorSeer(2)": of_diffusers("TaylorSeerCacheConfig", cache_interval=2, taylor_factors_dtype=None),
    "PAB(2)": of_diffusers(
        "PyramidAttentionBroadcastConfig",
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=ALWAYS,
        spatial_attention_block_identifiers=ATTENTION,
        current_timestep_callback=lambda: 0,
    ),
}
