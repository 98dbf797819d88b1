"""What others do to save time on the same pipelines, as contexts that leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

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


OTHER_CACHES: dict[str, Around] = {
    "DeepCache(2)": deepcache(2),
    "DeepCache(3)": deepcache(3),
    "tomesd(0.5)": token_merging(0.5),
    "PAB(2)": attention_broadcast(2),
}
