"""How much memory one job takes, in closed form."""

from __future__ import annotations

from qll.scale.shapes import Shape

FLOAT64 = 8
PROCESS_BYTES = 450 << 20  # Python with torch and transformers, measured
# square matrices of the largest leg alive at once beside those held: a moment
# as read, its root, and the inverse of that
SQUARES = 3
# copies of the largest matrix alive at once: as read, whitened, factored, and its network
COPIES = 4


def job_bytes(shape: Shape, metric: str) -> int:
    """Peak memory of a worker process, in bytes: of the job that plans a block, the largest one.

    It holds the block's weights and second moments in float64, and what is made of the largest.

    >>> from qll.scale.shapes import SHAPES
    >>> job_bytes(SHAPES["tiny"], "kfac") < 500e6
    True
    """
    sides = list(shape.linears.values())
    ins, outs = [into for _, into in sides], [out for out, _ in sides]
    legs = {"plain": [], "activation": ins, "kfac": ins + outs}[metric]
    held = shape.block_params + sum(leg**2 for leg in legs)
    working = COPIES * max(out * into for out, into in sides) + SQUARES * max(legs, default=0) ** 2
    return PROCESS_BYTES + FLOAT64 * (held + working)
