"""Shared by the tests: a tiny random pipeline, and allocations poisoned with NaN."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported

from tiny_random import THREADS, random_pipeline

torch.set_num_threads(THREADS)


def pytest_configure(config):
    config.option.loadscopereorder = False  # of pytest-xdist: files of few tests, among them the longest, not last


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def pipe():
    """A fresh random Stable-Diffusion-shaped pipeline; pass `prompt_embeds`."""
    return random_pipeline()


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Uninitialised memory holds NaN (floats) or 255 (bytes), so that what nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
