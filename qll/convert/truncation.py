"""Two steps that the fits of several formats share: truncate in a metric, weigh an error by it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from qll.convert.metric import Factor, Metric
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


def weighed(error: Float[Tensor, "out into"], metric: Metric) -> Float[Tensor, "out into"]:
    """G_out error G_in: half the gradient of the squared metric error.

    >>> import torch
    >>> weighed(torch.ones(1, 2), Metric("kfac", right=torch.tensor([1.0, 2.0]))).tolist()
    [[1.0, 2.0]]
    """
    if metric.left is not None:
        left = metric.left
        error = left[:, None] * error if left.ndim == 1 else left @ error
    if metric.right is not None:
        right = metric.right
        error = error * right if right.ndim == 1 else error @ right
    return error
