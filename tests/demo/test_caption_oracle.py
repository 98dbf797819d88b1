"""The oracle that accepts the shipped pipeline reads drawn pictures right, and sees what is wrong."""

import dataclasses

import numpy as np
import pytest
import torch

from attnreuse.demo.caption_oracle import Verdict, judge, read
from attnreuse.demo.tiny_shapes import BACKGROUNDS, Caption, all_captions, draw, held_out_prompts, parse, sample_scenes


def pictures(scenes, size=128):
    return ((draw(scenes, size) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("size", [64, 128])
def test_drawn_pictures_are_read_right(size):
    scenes = sample_scenes(300, seed=5)
    verdicts = [judge(p, s.caption) for p, s in zip(pictures(scenes, size), scenes, strict=True)]
    assert all(v == Verdict(True, True, True, True) for v in verdicts)


def test_blur_and_noise_do_not_mislead_it():
    scenes = sample_scenes(100, seed=6)
    rough = torch.nn.functional.avg_pool2d(draw(scenes, 128), 3, stride=1, padding=1, count_include_pad=False)
    rough = (rough + 0.04 * torch.randn(rough.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    seen = ((rough + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy()
    right = [judge(p, s.caption) == Verdict(True, True, True, True) for p, s in zip(seen, scenes, strict=True)]
    assert np.mean(right) >= 0.98


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda c: dataclasses.replace(c, background=next(b for b in BACKGROUNDS if b != c.background)), "background"),
        (lambda c: dataclasses.replace(c, objects=(("red", c.objects[0][1]), c.objects[1])), "color"),
        (lambda c: dataclasses.replace(c, objects=(("blue", "square"), c.objects[1])), "shape"),
        (lambda c: dataclasses.replace(c, relation="right of"), "relation"),
    ],
)
def test_each_kind_of_mistake_is_seen(change, wrong):
    caption = Caption((("blue", "circle"), ("yellow", "triangle")), "left of", "gray")
    scenes = [s for s in sample_scenes(4000, seed=7) if s.caption == caption]
    assert scenes
    for picture in pictures(scenes):
        verdict = judge(picture, change(caption))
        assert not getattr(verdict, wrong)


def test_an_empty_picture_has_a_background_and_no_object():
    assert read(np.full((128, 128, 3), 245, np.uint8)) == ("white", [])


def test_held_out_captions_are_never_trained_on():
    trained = {str(s.caption) for s in sample_scenes(5000, seed=1)}
    prompts = held_out_prompts(64)
    assert len(set(prompts)) == 64
    assert not trained & set(prompts)


def test_captions_parse_back():
    assert all(parse(str(c)) == c for c in all_captions())
    with pytest.raises(ValueError, match="not a tiny-shapes caption"):
        parse("a red circle in the rain")
