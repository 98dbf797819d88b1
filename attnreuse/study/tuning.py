"""`attnreuse bench --tune`: launch configurations of the Triton kernels, timed side by side on this device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from attnreuse import ops
from attnreuse.maps.formats import FORMATS, MapFormat, format_named
from attnreuse.measure.timing import Times, interleaved
from attnreuse.results import Result
from attnreuse.study.bench import Shape, check, inputs


class Tuned(Result):
    """One launch configuration of one kernel: its time, or why it has none."""

    op: str
    map_format: str
    head_dim: int
    config: Any
    shipped: bool
    times: Times | None = None
    reason: str = ""


def tune(device: torch.device, shape: Shape, formats: list[str], repeats: int = 20) -> Iterator[Tuned]:
    """Time every sensible configuration of the Triton kernels at `shape`, the shipped one among them, op by op.

    Raises:
        ValueError: the device is none that the Triton kernels run on.
    """
    from attnreuse.kernels import backend

    reason = backend.unserved(FORMATS["u8"], device, torch.float16, 64)
    if reason or device.type != "cuda":
        raise ValueError(
            f"--tune measures the Triton kernels on a CUDA device: {reason or 'the interpreter has no speed'}"
        )
    for name in formats:
        yield from _tune_at(shape, format_named(name), device, repeats)


def _tune_at(shape: Shape, map_format: MapFormat, device: torch.device, repeats: int) -> Iterator[Tuned]:
    from attnreuse.kernels import capture as capture_kernel
    from attnreuse.kernels import configs, direct
    from attnreuse.kernels import reuse as reuse_kernel
    from attnreuse.kernels.backend import arch_of

    query, key, value = inputs(shape, torch.float16, device)
    out, arch, d = torch.empty_like(query), arch_of(device), shape[-1]
    slot = ops.capture(query, key, value, map_format=map_format, backend="triton")[1]
    workspace = torch.empty(direct.workspace_bytes(slot.shape, d), dtype=torch.uint8, device=device)
    for op in ("capture", "direct" if direct.serves(map_format) else "reuse"):
        about = {"op": op, "map_format": map_format.name, "head_dim": d}
        shipped = configs.choose(op, map_format.name, d, arch)
        launches, failed = {}, []
        for config in {shipped: None} | dict.fromkeys(configs.CANDIDATES):
            if op == "capture":
                given = (query, key, value, None, d**-0.5, slot, out, arch)
                launch = capture_kernel.launch(*given, config=config)
            elif op == "direct":
                quantise, launch = direct.launches(slot, value, out, workspace, arch, config=config)
                quantise.run()
            else:
                launch = reuse_kernel.launch(slot, value, out, arch, config=config)
            try:
                launch.run()
                written = ops.reuse(slot, value, backend="triton")
                worst = max(check(x, query, key, value) for x in (out, written))
                reason = "" if worst <= 2e-3 + map_format.error else f"wrong: relative error {worst:.1e}"
            except Exception as error:  # Triton raises its own kinds: out of resources, failed passes
                reason = str(error).splitlines()[0]
            if reason:
                failed.append(Tuned(**about, config=config, shipped=config == shipped, reason=reason))
            else:
                launches[config] = launch
        timed = interleaved([launch.run for launch in launches.values()], device, repeats)
        found = [
            Tuned(**about, config=config, shipped=config == shipped, times=times)
            for config, times in zip(launches, timed, strict=True)
        ]
        yield from [*sorted(found, key=lambda t: t.times.median), *failed]
