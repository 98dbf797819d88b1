"""CPU kernels: capture and reuse beside fused exact attention and a product with the ready map, then whole steps.

    python -m benchmarks.cpu

Everything is timed in turns, as checked by `attnreuse bench`; a copy's bandwidth and the rate of chained FMAs of
the same run are the roofline. Appends to `cpu_kernels.csv`, `cpu_ready_map.csv` and `cpu_steps.csv` in
`benchmarks/results`.
"""

import argparse
import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from gpu import UNETS, make_unet, measure_steps
from rows import RESULTS, append, provenance

import attnreuse
from attnreuse import native, ops
from attnreuse.measure.timing import interleaved
from attnreuse.study import bench

MEASURED = ["fp32", "fp16", "u8", "u7", "u4"]
SHAPES = bench.CPU_SHAPES | {
    name: shape for name, shape in bench.SHAPES.items() if name.startswith(("SD1.5", "SDXL 1024 self 4096"))
}


def with_ready_map(name: str, shape: bench.Shape, repeats: int) -> dict[str, object]:
    """Milliseconds of exact attention in fp32 and bf16, a product with the ready fp32 map, and reuse in each format."""
    query, key, value = bench.inputs(shape, torch.float32, torch.device("cpu"))
    maps = {f: ops.capture(query, key, value, map_format=f)[1] for f in MEASURED}
    ready, out = maps["fp32"].dense(), torch.empty_like(query)
    half = [x.bfloat16() for x in (query, key, value)]
    calls = {
        "sdpa": lambda: F.scaled_dot_product_attention(query, key, value),
        "sdpa bf16": lambda: F.scaled_dot_product_attention(*half),
        "bmm": lambda: ready @ value,
    }
    calls |= {f"reuse {f}": lambda f=f: ops.reuse(maps[f], value, out=out) for f in MEASURED}
    times = interleaved(list(calls.values()), torch.device("cpu"), repeats)
    found = {label: f"{1e3 * t.median:.3f}" for label, t in zip(calls, times, strict=True)}
    return {"shape": name, "backend": ops.backend_for("u8", torch.device("cpu"), torch.float32, shape[-1]), **found}


def measure_ops(out: Path, repeats: int, device: torch.device, about: dict[str, object]) -> None:
    """Every shape and format, one op at a time."""
    limits = bench.ceilings(device, torch.float32)
    rows, ready = [], []
    for name, shape in SHAPES.items():
        rows += bench.measure(name, shape, MEASURED, torch.float32, device, limits, repeats)
        ready.append(with_ready_map(name, shape, repeats))
        print(
            ready[-1],
            {(r.op, r.kind): round(1 / r.of_exact, 2) for r in rows[-2 * len(MEASURED) :] if r.of_exact},
            flush=True,
        )
    append(out / "cpu_kernels.csv", [row | about for row in bench.to_dicts(rows, limits)])
    append(out / "cpu_ready_map.csv", [row | about for row in ready])


def measure_models(out: Path, repeats: int, device: torch.device, about: dict[str, object]) -> None:
    """Whole steps of two UNets: stock, capturing, reusing."""
    steps = []
    shipped = UNet2DConditionModel.load_config(attnreuse.tiny_shapes_path(), subfolder="unet")
    tiny = {key: value for key, value in shipped.items() if not key.startswith("_")}
    larger = UNETS["SD1.5 512"] | {"sample_size": 32}
    for model, config, count in (("tiny-shapes", tiny, 6 * repeats), ("SD1.5 256", larger, repeats)):
        make = functools.partial(make_unet, config)
        steps += measure_steps(model, make, "u8", device, torch.float32, "eager", count)
    append(out / "cpu_steps.csv", [vars(row) | about for row in steps])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["all", "ops", "steps"], default="all")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    args = parser.parse_args()
    device = torch.device("cpu")
    about = provenance(device) | {"instructions": native.path() if native.PATHS else "torch"}
    for what, measure in (("ops", measure_ops), ("steps", measure_models)):
        if args.what in ("all", what):
            measure(args.out, args.repeats, device, about)


if __name__ == "__main__":
    main()
