"""The interpolative gauge: fix the freedom of a bond so that an r x r identity need not be stored.

Any left [m, r] of rank r is P [I; C] left[pivots]: r of its own rows (the pivots) and the
coefficients C that write the other rows in them. In a network the factor left[pivots] moves into
the next core, so a bond of dimension r costs r^2 parameters less, at zero loss.

The pivots come from a QR with column pivoting of an orthonormal basis of left, improved by swaps
until max|C| <= 2. Then, with f = 2, every singular value of left[pivots] is at least that of left
over sqrt(1 + f^2 r (m - r)) and max|C| itself bounds how much rounding of a stored core can grow
(strong rank-revealing QR, Gu and Eisenstat 1996, thm 3.2; maximal volume, Goreinov et al. 2010).

>>> left = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 4.0]])
>>> coefficients, pivots = interpolative(left)
>>> pivots.tolist(), [round(value, 9) for value in coefficients[0].tolist()]
([1, 2], [0.5, -0.125])
>>> torch.allclose(write(pivots, coefficients) @ left[pivots].double(), left.double())
True
"""

from __future__ import annotations

import scipy.linalg
import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from qll.errors import NonFiniteError, UsageError
from qll.tn.svd import widened

MAX_COEFFICIENT = 2.0

# Pivoted QR is half level-2 BLAS: seconds at 49152 x 576 = 1.6e10. Beyond, LU with partial
# pivoting (level 3) starts the swaps instead; its coefficients start somewhat larger.
_QR_LIMIT = 3e10

_orders: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def interpolative(
    left: Float[Tensor, "m r"],
) -> tuple[Float64[Tensor, "rest r"], Int64[Tensor, "r"]]:
    """(C [m - r, r], pivots [r] ascending) with left = write(pivots, C) @ left[pivots].

    max|C| <= 2. The choice depends only on the column space of `left`, not on its scaling.
    Computed in float64. Raises UsageError when m < r, NonFiniteError for NaN or infinity.

    >>> coefficients, pivots = interpolative(torch.eye(3)[:, :2])
    >>> pivots.tolist(), coefficients.tolist()
    ([0, 1], [[0.0, 0.0]])
    """
    rows, rank = left.shape
    if rows < rank:
        raise UsageError(
            "the gauge needs at least as many rows as columns",
            where="interpolative",
            expected=f"rows >= {rank}",
            found=rows,
            hint="clamp the ranks first",
        )
    if not bool(torch.isfinite(left).all()):
        raise NonFiniteError("NaN or infinity in a core", where="interpolative")
    if rows == rank:
        return widened(left)[:0], torch.arange(rank, device=left.device)
    basis = torch.linalg.qr(widened(left)).Q
    return _bounded(basis, _first_pivots(basis))


def write(pivots: Int[Tensor, "r"], coefficients: Float[Tensor, "rest r"]) -> Float[Tensor, "m r"]:
    """The matrix P [I; C], [rest + r, r]: identity rows at `pivots`, coefficients elsewhere.

    >>> write(torch.tensor([1]), torch.tensor([[5.0], [7.0]])).tolist()
    [[5.0], [1.0], [7.0]]
    """
    rest, rank = coefficients.shape
    identity = torch.eye(rank, dtype=coefficients.dtype, device=coefficients.device)
    return torch.cat((identity, coefficients)).index_select(0, row_order(pivots, rest + rank))


def row_order(pivots: Int[Tensor, "r"], rows: int) -> Int64[Tensor, "rows"]:
    """Where each of `rows` rows is in the stored order (pivots first, then the rest ascending).

    stacked.index_select(0, order) puts rows stored as [pivots; rest] back in place. No value is
    read on the host, so it neither synchronises nor breaks a compiled graph; remembered per
    pivot tensor, since a model asks again at every token.

    >>> row_order(torch.tensor([2, 0]), 4).tolist()
    [1, 2, 0, 3]
    """
    if torch.compiler.is_compiling() or pivots.is_inference():
        return _row_order(pivots, rows)
    known = _orders.get(pivots)
    if known is None or known[0] != (pivots._version, rows):
        with torch.inference_mode(False):  # a model that was scored may be trained next
            known = ((pivots._version, rows), _row_order(pivots, rows))
        _orders[pivots] = known
    return known[1]


def _row_order(pivots: Tensor, rows: int) -> Tensor:
    rank = pivots.shape[0]
    stored = torch.arange(rank, device=pivots.device)
    order = torch.full((rows,), -1, device=pivots.device).scatter(0, pivots.long(), stored)
    rest = order < 0
    return torch.where(rest, rest.cumsum(0) + (rank - 1), order)


def _first_pivots(basis: Tensor) -> Tensor:
    rows, rank = basis.shape
    if rows * rank * rank <= _QR_LIMIT:
        # the order of near-equal norms does not matter, so float32 is enough to choose
        narrow = basis.float().cpu().numpy().T
        order = scipy.linalg.qr(narrow, mode="r", pivoting=True, overwrite_a=True)[1]
        return torch.from_numpy(order[:rank]).long().to(basis.device)
    exchanges = torch.linalg.lu_factor(basis).pivots.tolist()
    order = list(range(rows))
    for row, other in enumerate(exchanges):
        order[row], order[other - 1] = order[other - 1], order[row]
    return torch.tensor(order[:rank], device=basis.device)


def _bounded(basis: Tensor, pivots: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients and ascending pivots after enough exchanges that the bound holds."""
    while True:
        pivots = pivots.sort().values
        coefficients = _solve(basis, pivots)
        if float(coefficients.abs().max()) <= MAX_COEFFICIENT:
            return coefficients, pivots
        _exchange(coefficients, pivots, basis.shape[0])


def _exchange(coefficients: Tensor, pivots: Tensor, rows: int) -> None:
    """Swap, in place, pivots for rows with a coefficient above the bound until there is none.

    Each exchange multiplies |det basis[pivots]| by that coefficient, so this ends.
    """
    rest = complement(pivots, rows)
    while True:
        row, column = divmod(int(coefficients.abs().argmax()), coefficients.shape[1])
        largest = float(coefficients[row, column])
        if abs(largest) <= MAX_COEFFICIENT:
            return
        direction = coefficients[row].clone()
        direction[column] -= 1.0
        coefficients.addr_(coefficients[:, column].clone(), direction, alpha=-1.0 / largest)
        coefficients[row] = direction / -largest
        coefficients[row, column] += 1.0
        pivots[column], rest[row] = rest[row].clone(), pivots[column].clone()


def complement(pivots: Int[Tensor, "r"], rows: int) -> Int64[Tensor, "rest"]:
    """The row numbers below `rows` that are not pivots, ascending.

    >>> complement(torch.tensor([2, 0]), 4).tolist()
    [1, 3]
    """
    free = torch.ones(rows, dtype=torch.bool, device=pivots.device)
    free[pivots.long()] = False
    return free.nonzero().squeeze(1)


def _solve(basis: Tensor, pivots: Tensor) -> Tensor:
    rest = basis[complement(pivots, basis.shape[0])]
    return torch.linalg.solve(basis[pivots], rest, left=False)
