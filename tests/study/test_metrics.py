"""The metrics: they agree with torchmetrics, rank what is better higher, and say what is missing."""

import importlib.util

import numpy as np
import pytest
import torch

from attnreuse import AttnReuseError
from attnreuse.demo.tiny_shapes import draw, sample_scenes
from attnreuse.study import metrics

pytest.importorskip("torchmetrics")


@pytest.fixture(scope="module")
def drawn():
    """64 drawn pictures and their captions."""
    scenes = sample_scenes(64, seed=5)
    return ((draw(scenes, 128) + 1) / 2).permute(0, 2, 3, 1).numpy(), [str(s.caption) for s in scenes]


def noisy(pictures, size):
    rng = np.random.default_rng(0)
    return (pictures + rng.normal(0, size, pictures.shape)).clip(0, 1).astype(np.float32)


def test_psnr_is_that_of_torchmetrics(drawn):
    from torchmetrics.functional.image import peak_signal_noise_ratio

    a, b = drawn[0][0], noisy(drawn[0][:1], 0.05)[0]
    theirs = peak_signal_noise_ratio(torch.from_numpy(a).double(), torch.from_numpy(b).double(), data_range=1.0)
    assert metrics.psnr(a, b) == pytest.approx(theirs.item(), abs=1e-4)
    assert metrics.psnr(a, a) == float("inf")
    assert metrics.psnr_each(a[None], a[None])[0] == metrics.EQUAL_DB
    with pytest.raises(ValueError, match="one shape"):
        metrics.psnr(a, a[:64])


def test_ssim_falls_with_noise(drawn):
    pictures = drawn[0][:4]
    assert metrics.ssim_each(pictures, pictures) == pytest.approx([1] * 4, abs=1e-6)
    little, much = (metrics.ssim_each(noisy(pictures, size), pictures) for size in (0.02, 0.2))
    assert (little < 1).all()
    assert (little > much).all()


def test_fid_is_small_within_a_distribution_and_grows_with_noise(drawn):
    pictures, _ = drawn
    assert metrics.fid(pictures, pictures, tiny=True) == pytest.approx(0, abs=1e-2)
    little, much = (metrics.fid(noisy(pictures, size), pictures, tiny=True) for size in (0.05, 0.5))
    assert 0 < little < much


def test_clip_score_prefers_the_true_caption(drawn):
    pictures, captions = drawn
    true = metrics.clip_scores(pictures, captions, tiny=True)
    false = metrics.clip_scores(pictures, captions[1:] + captions[:1], tiny=True)
    assert true.shape == (64,)
    assert true.mean() > false.mean() + 20


def test_the_caption_oracle_reads_drawn_pictures(drawn):
    pictures, captions = drawn
    assert min(metrics.obedience(pictures, captions).values()) > 0.95
    assert metrics.obedience(pictures, captions[1:] + captions[:1])["color"] < 0.6


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is there")
def test_what_lpips_lacks_is_said(drawn):
    with pytest.raises(AttnReuseError, match=r"LPIPS needs more: pip install 'torchmetrics\[image\]', from where"):
        metrics.lpips_each(drawn[0][:1], drawn[0][:1])


def test_unreachable_weights_are_said(drawn):
    with pytest.raises(AttnReuseError, match="CLIP score: its weights could not be loaded"):
        metrics.clip_scores(drawn[0][:1], drawn[1][:1])


def test_pictures_that_are_not_numbers_are_no_equal_pictures():
    zeros, broken = np.zeros((2, 8, 8, 3), np.float32), np.full((2, 8, 8, 3), np.nan, np.float32)
    assert metrics.psnr_each(zeros, zeros).tolist() == [metrics.EQUAL_DB] * 2
    for images, targets in ((broken, zeros), (zeros, broken), (broken, broken)):
        with pytest.raises(AttnReuseError, match="pictures hold values that are not numbers"):
            metrics.psnr_each(images, targets)
