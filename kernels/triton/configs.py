"""Launch configurations. Chosen without a GPU, by what the compiler makes of them: nobody has measured any.

Three or four stages wherever they fit: the copies of a block are then on their way while the one before is multiplied;
with two, a loop waits for the copies that it has just issued (``python -m benchmarks.compile`` reads that off the
compiler's IR, rows in ``benchmarks/results/compile.csv``). No register spills. ``attnreuse bench --tune`` times these,
and others, on the device at hand.
"""

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Query rows per program, warps, pipeline stages, and a cap on registers per thread."""

    block_m: int
    warps: int
    stages: int
    registers: int | None = None


@dataclass(frozen=True)
class Rule:
    """`config` for an op on some architectures, up to a head dim; `plain`: only for calls that are."""

    op: str
    archs: tuple[str, ...]
    head_dim: int
    config: Config
    formats: tuple[str, ...] = ("fp16", "bf16", "u8", "u7", "u4")
    plain: bool = False


BYTES = ("u8", "u7", "u4")  # formats of small codes
HALVES = ("fp16", "bf16")

# The first rule that fits. "89" stands for every architecture with 99 KB of shared memory, "100" for those
# with tensor memory. Two stages are the least: with one, tiles pass through registers, which then spill.
RULES = (
    # Below 129 registers two programs of 8 warps share a multiprocessor: their loads and products overlap.
    Rule("reuse", ("90",), 64, Config(128, 8, 3, 128), plain=True),
    Rule("reuse", ("90",), 160, Config(128, 8, 3)),
    Rule("reuse", ("80",), 128, Config(128, 8, 3)),
    Rule("reuse", ("80",), 160, Config(128, 8, 2), formats=(*HALVES, "u8")),  # three stages spill
    Rule("reuse", ("89",), 128, Config(128, 8, 3), formats=BYTES),
    Rule("reuse", ("89",), 128, Config(64, 4, 3)),
    Rule("reuse", ("80", "89"), 160, Config(16, 2, 2)),  # larger tiles spill
    Rule("reuse", ("100",), 64, Config(128, 8, 3)),
    Rule("reuse", ("100",), 72, Config(128, 8, 2), formats=HALVES),  # with three stages Triton 3.6 spills
    Rule("reuse", ("100",), 80, Config(128, 8, 3)),
    Rule("reuse", ("100",), 96, Config(128, 8, 2)),
    Rule("reuse", ("100",), 160, Config(64, 4, 2), formats=("u4",)),  # of larger tiles Triton 3.6 makes an empty kernel
    Rule("reuse", ("100",), 160, Config(128, 8, 2)),
    # Nothing is decoded, so registers and shared memory leave room for a fourth stage.
    Rule("direct", ("80", "90", "100"), 160, Config(128, 8, 4)),
    Rule("direct", ("89",), 160, Config(128, 8, 3)),
    # Keys and values are read once per 128 rows instead of 64, where the tiles of three stages fit.
    Rule("capture", ("80", "90"), 96, Config(128, 8, 3)),
    Rule("capture", ("90",), 128, Config(64, 4, 3)),
    Rule("capture", ("80",), 128, Config(64, 4, 3), formats=("u8", "u4")),
    Rule("capture", ("80",), 128, Config(128, 8, 2)),  # three stages spill, or do not fit
    Rule("capture", ("90",), 160, Config(128, 8, 2), formats=BYTES),  # keys and values of three stages take 240 KB
    Rule("capture", ("90",), 160, Config(64, 4, 2)),
    Rule("capture", ("80",), 160, Config(64, 4, 2), formats=HALVES, plain=True),
    Rule("capture", ("89",), 64, Config(128, 8, 2)),
    Rule("capture", ("89",), 72, Config(16, 2, 2), formats=("u7",)),  # larger tiles spill
    Rule("capture", ("89",), 96, Config(128, 8, 2), formats=("u8", "u4")),
    Rule("capture", ("89",), 128, Config(32, 4, 2)),
    Rule("capture", ("80", "89"), 160, Config(16, 2, 2)),  # larger tiles spill
    # Tensor memory is read by four warps' rows: 8 warps share them, which costs, but nothing else does not spill.
    Rule("capture", ("100",), 80, Config(128, 8, 2), plain=True),
    Rule("capture", ("100",), 96, Config(64, 8, 2), formats=BYTES, plain=True),
    Rule("capture", ("100",), 128, Config(128, 8, 2), plain=True),
    Rule("capture", ("100",), 128, Config(64, 8, 2)),
    Rule("capture", ("100",), 160, Config(64, 8, 3)),
)

CANDIDATES = tuple(
    Config(block_m, warps, stages, registers)
    for block_m, warps in ((128, 8), (128, 4), (64, 4), (64, 8))
    for stages in (2, 3, 4)
    for registers in (None, 128)
)  # of `attnreuse bench --tune`


@functools.cache
def choose(op: str, map_format: str, head_dim: int, arch: int, plain: bool = True) -> Config:
    """Configuration of `op` ("capture", "reuse" or "direct") for a head dim of at most 160.

    Args:
        map_format: its name.
        arch: compute capability, 90 for 9.0.
        plain: nothing that takes more registers: no mask, N a multiple of the key block; to reuse, values in fp16.
    """
    kind = "89" if arch in (86, 87, 89) or arch >= 110 else "80" if arch < 90 else "90" if arch < 100 else "100"
    return next(
        rule.config
        for rule in RULES
        if rule.op == op
        and kind in rule.archs
        and head_dim <= rule.head_dim
        and map_format in rule.formats
        and (plain or not rule.plain)
    )
