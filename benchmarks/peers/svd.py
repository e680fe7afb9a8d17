"""Truncated SVD of the weight (Eckart-Young): no calibration."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from benchmarks.peers.case import Replacement, pair_params, pair_rank, stored, weight_by_weight


def truncate(weight: Float64[Tensor, "out into"], moments: object, keep: float) -> Replacement:
    """The nearest matrix of the rank that `keep` pays for, in the Frobenius norm."""
    rank = pair_rank(weight.shape, keep)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    matrix = (left[:, :rank] * values[:rank]) @ right[:rank]
    return stored(matrix, pair_params(weight.shape, rank))


convert = weight_by_weight(truncate)
