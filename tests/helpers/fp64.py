"""What attention is in fp64, and how far other results are from it."""

import math

import torch


def oracle(q, k, v, mask=None, scale=None):
    """Map and output in fp64."""
    scores = q.double() @ k.double().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    p = scores.softmax(-1).nan_to_num(0.0)
    return p, p @ v.double()


def error(actual, expected):
    """Relative Frobenius error."""
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()
