"""Which inputs of a matrix can go when the others make up for them: elimination in a metric.

W [out, n] acts on vectors h of second moment C. Without the inputs outside S the best is
W' = W C[:, S] C[S, S]^-1, which predicts the missing inputs from the kept ones (Nystrom). Taking
inputs away one after another, the loss grows by |a_j|^2 / P_jj, where a_j is column j of W' and P
the inverse of C[S, S], both of the inputs still there (Optimal Brain Surgeon, Hassibi and Stork
1993, eq. 5, for a column instead of one weight). The cheapest go first, SHARE of all at a time; the
losses are exact for the order that results, so one elimination serves every number of inputs.

>>> matrix, moment = torch.tensor([[1.0, 1.0, 3.0]]).double(), torch.eye(3).double()
>>> moment[0, 1] = moment[1, 0] = 0.9
>>> found = eliminate(matrix, moment)
>>> found.kept(2).tolist(), [round(value, 2) for value in found.losses.tolist()]
([1, 2], [0.0, 0.19, 3.8, 12.8])
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from qll.errors import ConvergenceError

SHARE = 1 / 64
_PANEL = 2048  # kept inputs whose rows of a moment are copied at a time
CROWDED = 0.8  # share of inputs still there at which those that are gone are left out


@dataclass(frozen=True)
class Elimination:
    """Inputs in the order they go, and what the output loses with each."""

    order: Int64[Tensor, "n"]
    residuals: Float64[Tensor, "n out"]
    """Row t: the part of W that goes with input order[t]. The rows add up, as sum r r^T, to
    W C W^T; those after the first t to the Gram matrix of the best W' without t inputs."""

    @property
    def losses(self) -> Float64[Tensor, "_"]:
        """Squared error in the metric without the first 0, 1, .., n inputs."""
        growing = self.residuals.square().sum(1).cumsum(0)
        return torch.cat([growing.new_zeros(1), growing])

    def kept(self, count: int) -> Int64[Tensor, " count"]:
        """The `count` inputs that stay longest, ascending."""
        return self.order[len(self.order) - count :].sort().values

    def gram(self, count: int) -> Float64[Tensor, "out out"]:
        """W' C[S, S] W'^T of the best W' with `count` inputs."""
        rest = self.residuals[len(self.order) - count :]
        return rest.mT @ rest


def eliminate(
    matrix: Float[Tensor, "out n"], moment: Float[Tensor, "n n"] | None = None
) -> Elimination:
    """All n inputs of `matrix` in the order they can best be spared; `moment` None: the identity.

    Computed in float64 on the CPU. Raises ConvergenceError for a moment that is not positive
    definite.
    """
    columns = matrix.detach().to("cpu", torch.float64)
    if moment is None:
        order = columns.square().sum(0).argsort(stable=True)
        return Elimination(order, columns[:, order].mT.contiguous())
    columns, precision = columns.clone(), _inverse(moment.to("cpu", torch.float64))
    del moment  # of use no more, and large: given back if the caller has not kept it
    inputs = torch.arange(columns.shape[1])
    batch = max(1, math.ceil(SHARE * len(inputs)))
    alive = torch.ones(len(inputs), dtype=torch.bool)
    gone, residuals = [], []
    while alive.any():
        costs = columns.square().sum(0) / precision.diagonal()
        order = costs.where(alive, math.inf).argsort(stable=True)
        first = order[: min(batch, int(alive.sum()))]
        # P[first, first] = L L^T; the columns of L are the steps one after another
        root = _root(precision[first][:, first])
        steps = _solve(root, columns[:, first].mT)
        cross = _solve(root, precision[first])
        gone.append(inputs[first])
        residuals.append(steps)
        columns.addmm_(steps.mT, cross, alpha=-1)
        precision.addmm_(cross.mT, cross, alpha=-1)
        alive[first] = False
        # those that are gone are zeros by now; copying the rest each time would cost more
        if int(alive.sum()) <= CROWDED * len(alive):
            rest = alive.nonzero()[:, 0]
            columns, precision = columns[:, rest], precision[rest[:, None], rest]
            inputs, alive = inputs[rest], alive[rest]
    return Elimination(torch.cat(gone), torch.cat(residuals))


def regression(
    matrix: Float64[Tensor, "out n"],
    moment: Float64[Tensor, "n n"] | None,
    kept: Int[Tensor, " k"],
) -> Float64[Tensor, "out k"]:
    """W' = W C[:, S] C[S, S]^-1: the columns `kept` of W, the others predicted from them.

    Raises ConvergenceError for a moment that is not positive definite.

    >>> moment = torch.tensor([[1.0, 0.5], [0.5, 1.0]]).double()
    >>> regression(torch.tensor([[1.0, 2.0]]).double(), moment, torch.tensor([1])).tolist()
    [[2.5]]
    """
    if moment is None or len(kept) == matrix.shape[1]:
        return matrix[:, kept]
    # C[:, S] and an inverse would be gigabytes for an MLP of 14336 channels
    images = torch.cat([moment[part] @ matrix.mT for part in kept.split(_PANEL)])
    block = moment[kept[:, None], kept]
    del moment  # as in `eliminate`
    return torch.cholesky_solve(images, _root(block)).mT


def _inverse(moment: Tensor) -> Tensor:
    root = _root(moment)
    return torch.cholesky_inverse(root, out=root)  # in its place: 1.6 GB in Llama 3 8B


def _root(matrix: Tensor) -> Tensor:
    root, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        raise ConvergenceError(
            "a second moment is not positive definite",
            where="elimination",
            hint="shrink it towards the identity first",
        )
    return root


def _solve(root: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(root, right, upper=False)
