"""Low rank in a metric without a root of the long side's moment.

The whitened matrix M = L_out^T W L_in has the singular vectors of M M^T = L_out^T (W G_in W^T)
L_out, which is as small as the short side and needs only G_in itself. With its first r eigenvectors
U the best W~ of rank r is L_out^-T U U^T L_out^T W: L_in cancels. So a down projection of 4096 x
14336 costs two products and an eigenproblem of 4096; a Cholesky factor of 14336, its inverse and
the whitened matrix are never made. A tall matrix is treated as its transpose.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from qll.convert.metric import Metric, root_of
from qll.tn.lowrank import LowRank
from qll.tn.network import NetworkSpec
from qll.tn.svd import discarded_weight
from qll.tn.symmetric import eigenvalues_descending, eigh_descending, symmetric_product

SMALLEST = 64  # shorter sides go straight to the singular value decomposition
# Rounding of the squares, 1e-16 of the largest, mixes directions of singular values below 1e-8 of
# the largest. That is nothing beside a truncation error of 1e-5, and nothing in a kept space whose
# smallest value is above 1e-4.
KEPT_FLOOR, LOST_FLOOR = 1e-4, 1e-10
VALUE_FLOOR = 1e-6
TRUSTED_FROM = 1024  # a rank that small values would change does not matter from this side on


def short_spectrum(
    weight: Float[Tensor, "out into"], metric: Metric
) -> Float64[Tensor, "_"] | None:
    """The singular values of the weight in the metric, descending; None where rounding of their
    squares would show, or for a matrix too small to gain.

    >>> from qll.convert.metric import plain
    >>> short_spectrum(torch.eye(64), plain())[:2].tolist()
    [1.0, 1.0]
    """
    if min(weight.shape) < SMALLEST:
        return None
    values = eigenvalues_descending(_gram(weight, metric)[0]).clamp(min=0).sqrt()
    if min(weight.shape) < TRUSTED_FROM and values[-1] <= VALUE_FLOOR * values[0]:
        return None
    return values


def short_truncation(
    weight: Float[Tensor, "out into"], rank: int, metric: Metric
) -> tuple[LowRank, float, float] | None:
    """(best network of `rank`, discarded weight, squared norm of the weight), all in the metric.

    Gauge "none". None where `short_spectrum` would be None for this rank.

    >>> from qll.convert.metric import plain
    >>> network, lost, total = short_truncation(torch.diag(torch.arange(1.0, 65)), 32, plain())
    >>> network.spec.ranks, round(lost * total), round(total)
    ((32,), 11440, 89440)
    """
    if min(weight.shape) < SMALLEST or rank > min(weight.shape):
        return None
    gram, image, root = _gram(weight, metric)
    squares, vectors = eigh_descending(gram)
    values = squares.clamp(min=0).sqrt()
    lost = discarded_weight(values, rank)
    if values[rank - 1] <= KEPT_FLOOR * values[0] and lost <= LOST_FLOOR:
        return None
    kept = vectors[:, :rank]
    outer, inner = _back(root, kept), kept.mT @ image
    is_wide = weight.shape[0] <= weight.shape[1]
    cores = (outer, inner) if is_wide else (inner.mT.contiguous(), outer.mT.contiguous())
    spec = NetworkSpec("lowrank", tuple(weight.shape), (rank,))
    return LowRank(spec, cores), lost, float(values.flip(0).square().sum())


def _gram(weight: Tensor, metric: Metric) -> tuple[Tensor, Tensor, Tensor | None]:
    """(M M^T, L^T W, L) in float64, of the wide orientation; L is the root of its short side."""
    is_wide = weight.shape[0] <= weight.shape[1]
    wide = (weight if is_wide else weight.mT).to(torch.float64)
    short, long = (metric.left, metric.right) if is_wide else (metric.right, metric.left)
    root = None if short is None else root_of(short)
    image = wide if root is None else _times(root, wide)
    seen = image if long is None else image * long if long.ndim == 1 else image @ long
    return symmetric_product(image.mT, seen.mT), image, root


def _times(root: Tensor, matrix: Tensor) -> Tensor:
    """L^T matrix."""
    return root[:, None] * matrix if root.ndim == 1 else root.mT @ matrix


def _back(root: Tensor | None, vectors: Tensor) -> Tensor:
    """L^-T vectors."""
    if root is None:
        return vectors
    if root.ndim == 1:
        return vectors / root[:, None]
    if _is_lower(root):
        return torch.linalg.solve_triangular(root.mT, vectors, upper=True)
    return torch.linalg.solve(root.mT, vectors)


def _is_lower(root: Tensor) -> bool:
    """Whether the root is a Cholesky factor: of a singular moment it is made of eigenvectors."""
    return not bool(torch.count_nonzero(root.triu(1)))
