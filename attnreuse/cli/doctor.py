"""`attnreuse doctor`: what is installed, and what serves which map format."""

from __future__ import annotations

import itertools
import json
from typing import Any

from rich import box
from rich.table import Table

from attnreuse.cli.console import faint, out
from attnreuse.cli.inputs import default_dtype
from attnreuse.cli.options import AsJson

EXAMPLES = "    attnreuse doctor\n\n    attnreuse doctor --json"
EXTRAS = {"eval": ("DeepCache", "scipy", "tomesd", "torchmetrics"), "plot": ("jinja2", "matplotlib"), "ray": ("ray",)}


def command(as_json: AsJson = False) -> None:
    """Tell what is installed, and which backend serves which map format here, and why."""
    import torch

    from attnreuse import native, ops
    from attnreuse.maps.formats import FORMATS
    from attnreuse.measure.environment import default_device, environment, package_version

    facts: dict[str, Any] = dict(environment(default_device()))
    facts["cuda"] = torch.version.cuda if torch.cuda.is_available() else "no CUDA device"
    facts["extension"] = native.INFO
    remedies = []
    for extra, packages in EXTRAS.items():
        missing = ", ".join(name for name in packages if package_version(name) is None)
        facts[f"extra {extra}"] = f"missing: {missing}" if missing else "installed"
        remedies += [f"pip install 'attnreuse[{extra}]' brings {missing}"] * bool(missing)
    if package_version("torchvision") is not None:
        facts["torchvision"], remedy = _torchvision()
        remedies += [remedy] * bool(remedy)
    devices = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
    reasons: dict[str, list[str]] = {}  # why not, to "format on device"
    for device, name in itertools.product(devices, FORMATS):
        dtype = default_dtype(device)
        facts[f"{name} maps on {device.type}"] = ops.backend_for(name, device, dtype, 64)
        for backend, why in ops.unserved_reasons(name, device, dtype, 64).items():
            reasons.setdefault(f"{backend}: {why}", []).append(f"{name} on {device.type}")
    for name, named in ops.NAMED.items():
        reason = named.unserved(FORMATS["u8"], devices[-1], torch.float16, 64)
        facts[f"reuse by the {name} kernel"] = reason or "u8 and u4 maps of fp16 tensors, where it is named"
    verdict = _verdict(devices[-1], facts[f"u8 maps on {devices[-1].type}"])
    if as_json:
        print(json.dumps(facts | {"not used": reasons, "remedies": remedies, "verdict": verdict}, indent=2))
        return
    table = Table(show_header=False, box=box.SIMPLE, pad_edge=False)
    for key, value in facts.items():
        table.add_row(key, str(value))
    out.print(table)
    for why, formats in reasons.items():
        faint(f"{why} (not used for {', '.join(formats)})")
    for remedy in remedies:
        out.print(remedy, soft_wrap=True)
    out.print(verdict)


def _torchvision() -> tuple[str, str | None]:
    """Its version, or why it does not load, and the remedy: transformers, and so every pipeline, fails beside that."""
    try:
        import torchvision
    except Exception as error:  # whatever a library of another build raises
        remedy = "pip uninstall torchvision: pipelines fail beside one that was built for another torch"
        return f"does not load with this torch: {error}", remedy
    return str(torchvision.__version__), None


def _verdict(device: Any, backend: str) -> str:
    """What serves the default maps here, and what that is worth."""
    from attnreuse import native

    if backend == "torch":
        return (
            f"On this {device.type} device maps go through plain torch: everything works, and reuse is slow. "
            "A C++ compiler at installation gives the CPU kernels."
        )
    used = f"the compiled extension ({native.path()})" if backend == "native" else f"the {backend} kernels"
    return f"On this {device.type} device u8 maps go through {used}. `attnreuse bench` tells how fast."
