"""Public path of :mod:`attnreuse.study.analysis` and :mod:`attnreuse.study.findings`."""

from attnreuse.study.analysis import analyze, distance, drift, growth, staleness
from attnreuse.study.findings import (
    Analysis,
    Drift,
    Growth,
    Prediction,
    Staleness,
    best_predicted,
    measured_error,
    predict,
)

__all__ = [
    "Analysis", "Drift", "Growth", "Prediction", "Staleness", "analyze", "best_predicted", "distance", "drift",
    "growth", "measured_error", "predict", "staleness",
]  # fmt: skip
