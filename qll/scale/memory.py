"""How much memory one job takes, in closed form."""

from __future__ import annotations

from transformers import LlamaConfig

from qll.convert.units import linear_shapes
from qll.options import ConvertOptions

FLOAT64 = 8
PROCESS_BYTES = 450 << 20  # Python with torch and transformers, measured
# square matrices of the largest leg that are alive at once while it is factored: the moment as read
# and as shrunk, its root and inverse, and what the library works in
SQUARES = 5
# copies of the largest matrix alive at once: as read, whitened, factored, and its network
COPIES = 4


def job_bytes(config: LlamaConfig, options: ConvertOptions) -> int:
    """Peak memory of a worker process, in bytes: of the job that plans a block, the largest one.

    It holds the block's weights and second moments in float64, and what is made of the largest.

    >>> job_bytes(LlamaConfig(hidden_size=64, intermediate_size=128, num_attention_heads=4),
    ...           ConvertOptions()) < 600e6
    True
    """
    shapes = list(linear_shapes(config).values())
    outs, ins = [out for out, _ in shapes], [into for _, into in shapes]
    legs = {"plain": [], "activation": ins, "kfac": ins + outs}[options.metric]
    held = sum(out * into for out, into in shapes) + sum(leg**2 for leg in legs)
    working = COPIES * max(out * into for out, into in shapes) + SQUARES * max(legs, default=0) ** 2
    return PROCESS_BYTES + FLOAT64 * (held + working)
