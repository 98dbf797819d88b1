"""Public path of :mod:`attnreuse.study.bench` and :mod:`attnreuse.study.tuning`."""

from attnreuse.study.bench import (
    CPU_SHAPES,
    SHAPES,
    Ceilings,
    Row,
    Shape,
    ceilings,
    check,
    exact_kinds,
    inputs,
    measure,
    to_dicts,
)
from attnreuse.study.tuning import tune

__all__ = [
    "CPU_SHAPES", "SHAPES", "Ceilings", "Row", "Shape", "ceilings", "check", "exact_kinds", "inputs", "measure",
    "to_dicts", "tune",
]  # fmt: skip
