"""Launch configurations, chosen by evidence: ``benchmarks/results/compile.csv`` (registers, spills, shared memory).

Rules behind the table: 128 query rows on 8 warps keep both accumulators in registers; 4 warps on
128 rows spill in capture; where a head needs more than 96 accumulator columns, capture takes 64 rows
on 4 warps. Stages fill the shared memory the architecture has (227 KB on 9.0 and 10.0, 163 KB on
8.0, 99 KB on 8.6 and 8.9).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Query rows per program, warps, pipeline stages, and a cap on registers per thread."""

    block_m: int
    warps: int
    stages: int
    registers: int | None = None


def choose(op: str, map_format: str, head_dim: int, arch: int) -> Config:
    """Configuration of `op` ("capture" or "reuse") for a map format and head dim.

    Args:
        arch: compute capability, 90 for 9.0.
    """
    small = arch in (86, 87, 89) or arch >= 110  # 99 KB of shared memory
    if op == "capture":
        if head_dim > (64 if small else 128):
            return Config(64, 4, 1 if small else 2)
        return Config(128, 8, 2)
    if head_dim > 96:
        return Config(64 if small else 128, 4 if small else 8, 2)
    return Config(128, 8, 2 if small else 3)
