"""Critical bond dimension: the least rank of a matrix at which it still answers a direction.

W is cut by its singular values in a metric, W_chi = L^-T U_chi S_chi V_chi^T R^-1 with L^T W R =
U S V^T, so the cuts are nested and rho (see `read_write`) at every rank follows from one
factorisation: with c_k what component k answers, the error at rank chi is the sum of the components
behind it, and its square a running sum. `critical_bond` is the least rank from which on rho stays
at `KEPT` or above: in a metric other than the plain one rho need not rise with every rank.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qll.convert.metric import Factor, Metric, factor
from qll.lens.survival import KEPT
from qll.tn.svd import truncated_svd

# directions whose rho at every rank is held at a time
CHUNK = 2048


class NestedCuts:
    """The cuts of one matrix [out, in] at every rank, in a metric.

    >>> cuts = NestedCuts(torch.diag(torch.tensor([3.0, 2.0, 1.0])), Metric("plain"))
    >>> [round(value, 6) for value in cuts.survival(torch.ones(1, 3), "read")[0].tolist()]
    [0.0, 0.642857, 0.928571, 1.0]
    >>> cuts.critical_bond(torch.eye(3), "write").tolist()
    [1, 2, 3]
    """

    def __init__(self, matrix: Float[Tensor, "out into"], metric: Metric) -> None:
        matrix = matrix.double()
        left, right = (
            None if part is None else factor(part) for part in (metric.left, metric.right)
        )
        seen = matrix if left is None else _times(_turned(left.root), matrix)
        seen = seen if right is None else _times(_turned(right.root), seen.mT).mT
        found = truncated_svd(seen)
        size = found.s.sqrt()
        self.out = _unseen(left, found.u.double() * size)
        """Columns L^-T u_k sqrt(s_k)."""
        self.into = _unseen(right, found.vh.mT.double() * size)
        """Columns R^-T v_k sqrt(s_k)."""

    def survival(
        self, directions: Float[Tensor, "n width"], side: Literal["read", "write"]
    ) -> Float[Tensor, "n cuts"]:
        """rho at rank 0, 1, ... full, float64; NaN where the matrix answers nothing.

        directions: what W is multiplied with, norm gains included (read), or W^T (write).
        """
        asked, answered = (self.into, self.out) if side == "read" else (self.out, self.into)
        parts = directions.double() @ asked
        gram = answered.mT @ answered
        # |sum_{k >= chi} c_k u_k|^2 grows by c_chi^2 G_chi,chi + 2 c_chi sum_{k > chi} G_chi,k c_k
        behind = parts @ torch.triu(gram, 1).mT
        steps = parts * (parts * gram.diagonal() + 2 * behind)
        errors = steps.flip(1).cumsum(1).flip(1).clamp(min=0)
        errors = torch.cat([errors, errors.new_zeros(len(errors), 1)], dim=1)
        whole = errors[:, :1]
        return torch.where(whole > 0, 1 - errors / whole, torch.nan)

    def critical_bond(
        self, directions: Float[Tensor, "n width"], side: Literal["read", "write"]
    ) -> Int[Tensor, " n"]:
        """The least rank from which on rho is at least KEPT; -1 where nothing is answered."""
        found = []
        for chunk in directions.split(CHUNK):
            rho = self.survival(chunk, side)
            below = (rho < KEPT).long() * torch.arange(1, rho.shape[1] + 1)
            found.append(below.amax(dim=1).masked_fill(rho[:, 0].isnan(), -1))
        return torch.cat(found)


def rank_at(keep: float, out: int, into: int) -> int:
    """The rank of an interpolative low-rank network with `keep` of the numbers of the matrix.

    It stores r (out + in - r) numbers and r pivots; 0 where not even one fits. A matrix kept whole
    is stored as it is.

    >>> rank_at(1.0, 4, 4), rank_at(0.9, 4, 4), rank_at(0.5, 4, 4)
    (4, 2, 1)
    """
    if keep >= 1:
        return min(out, into)
    ranks = torch.arange(min(out, into) + 1)
    fits = ranks * (out + into - ranks) + ranks <= keep * out * into
    return int(ranks[fits].max())


def _turned(root: Tensor) -> Tensor:
    return root if root.ndim == 1 else root.mT


def _times(root: Tensor, matrix: Tensor) -> Tensor:
    return root[:, None] * matrix if root.ndim == 1 else root @ matrix


def _unseen(root: Factor | None, columns: Tensor) -> Tensor:
    return columns if root is None else _times(root.inverse_transposed, columns)
