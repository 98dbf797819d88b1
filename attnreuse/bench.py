"""Public path of :mod:`attnreuse.study.bench`."""

from attnreuse.study.bench import CPU_SHAPES, SHAPES, Ceilings, Row, ceilings, check, inputs, measure, to_dicts

__all__ = ["CPU_SHAPES", "SHAPES", "Ceilings", "Row", "ceilings", "check", "inputs", "measure", "to_dicts"]
