"""The low-rank truncation of a matrix in a metric, a step of the fits of several formats."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from qll.convert.metric import Factor
from qll.tn.lowrank import LowRank
from qll.tn.network import NetworkSpec


def truncated(
    matrix: Float[Tensor, "out into"], rank: int, left: Factor | None, right: Factor | None
) -> LowRank:
    """The matrix of `rank` nearest to `matrix` in the metric with these roots, gauge "none".

    >>> import torch
    >>> truncated(torch.diag(torch.tensor([2.0, 1.0])), 1, None, None).spec.ranks
    (1,)
    """
    seen = matrix
    if left is not None:
        seen = left.root[:, None] * seen if left.root.ndim == 1 else left.root.mT @ seen
    if right is not None:
        seen = seen * right.root if right.root.ndim == 1 else seen @ right.root
    network = LowRank.decompose(seen, NetworkSpec("lowrank", tuple(matrix.shape), (rank,)))
    return network.transform_legs(
        [None if left is None else left.inverse_transposed],
        [None if right is None else right.inverse],
    )
