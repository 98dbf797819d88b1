"""Shared by the tests: a tiny random pipeline, and allocations poisoned with NaN."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import pytest
import torch
from tiny_random import random_pipeline

torch.set_num_threads(2)


@pytest.fixture
def pipe():
    """A fresh random Stable-Diffusion-shaped pipeline; pass `prompt_embeds`."""
    return random_pipeline()


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """`torch.empty` and `new_empty` give NaN (floats) or 0xFF, so that unwritten memory shows."""

    def poison(tensor):
        if tensor.device.type == "cpu" and not isinstance(tensor, torch._subclasses.FakeTensor):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 255 if tensor.dtype == torch.uint8 else 0)
        return tensor

    empty, new_empty = torch.empty, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
