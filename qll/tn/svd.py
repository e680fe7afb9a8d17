"""Singular value decompositions: one vocabulary (rank, rtol, method), one truncation rule.

A truncation error is quoted as `discarded_weight`: sum of the dropped sigma^2 over the sum of all,
so the relative Frobenius error is its square root. Factors come back in the working precision
(float64, or float32 for inputs of 4096 and more on the short side, there orthonormal to about
1e-4): cast the cores last.
Half precision and MPS have no kernels for this; such inputs are moved and widened first.

>>> matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
>>> kept = truncated_svd(matrix, rank=2)
>>> [round(sigma, 6) for sigma in kept.s.tolist()], round(kept.discarded_weight * 14, 6)
([3.0, 2.0], 1.0)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from qll.errors import ConvergenceError, NonFiniteError, UsageError
from qll.tn.symmetric import eigenvalues_descending, eigh_descending, symmetric_product

METHODS = ("auto", "svd", "gram", "rand")

_WIDE_SIDE = 4096  # from this short side on, float32: float64 costs minutes and buys nothing
_GRAM_FROM = 64  # smaller matrices go straight to the SVD
# The eigenvectors of a Gram matrix give factors orthogonal to u * (s_1 / s_k)^2, u = 1e-16:
# 2e-8 at this ratio (float64). Singular values alone stay good down to sqrt(u) = 1e-8.
_GRAM_FACTOR_FLOOR = 1e-4
# In float32, u = 6e-8: where the ratio is 1 / 12 they were orthogonal to 5e-5, and the truncation
# error of 4096 x 14336 was the least one to 1e-10. Twice as fast as float64.
_FLOAT32_FACTOR_FLOOR = 0.05
_GRAM_VALUE_FLOOR = 1e-6
_OVERSAMPLING = 16
_POWER_ITERATIONS = 2  # error / optimal on a flat spectrum: 1.20, 1.06, 1.03 for 0, 1, 2
# Error / optimal was 1.010 for rank 256 of 4096 x 14336, and four more iterations left 1.003; the
# Gram matrix is exact and takes six seconds there.
_RAND_FROM = 8192
_GESVD_FROM = 400  # on CUDA the default driver gesvdj is 4-5 times slower from here on
_CHUNK = 1 << 25


class SVD(NamedTuple):
    """`u` [m, k], `s` [k] descending, `vh` [k, n], and the weight that was dropped."""

    u: Float[Tensor, "m k"]
    s: Float[Tensor, "k"]
    vh: Float[Tensor, "k n"]
    discarded_weight: float


def truncated_svd(
    matrix: Float[Tensor, "m n"],
    *,
    rank: int | None = None,
    rtol: float | None = None,
    method: str = "auto",
    seed: int = 0,
) -> SVD:
    """The best `rank` triples, or the fewest with relative Frobenius error <= `rtol`, or both.

    `auto` takes the Gram matrix of the short side where its accuracy suffices (3 to 10 times
    faster), a seeded randomised range finder for a rank below 1/8 of a large matrix, else the SVD.
    A rank above min(m, n) is lowered to it. Raises NonFiniteError for NaN or infinity in
    `matrix`, ConvergenceError when the factors are not finite, UsageError for impossible options.
    Sources: Eckart-Young; Halko, Martinsson, Tropp 2011 (rand).

    >>> matrix = torch.arange(12.0).reshape(4, 3)
    >>> u, s, vh, weight = truncated_svd(matrix, rtol=1e-6)
    >>> s.numel(), torch.allclose((u * s) @ vh, matrix.double())
    (2, True)
    """
    rank = _checked_options(matrix, rank, rtol, method)
    working = _working(matrix)
    if working.shape[0] < working.shape[1]:  # always factor the tall orientation: 2.5 times faster
        v, s, uh, weight = _tall(working.T, rank, rtol, method, seed)
        result = SVD(uh.T, s, v.T, weight)
    else:
        result = SVD(*_tall(working, rank, rtol, method, seed))
    if not all(_is_finite(part) for part in result[:3]):
        raise ConvergenceError("the factors are not finite", where="truncated_svd", found=method)
    return result


def singular_values(matrix: Float[Tensor, "m n"]) -> Float64[Tensor, "k"]:
    """All min(m, n) singular values, descending, float64.

    From the Gram matrix of the short side, which is one pass over a wide unfolding; when the
    smallest is too small for that (below 1e-6 of the largest), from a QR first. Raises
    NonFiniteError and ConvergenceError.

    >>> singular_values(torch.tensor([[0.0, 2.0], [1.0, 0.0]])).tolist()
    [2.0, 1.0]
    """
    _require_finite(matrix)
    tall = _on_factor_device(matrix)
    tall = tall.T if tall.shape[0] < tall.shape[1] else tall
    if tall.shape[1] >= _GRAM_FROM:
        values = eigenvalues_descending(_gram(tall)).clamp(min=0).sqrt()
        if values[-1] > _GRAM_VALUE_FLOOR * values[0]:
            return values
    working = _working(tall)
    if working.shape[0] > 2 * working.shape[1]:
        working = torch.linalg.qr(working, mode="r").R
    return _finite_values(torch.linalg.svdvals(working).double())


def discarded_weight(s: Float[Tensor, "k"], rank: int) -> float:
    """The part of sum sigma^2 lost by keeping the first `rank` of descending `s`.

    >>> discarded_weight(torch.tensor([2.0, 1.0, 1.0]), 1)
    0.3333333333333333
    """
    tails = _tails(s.double().square())
    return float(tails[rank] / tails[0]) if rank < s.numel() and tails[0] > 0 else 0.0


def rank_for(s: Float[Tensor, "k"], rtol: float) -> int:
    """The fewest leading values of descending `s` (1 at least) with relative error <= `rtol`.

    >>> rank_for(torch.tensor([2.0, 1.0, 1e-9]), 1e-3)
    2
    """
    tails = _tails(s.double().square())
    return max(1, int((tails > rtol * rtol * tails[0]).sum()))


def widened(tensor: Float[Tensor, "..."]) -> Float64[Tensor, "..."]:
    """The tensor as factorisations want it: float64, outside autograd, on a device that has both.

    >>> widened(torch.ones(1, dtype=torch.bfloat16)).dtype
    torch.float64
    """
    return _on_factor_device(tensor).double()


def _checked_options(
    matrix: Shaped[Tensor, "..."], rank: int | None, rtol: float | None, method: str
) -> int:
    if method not in METHODS:
        raise UsageError("no such method", where="truncated_svd", expected=METHODS, found=method)
    if rank is not None and rank < 1:
        raise UsageError("rank is too small", where="truncated_svd", expected=">= 1", found=rank)
    if rtol is not None and not rtol >= 0:
        raise UsageError("rtol is negative", where="truncated_svd", expected=">= 0", found=rtol)
    if method == "rand" and rank is None:
        raise UsageError("the randomised method needs a rank", where="truncated_svd")
    _require_finite(matrix)
    largest = min(matrix.shape)
    return largest if rank is None else min(rank, largest)


def _tall(
    matrix: Tensor, rank: int, rtol: float | None, method: str, seed: int
) -> tuple[Tensor, Tensor, Tensor, float]:
    short = matrix.shape[1]
    if method == "auto" and rtol is None and short >= _RAND_FROM and 8 * rank < short:
        method = "rand"
    if method == "rand":
        return _randomised(matrix, rank, rtol, seed)
    # a Gram matrix resolves discarded weights only down to 1e-16
    fine = rtol is not None and rtol < 1e-6
    if method == "gram" or (method == "auto" and short >= _GRAM_FROM and not fine):
        found = _by_gram(matrix, rank, rtol, strict=method == "auto")
        if found is not None:
            return found
    return _by_svd(matrix, rank, rtol)


def _by_gram(
    matrix: Tensor, rank: int, rtol: float | None, strict: bool
) -> tuple[Tensor, Tensor, Tensor, float] | None:
    if strict and rtol is None and matrix.dtype == torch.float32:
        found = _from_gram(_gram(matrix, torch.float32), matrix, rank, None, _FLOAT32_FACTOR_FLOOR)
        if found is not None:
            return found
    return _from_gram(_gram(matrix), matrix, rank, rtol, _GRAM_FACTOR_FLOOR if strict else -1.0)


def _from_gram(
    gram: Tensor, matrix: Tensor, rank: int, rtol: float | None, floor: float
) -> tuple[Tensor, Tensor, Tensor, float] | None:
    """None where a kept singular value is not above `floor` times the largest."""
    squares, vectors = eigh_descending(gram)
    values = squares.double().clamp(min=0).sqrt()
    kept, weight = _cut(values, rank, rtol)
    if values[kept - 1] <= floor * values[0]:
        return None
    v = vectors[:, :kept].to(matrix.dtype)
    image = matrix @ v
    s = torch.linalg.vector_norm(image, dim=0)
    return image.div_(s.clamp(min=torch.finfo(s.dtype).tiny)), s, v.T, weight


def _by_svd(matrix: Tensor, rank: int, rtol: float | None) -> tuple[Tensor, Tensor, Tensor, float]:
    if matrix.shape[0] > 2 * matrix.shape[1]:
        q, r = torch.linalg.qr(matrix)
        u, s, vh = _svd(r)
        u = q @ u
    else:
        u, s, vh = _svd(matrix)
    kept, weight = _cut(s, rank, rtol)
    return u[:, :kept], s[:kept], vh[:kept], weight


def _randomised(
    matrix: Tensor, rank: int, rtol: float | None, seed: int
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Range finder with power iterations; the dropped weight is |A|^2 - sum of kept sigma^2."""
    generator = torch.Generator().manual_seed(seed)
    sketch = min(rank + _OVERSAMPLING, matrix.shape[1])
    probe = torch.randn(matrix.shape[1], sketch, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(matrix @ probe.to(matrix)).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    v, s, uh, _ = _by_svd((basis.T @ matrix).T, sketch, None)
    total = float(matrix.double().square().sum())
    squares = s.double().square()
    missed = max(total - float(squares.flip(0).sum()), 0.0)
    if missed < 1e-14 * total:  # what is left of the subtraction is rounding
        missed = 0.0
    tails = _tails(squares) + missed
    kept = rank if rtol is None else min(rank, max(1, int((tails > rtol**2 * total).sum())))
    dropped = float(tails[kept]) if kept < sketch else missed
    weight = dropped / total if total else 0.0
    return basis @ uh.T[:, :kept], s[:kept], v.T[:kept], weight


def _cut(values: Tensor, rank: int, rtol: float | None) -> tuple[int, float]:
    kept = rank if rtol is None else min(rank, rank_for(values, rtol))
    return kept, discarded_weight(values, kept)


def _tails(squares: Tensor) -> Tensor:
    """tails[k] = sum of squares[k:], summed from the small end in float64."""
    return squares.flip(0).cumsum(0).flip(0)


def _gram(tall: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """A^T A in `dtype`, summed in float64, by blocks of rows so that no wider copy of A is made."""
    rows = max(1, _CHUNK // tall.shape[1])
    total = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=tall.device)
    for block in tall.split(rows):
        wide = block.to(dtype)
        total += symmetric_product(wide, wide)
    return total.to(dtype)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    driver = "gesvd" if matrix.is_cuda and min(matrix.shape) >= _GESVD_FROM else None
    try:
        return torch.linalg.svd(matrix, full_matrices=False, driver=driver)
    except torch.linalg.LinAlgError as error:
        raise ConvergenceError(
            "the singular value solver did not converge", where="svd", found=str(error)
        ) from None


def _on_factor_device(matrix: Tensor) -> Tensor:
    matrix = matrix.detach()
    return matrix.cpu() if matrix.device.type == "mps" else matrix


def _working(matrix: Tensor) -> Tensor:
    matrix = _on_factor_device(matrix)
    large = min(matrix.shape) >= _WIDE_SIDE and matrix.dtype != torch.float64
    return matrix.to(torch.float32 if large else torch.float64)


def _is_finite(tensor: Tensor) -> bool:
    """Whether every entry is; their sum says so at once, unless it overflows."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _require_finite(matrix: Tensor) -> None:
    if not _is_finite(matrix):
        count = int((~torch.isfinite(matrix)).sum())
        raise NonFiniteError(
            "the matrix has NaN or infinite entries",
            where="svd",
            expected=0,
            found=count,
            hint="check the weights for overflow before converting",
        )


def _finite_values(values: Tensor) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise ConvergenceError("the singular values are not finite", where="singular_values")
    return values
