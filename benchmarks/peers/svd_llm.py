"""SVD-LLM (Wang et al. 2024, arXiv 2403.07378), version 1: truncation-aware whitening.

G = sum x x^T = S S^T (Cholesky); the SVD of W S is truncated and S undone, W~ = U_r s_r V_r^T S^-1.
Then the truncated singular values are the output error: ||(W - W~) X||_F^2 = sum_{i>r} s_i^2. Same
rank everywhere for matrices of a shape; no fine-tuning; one calibration pass on the dense model.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from benchmarks.peers.case import (
    Replacement,
    cholesky,
    matrix_by_matrix,
    pair_params,
    pair_rank,
    stored,
)
from qll.calibrate import LinearMoments


def whitened(
    weight: Float64[Tensor, "out into"], moment: Float64[Tensor, "into into"], rank: int
) -> tuple[Float64[Tensor, "out r"], Float64[Tensor, "r into"], Float64[Tensor, "_"]]:
    """(A, B, s): the two factors of the approximation and all singular values of W S."""
    root = cholesky(moment)
    left, values, right = torch.linalg.svd(weight @ root, full_matrices=False)
    share = values[:rank].sqrt()
    undone = torch.linalg.solve_triangular(root, right[:rank], upper=False, left=False)
    return left[:, :rank] * share, share[:, None] * undone, values


def truncate(
    weight: Float64[Tensor, "out into"], moments: LinearMoments, keep: float
) -> Replacement:
    """The matrix of the rank that `keep` pays for with the least output error."""
    rank = pair_rank(weight.shape, keep)
    left, right, _ = whitened(weight, moments.input, rank)
    return stored(left @ right, pair_params(weight.shape, rank))


convert = matrix_by_matrix(truncate)
