"""How far pictures are from the full-step ones."""

from __future__ import annotations

import math

import numpy as np


def psnr(image: np.ndarray, target: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two pictures of one shape in [0, 1]; ``inf`` where equal."""
    if image.shape != target.shape:
        raise ValueError(f"pictures must have one shape, got {image.shape} and {target.shape}")
    error = float(np.mean((np.asarray(image, np.float64) - target) ** 2))
    return -10 * math.log10(error) if error else math.inf
