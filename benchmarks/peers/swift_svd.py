"""Swift-SVD (arXiv 2604.01609): the optimum of SVD-LLM from the second moment of the outputs.

C = sum y y^T = W G W^T; with V the eigenvectors of its r largest eigenvalues W~ = V V^T W. No root
of G is needed, so a singular G is no trouble, and one decomposition serves every rank. Ranks are
uniform: its allocation among layers is left out.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from benchmarks.peers.case import Replacement, matrix_by_matrix, pair_params, pair_rank, stored
from qll.calibrate import LinearMoments


def output_directions(
    weight: Float64[Tensor, "out into"], moment: Float64[Tensor, "into into"], rank: int
) -> Float64[Tensor, "out r"]:
    """Orthonormal directions of the outputs, the strongest last."""
    covariance = weight @ moment @ weight.T
    return torch.linalg.eigh((covariance + covariance.T) / 2).eigenvectors[:, -rank:]


def truncate(
    weight: Float64[Tensor, "out into"], moments: LinearMoments, keep: float
) -> Replacement:
    """The outputs projected onto their strongest directions."""
    rank = min(pair_rank(weight.shape, keep), *weight.shape)
    directions = output_directions(weight, moments.input, rank)
    return stored(directions @ (directions.T @ weight), pair_params(weight.shape, rank))


convert = matrix_by_matrix(truncate)
