"""SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774): unstructured pruning, uniform sparsity.

Stored as the values kept and one bit per entry, 32 of which count as one number. Inputs are those
of the model as it is pruned so far, as in the published code.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float64
from torch import Tensor

from benchmarks.peers.case import (
    PANEL,
    Replacement,
    damped_hessian,
    inverse_root,
    stored,
)
from benchmarks.peers.stream import on_the_stream
from qll.calibrate import LinearMoments
from qll.tn.sparse import WORD


def pruned(weight: Float64[Tensor, "out into"], moments: LinearMoments, keep: float) -> Replacement:
    """Panels of columns from the left: mask the panel's cheapest entries, spread their errors.

    With H = mean x x^T + damping and U the upper Cholesky factor of H^-1, an entry costs
    (w / U_jj)^2, and w / U_jj times row j of U is taken from the later columns (algorithm 1).
    """
    upper = inverse_root(damped_hessian(moments))
    work, words = weight.clone(), math.ceil(weight.numel() / WORD)
    share = (keep * weight.numel() - words) / weight.numel()
    kept = 0
    for start in range(0, weight.shape[1], PANEL):
        stop = min(start + PANEL, weight.shape[1])
        scores = (work[:, start:stop] / upper.diagonal()[start:stop]).square()
        # of all columns so far, so that rounding down does not add up
        wanted = int(share * weight[:, :stop].numel()) - kept
        mask = torch.zeros(scores.shape, dtype=torch.bool)
        mask.view(-1)[scores.flatten().topk(wanted).indices] = True
        kept += wanted
        errors = torch.zeros_like(scores)
        for column in range(start, stop):
            lost = work[:, column] * ~mask[:, column - start]
            error = lost / upper[column, column]
            work[:, column + 1 : stop] -= error[:, None] * upper[column, column + 1 : stop]
            work[:, column] -= lost
            errors[:, column - start] = error
        work[:, stop:] -= errors @ upper[start:stop, stop:]
    return stored(work, kept + words)


convert = on_the_stream(pruned)
