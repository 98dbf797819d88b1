"""Memory of the map against latency, in units of exact attention's, a panel per shape.

pytest benchmarks --benchmark-only --benchmark-json ops.json && python -m benchmarks.plot ops.json [plot.png]
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any


def plot(rows: list[dict[str, Any]], device: str, path: Path) -> None:
    """Draw `rows`: shape, op, kind, backend, map_bytes and median_s of each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shapes: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        shapes[row["shape"]].append(row)
    figure, axes = plt.subplots(
        1, len(shapes), figsize=(3.4 * len(shapes), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (shape, of_shape) in zip(axes[0], shapes.items(), strict=True):
        exact = min(row["median_s"] for row in of_shape if row["op"] == "exact")
        series: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        for row in of_shape:
            if row["op"] != "exact":
                series[row["op"], row["backend"]].append(row)
        for (op, backend), points in series.items():
            at = [(row["map_bytes"] / 2**20, row["median_s"] / exact) for row in points]
            axis.plot(*zip(*at, strict=True), "^" if op == "capture" else "o", label=f"{op}, {backend}")
            for row, point in zip(points, at, strict=True):
                axis.annotate(row["kind"], point, (4, 4), textcoords="offset points", fontsize=8)
        axis.axhline(1.0, color="gray", linewidth=1, linestyle="--")
        axis.set(xlabel="map, MiB", xscale="log")
        axis.set_title(shape, fontsize=9)
        axis.margins(x=0.25)
    axes[0][0].set_ylabel("time over exact attention's")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(device, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(source: str, target: str = "") -> None:
    found = json.loads(Path(source).read_text())["benchmarks"]
    rows = [bench["extra_info"] | {"median_s": bench["stats"]["median"]} for bench in found]
    path = Path(target or Path(source).with_suffix(".png"))
    plot(rows, rows[0]["device"], path)
    print(path)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
