"""Values for :mod:`benchmarks.gpu`: each family of kernels, format and head dim at odd and even sizes.

Against attention in fp64, and, of reuse, against the map as it is decoded; the output's neighbours must not change.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from attnreuse import ops
from attnreuse.maps import reference
from attnreuse.maps.formats import AttentionMap, format_named

FAMILIES = {"triton": ("u8", "u7", "u4", "fp16"), "cuda": ("u8", "u4"), "hopper": ("u8", "u4")}
HEAD_DIMS = (64, 40, 128, 80, 160, 96)
SIZES = ((63, 77, 1.0), (150, 300, 4.0), (256, 1024, 1.0), (257, 1000, 4.0))  # M, N, factor of the queries
HEADS = (2, 3)  # B, H
PRODUCT_ERROR = {"u7": 2.5e-2}  # of a reuse against its own map: values become integers there
ROUNDING = 2e-3


def check(family: str, head_dim: int, device: torch.device) -> Iterator[dict[str, object]]:
    """A row for each operation; one that fails has no error and a note.

    Raises:
        SystemExit: the device is lost to this process.
    """
    torch.manual_seed(0)
    for name in FAMILIES[family]:
        for m, n, peak in SIZES:
            about = {"family": family, "format": name, "d": head_dim, "m": m, "n": n, "peak": peak}
            q, k, v = (torch.randn(*HEADS, length, head_dim, device=device) for length in (m, n, n))
            given = tuple(x.half() for x in (q * peak, k, v))
            try:
                reason = _unserved(family, name, given[2])
                if reason:
                    yield about | {"op": "reuse", "green": "", "error": "", "of_map": "", "allowed": "", "note": reason}
                    continue
                for row in _checked(family, name, *given):
                    yield about | row
            except Exception as error:  # kernels raise their own kinds
                said = f"{type(error).__name__}: {error}".splitlines()[0][:160]
                yield about | {"op": "", "green": False, "error": "", "of_map": "", "allowed": "", "note": said}
                if any(word in said for word in ("CUDA", "illegal", "misaligned")):
                    raise SystemExit(f"{family}: the device is lost to this process: {said}") from None


def _unserved(family: str, name: str, value: Tensor) -> str | None:
    named = ops.NAMED.get(family)
    return named and named.unserved(format_named(name), value.device, value.dtype, value.shape[-1])


def _checked(family: str, name: str, q: Tensor, k: Tensor, v: Tensor) -> Iterator[dict[str, object]]:
    d, map_format = q.shape[-1], format_named(name)
    exact = (q.double() @ k.double().mT * d**-0.5).softmax(-1) @ v.double()
    allowed = 2 * _error((q @ k.mT * d**-0.5).softmax(-1) @ v, exact)
    held = AttentionMap.empty(map_format, (*q.shape[:3], k.shape[2]), q.device)
    held.storage.fill_(255)
    if family == "triton":
        out = ops.capture(q, k, v, into=held, backend=family)[0]
        error, of_map = _error(out, exact), _error(held.dense().double() @ v.double(), exact)
        green = error <= allowed and of_map <= allowed + map_format.error
        yield {"op": "capture", "green": green, "error": error, "of_map": of_map, "allowed": allowed, "note": ""}
    # The reference fills the map, so that a wrong capture spoils nothing else.
    reference.capture(q, k, v, None, d**-0.5, held, torch.empty_like(q))
    around = torch.full((*q.shape[:3], d + 16), 7.0, device=q.device, dtype=q.dtype)
    out = around[..., 8:-8].fill_(math.nan)
    first = ops.reuse(held, v, out=out, backend=family).clone()
    ops.reuse(held, v, out=out, backend=family)
    notes = ["differs from run to run"] * (not torch.equal(first, out))
    notes += ["writes outside of its output"] * (not bool((around[..., :8] == 7).all() & (around[..., -8:] == 7).all()))
    error, of_map = _error(first, exact), _error(first, held.dense().double() @ v.double())
    allowed += map_format.error
    green = error <= allowed and of_map <= PRODUCT_ERROR.get(name, ROUNDING) and not notes
    yield {
        "op": "reuse", "green": green, "error": error, "of_map": of_map, "allowed": allowed, "note": "; ".join(notes)
    }  # fmt: skip


def _error(found: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error; infinite where there are NaNs."""
    error = float((found.double() - expected).norm() / expected.norm())
    return math.inf if math.isnan(error) else error
