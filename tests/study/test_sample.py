"""The main job, called from Python."""

import pytest
import torch
from PIL import ImageFont
from tiny_random import captioned_pipeline

from attnreuse import AttnReuseError, Policy, hurry
from attnreuse.study.sample import SampleResult, _wrapped, sheet
from attnreuse.study.sample import sample as measured

PROMPTS = ["a red circle on gray"]


def run(pipe, policy):
    return measured(pipe, PROMPTS, steps=4, policy=policy, map_format="fp32", seed=0, rounds=1)


def test_a_rule_is_resolved_and_a_loaded_result_has_no_pictures(tmp_path):
    result = run(captioned_pipeline(), hurry(reuse=0.5))
    assert result.policy.reuse_steps == 2
    assert result.report.steps == 4
    drawn = sheet(result)
    assert drawn.height > 5 * 256
    words = [f"word{i}" for i in range(60)]
    long = sheet(result.model_copy(update={"prompts": [" ".join(words)]}))
    assert long.height > drawn.height + 3 * 4 * 18  # three captions of several lines more
    lines = _wrapped(" ".join([*words, "x" * 100]), 256, ImageFont.load_default(14))
    assert " ".join(lines).replace(" ", "") == "".join([*words, "x" * 100])
    assert max(ImageFont.load_default(14).getlength(line) for line in lines) <= 256
    result.save(tmp_path / "s.json")
    again = SampleResult.load(tmp_path / "s.json")
    assert (again.policy, again.saved_s) == (result.policy, result.saved_s)
    with pytest.raises(ValueError, match="a loaded result has no pictures: sample again"):
        sheet(again)


def test_pictures_that_are_not_numbers_are_an_error():
    """As half precision makes them: they are equal to nothing."""
    pipe = captioned_pipeline()
    conv = pipe.unet.conv_out
    conv.register_forward_hook(lambda module, args, out: torch.full_like(out, torch.nan))
    with pytest.raises(AttnReuseError, match="pictures hold values that are not numbers"):
        run(pipe, Policy(steps=4, reuse="..RR"))
