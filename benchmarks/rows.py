"""Result files: rows are appended, each with commit, date, device and versions."""

import csv
import datetime
import os
import subprocess
from pathlib import Path

import torch

from attnreuse.measure.environment import PACKAGES, environment
from attnreuse.measure.timing import Times

RESULTS = Path(__file__).parent / "results"


def provenance(device: torch.device = torch.device("cpu")) -> dict[str, object]:  # noqa: B008 (immutable)
    """Date, commit (with "-dirty" where the tree differs; of no clone ``ATTNREUSE_COMMIT``), device and versions."""
    made = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    commit = os.environ.get("ATTNREUSE_COMMIT") or made.stdout.strip() or "unknown"
    about = {"date": datetime.date.today().isoformat(), "commit": commit}
    found = environment(device)
    versions = {name: found.pop(name, "") for name in PACKAGES}  # the same columns everywhere
    return about | found | versions


def ratios(seconds: list[float], full: list[float]) -> dict[str, str]:
    """Median, 20th and 80th percentile of what a method takes, as shares of the full run of the same round."""
    times = Times.of_ratios(seconds, full)
    return {"of_full": f"{times.median:.4f}", "p20": f"{times.p20:.4f}", "p80": f"{times.p80:.4f}"}


def has_rows(path: Path, **columns: object) -> bool:
    """Does the file hold a row with these values?"""
    if not path.exists():
        return False
    with path.open(newline="") as file:
        return any(all(row.get(k) == str(v) for k, v in columns.items()) for row in csv.DictReader(file))


def append(path: Path, rows: list[dict[str, object]]) -> None:
    """Add rows to a CSV file; its header is written once.

    Raises:
        ValueError: the file's columns are others.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    columns, new = list(rows[0]), not path.exists()
    if not new:
        with path.open(newline="") as file:
            held = next(csv.reader(file))
        if held != columns:
            raise ValueError(f"{path} has the columns {held}, the rows have {columns}: move it away")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)
