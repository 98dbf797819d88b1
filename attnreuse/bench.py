"""Public path of :mod:`attnreuse.study.bench`."""

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
    tune,
)

__all__ = [
    "CPU_SHAPES", "SHAPES", "Ceilings", "Row", "Shape", "ceilings", "check", "exact_kinds", "inputs", "measure",
    "to_dicts", "tune",
]  # fmt: skip
