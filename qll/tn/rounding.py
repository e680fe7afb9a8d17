"""Numbers -> codes of a `Packing`, such that the error is small where a metric says it counts.

An error E of a matrix costs tr(E^T G E H): G (left) and H (right) are the second moments of what
stands on its two sides. With upper triangular roots G = S S^T and H = T T^T that is ||S^T E T||^2,
and entry (i, j) of S^T E T is S_ii T_jj (E_ij + a combination of the entries before it). So numbers
are rounded one after the other, each towards itself plus that combination: what is lost is then
S_ii T_jj times a rounding error, where rounding each number for itself loses G_ii and H_jj. For
G = 1 this is GPTQ (Frantar et al. 2023, arXiv 2210.17323) in the form of LDLQ (Chee et al. 2023,
arXiv 2307.13304, theorem 1); the left factor enters in the same way, since the Kronecker product
of two triangular roots is a triangular root.

Layer 12 of SmolLM2-135M, K-FAC metric, 4 bits in groups of 32, error relative to the weight's norm:
q_proj 0.085 rounded to nearest, 0.037 with the right factor, 0.030 with both; down_proj 0.084,
0.063, 0.058. A zero point per group in place of the sign of the scale (0.079 and 0.080 to nearest)
loses to a searched scale (0.065 and 0.076) and costs an eighth of a bit more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int8, Int64
from torch import Tensor

from qll.errors import NonFiniteError
from qll.tn.packed import SCALE_DTYPE, Packing

# Rows that are rounded side by side, blind to each other: with rows sorted by their weight this
# costs about a hundredth of the error, and shortens the loop over columns as many times.
ROW_BLOCK = 64
# Scales that are tried put the number of largest magnitude at the outermost level times one of
# these. Above 1: numbers grow while what was lost before them is added.
REACH = {
    2: np.arange(0.4, 1.31, 0.05),
    3: np.arange(0.5, 1.21, 0.025),
    4: np.arange(0.6, 1.16, 0.025),
    8: np.arange(0.9, 1.21, 0.02),
}

# rows whose errors are measured when only the sum over all of them is wanted
SAMPLED_ROWS = 256

# A singular moment is lifted by this share of its mean diagonal, as GPTQ does with every one. With
# less, numbers are asked to make up for so much that they leave the grid: at 1e-6 one rank-3 moment
# in ten lost up to 76 times what rounding to nearest loses, at 1e-2 all of twenty a fifth or less.
LIFT = 1e-2


@dataclass(frozen=True)
class Rounded:
    """Codes and scales of a matrix whose rows hold groups, and the matrix they stand for."""

    codes: Int8[Tensor, "rows length"]
    scales: Float[Tensor, "rows groups"]
    values: Float64[Tensor, "rows length"]


def round_nearest(
    rows: Float[Tensor, "rows length"], packing: Packing, *, search: bool = True
) -> Rounded:
    """Each number to the nearest level of its group; the scale of least squared error.

    Without `search` the number of largest magnitude of each group sets its outermost level.
    Raises NonFiniteError.

    >>> found = round_nearest(torch.tensor([[0.5, -1.0, 0.26]]), Packing(4, 32), search=False)
    >>> found.codes.tolist(), found.scales.tolist()
    ([[4, -8, 2]], [[0.125]])
    """
    target = _finite(rows).numpy()
    reach = REACH[packing.bits] if search else np.ones(1)
    codes, scales = np.empty(target.shape, np.int8), []
    for first in range(0, target.shape[1], packing.group):
        part = target[:, first : first + packing.group]
        scales.append(_scales(part, np.ones(part.shape[1]), packing, reach))
        codes[:, first : first + packing.group] = _codes(part, scales[-1][:, None], packing)
    return _rounded(codes, np.stack(scales, axis=1), packing)


def round_in_metric(
    rows: Float[Tensor, "rows length"],
    packing: Packing,
    left: Float[Tensor, "rows rows"] | Float[Tensor, " rows"] | None,
    right: Float[Tensor, "length length"] | Float[Tensor, " length"] | None,
) -> Rounded:
    """Codes for a small tr(E^T left E right); one dimension means a diagonal, None the identity.

    The moments must be positive definite. Raises NonFiniteError.

    >>> _ = torch.manual_seed(0)
    >>> rows = torch.randn(8, 32, dtype=torch.float64)
    >>> moment = 0.9 + 0.1 * torch.eye(32, dtype=torch.float64)
    >>> lost = [((rows - found.values) @ moment * (rows - found.values)).sum() for found in (
    ...     round_nearest(rows, Packing(4, 32)),
    ...     round_in_metric(rows, Packing(4, 32), None, moment),
    ... )]
    >>> bool(lost[1] < 0.3 * lost[0])
    True
    """
    target = _finite(rows)
    count, length = target.shape
    weight, order = _order(left, count)
    target = target[order]
    root = _upper_root(weight, order)
    columns = _Columns(_upper_root(right, torch.arange(length)), length, packing)
    codes = np.empty((count, length), np.int8)
    scales = np.empty((count, -(-length // packing.group)))
    error = torch.zeros_like(target)
    for first in range(0, count, ROW_BLOCK):
        block = slice(first, first + ROW_BLOCK)
        wanted = target[block]
        if root is not None and first:
            before = root[:first, block].mT @ error[:first]
            wanted = wanted + torch.linalg.solve_triangular(
                root[block, block].mT, before, upper=False
            )
        codes[block], scales[block], found = columns.round(wanted.numpy())
        error[block] = target[block] - torch.from_numpy(found)
    back = torch.argsort(order).numpy()
    return _rounded(codes[back], scales[back], packing)


def expected_losses(
    rows: Float[Tensor, "rows length"],
    packings: Sequence[Packing],
    left: Float[Tensor, "rows rows"] | Float[Tensor, " rows"] | None,
    right: Float[Tensor, "length length"] | Float[Tensor, " length"] | None,
) -> list[float]:
    """What `round_in_metric` may be expected to lose, tr(E^T left E right), without its loop.

    That is sum (S_ii T_jj e_ij)^2 with the errors e of each number rounded for itself, as if what
    is added to a number before it is rounded changed its error no more than chance does; from
    SAMPLED_ROWS of the rows. Block 28
    of SmolLM2-135M, K-FAC, groups of 32: real over expected 0.96 to 1.16 at 2 bits, 0.97 to 1.16
    at 3, 1.01 to 1.25 at 4, but down_proj, whose 1,536 columns are weighed least well, 0.96, 0.79
    and 0.59. Raises NonFiniteError.

    >>> _ = torch.manual_seed(0)
    >>> rows, moment = torch.randn(64, 64, dtype=torch.float64), torch.eye(64, dtype=torch.float64)
    >>> expected = expected_losses(rows, [Packing(4, 32)], None, moment)[0]
    >>> real = (rows - round_in_metric(rows, Packing(4, 32), None, moment).values).square().sum()
    >>> 0.9 < expected / float(real) < 1.1
    True
    """
    _, order = _order(left, len(rows))
    above = _pivots(_upper_root(left, order), len(rows))
    beside = _pivots(_upper_root(right, torch.arange(rows.shape[1])), rows.shape[1])
    seen, counts = _sampled(above)
    target = _finite(rows[order[seen]])
    errors = ((target - round_nearest(target, packing).values).square() for packing in packings)
    return [float(counts @ error @ beside) for error in errors]


class _Columns:
    """The loop over columns for rows that do not see each other.

    In numpy: its steps are tiny, and a torch call costs several times as much as a numpy call.
    """

    def __init__(self, root: Tensor | None, length: int, packing: Packing) -> None:
        self.packing = packing
        self.weights = np.ones(length)
        self.mix: np.ndarray | None = None
        if root is not None:
            diagonal = root if root.ndim == 1 else root.diagonal()
            self.weights = diagonal.square().numpy()
            # column j of the root over its diagonal: how errors before j shift what j aims at
            self.mix = None if root.ndim == 1 else (root / diagonal).mT.contiguous().numpy()

    def round(self, target: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes, scales and values for `target` [rows, length]."""
        group, (rows, length) = self.packing.group, target.shape
        codes, scales = np.empty((length, rows), np.int8), []
        values, error = np.empty((length, rows)), np.zeros((length, rows))
        aim = np.ascontiguousarray(target.T)
        for first in range(0, length, group):
            last = min(first + group, length)
            part = aim[first:last]
            if self.mix is not None:
                part = part + self.mix[first:last, :first] @ error[:first]
            scale = _scales(
                part.T, self.weights[first:last], self.packing, REACH[self.packing.bits]
            )
            scales.append(scale)
            for j in range(first, last):
                number = part[j - first]
                if self.mix is not None and j > first:
                    number = number + self.mix[j, first:j] @ error[first:j]
                codes[j] = code = _codes(number, scale, self.packing)
                values[j] = code * scale
                error[j] = aim[j] - values[j]
        return codes.T, np.stack(scales, axis=1), values.T


def _scales(
    part: np.ndarray, weights: np.ndarray, packing: Packing, reach: np.ndarray
) -> np.ndarray:
    """For each row of `part` [rows, numbers] the scale of least weighted error; 0 for zeros."""
    every = np.arange(len(part))
    extreme = part[every, np.abs(part).argmax(axis=1)]
    tried = np.outer(extreme, reach) / packing.levels[0]
    tried = torch.from_numpy(tried).to(SCALE_DTYPE).to(torch.float64).numpy()
    if len(reach) == 1:
        return tried[:, 0]
    best, least = tried[:, 0], np.full(len(part), np.inf)
    for scale in tried.T:
        loss = np.square(part - _codes(part, scale[:, None], packing) * scale[:, None]) @ weights
        best, least = np.where(loss < least, scale, best), np.minimum(loss, least)
    return best


def _codes(numbers: np.ndarray, scale: np.ndarray, packing: Packing) -> np.ndarray:
    steps = np.rint(numbers / np.where(scale == 0, 1, scale))
    return np.minimum(np.maximum(steps, packing.levels[0]), packing.levels[1])


def _finite(rows: Tensor) -> Float64[Tensor, "rows length"]:
    rows = rows.detach().to("cpu", torch.float64)
    if not torch.isfinite(rows).all():
        raise NonFiniteError("a core to be packed is not finite", found="NaN or infinity")
    return rows


def _order(moment: Tensor | None, count: int) -> tuple[Tensor | None, Tensor]:
    """The moment, None when it does not couple rows, and the rows by falling weight."""
    if moment is None or moment.ndim == 1:
        return None, torch.arange(count)
    return moment, torch.argsort(moment.diagonal(), descending=True, stable=True)


def _upper_root(moment: Tensor | None, order: Tensor) -> Tensor | None:
    """Upper triangular T with T T^T = the moment in `order`; of a diagonal its square root."""
    if moment is None or moment.ndim == 1:
        return None if moment is None else moment.to("cpu", torch.float64).sqrt()
    moment = moment.to("cpu", torch.float64)[order][:, order]
    root, info = torch.linalg.cholesky_ex(moment.flip(0, 1))
    raised, mean = LIFT, moment.diagonal().mean().clamp(min=1e-300)
    while int(info) and raised < 1:
        lifted = moment + raised * mean * torch.eye(len(moment), dtype=moment.dtype)
        root, info = torch.linalg.cholesky_ex(lifted.flip(0, 1))
        raised *= 10
    return root.flip(0, 1)


def _sampled(
    weights: Float64[Tensor, " rows"],
) -> tuple[Int64[Tensor, " seen"], Float64[Tensor, " seen"]]:
    """Rows and what each counts for: all, or SAMPLED_ROWS at even steps of the summed weights."""
    if len(weights) <= SAMPLED_ROWS:
        return torch.arange(len(weights)), weights
    step = weights.sum() / SAMPLED_ROWS
    places = (torch.arange(SAMPLED_ROWS, dtype=torch.float64) + 0.5) * step
    drawn = torch.searchsorted(weights.cumsum(0), places).clamp(max=len(weights) - 1)
    seen, times = drawn.unique(return_counts=True)
    return seen, times * step


def _pivots(root: Tensor | None, count: int) -> Float64[Tensor, " n"]:
    """The squares of the diagonal of a root."""
    if root is None:
        return torch.ones(count, dtype=torch.float64)
    return (root if root.ndim == 1 else root.diagonal()).square()


def _rounded(codes: np.ndarray, scales: np.ndarray, packing: Packing) -> Rounded:
    spread = np.repeat(scales, packing.group, axis=1)[:, : codes.shape[1]]
    return Rounded(
        torch.from_numpy(np.ascontiguousarray(codes, dtype=np.int8)),
        torch.from_numpy(scales).to(SCALE_DTYPE),
        torch.from_numpy(codes.astype(np.float64) * spread),
    )
