"""How much memory one job takes, in closed form."""

from __future__ import annotations

from qll.scale.shapes import Shape

FLOAT64 = 8
PROCESS_BYTES = 500 << 20  # Python with torch and transformers, measured
# the widest second moment, and again while it is shrunk, put in order or inverted
SQUARES = 2
# the matrices of an MLP, or of one its image, error and network
COPIES = 6


def job_bytes(shape: Shape, metric: str) -> int:
    """Peak memory of a worker process, in bytes: of the job that plans a block, the largest one.

    One unit of the block is in memory at a time, in float64; the largest is the MLP.

    >>> from qll.scale.shapes import SHAPES
    >>> job_bytes(SHAPES["tiny"], "kfac") < 600e6
    True
    >>> job_bytes(SHAPES["llama3-8b"], "kfac") / 1e9 < 7
    True
    """
    sides = shape.linears.values()
    legs = {"plain": [], "activation": [into for _, into in sides], "kfac": sum(sides, ())}[metric]
    matrices = COPIES * max(out * into for out, into in sides)
    squares = SQUARES * max(legs, default=0) ** 2
    return PROCESS_BYTES + FLOAT64 * (matrices + squares)
