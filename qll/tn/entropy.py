"""Entropy of a matrix as a quantum state: |W>> = vec(W) / ||W||_F, cut in two, in nats.

The Schmidt weights lambda_i = sigma_i^2 / sum sigma^2 of a cut are a probability distribution, so
every number here depends on singular values alone, never on the scale of W. Two kinds of cut:
the *channel cut* out | in is the ordinary SVD of W and does not see permutations or rotations of
either side; a *site cut* (first k sites of a mode split | the others) does. The identity matrix
has channel entropy ln n and, on interleaved sites, entropy 0 on every site cut: it is a product
operator (operator-space entropy: Zanardi 2001; Prosen and Pizorn 2007). Always compare with
`random_entropy`: pure noise is close to the maximum.

>>> bell = torch.tensor([1.0, 1.0])
>>> round(von_neumann(bell), 6), participation_ratio(bell), stable_rank(torch.tensor([2.0, 1.0]))
(0.693147, 2.0, 1.25)
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log, log1p, sqrt

import torch
from jaxtyping import Float, Float64
from scipy.special import digamma
from torch import Tensor

from qll.errors import UsageError
from qll.tn.modes import split, unfold
from qll.tn.svd import singular_values

_SMALLEST = 1e-30  # p ln p below this is 0 in float64, and its gradient must be too


def von_neumann(s: Float[Tensor, "k"]) -> float:
    """S_1 = -sum lambda ln lambda of singular values `s` (any order), nats; 0 for a zero matrix.

    >>> von_neumann(torch.tensor([3.0, 0.0]))
    0.0
    """
    return renyi(s, 1.0)


def renyi(s: Float[Tensor, "k"], n: float | int = 2.0) -> float:
    """Renyi entropy S_n = ln(sum lambda^n) / (1 - n) of singular values `s`, nats.

    n = 0 counts the nonzero values, 1 is von Neumann, inf is -ln lambda_max. Never increases
    with n. Raises UsageError for n < 0.

    >>> round(renyi(torch.tensor([1.0, 1.0, 1.0]), 2), 6)
    1.098612
    """
    return float(weight_entropy(_normalised(s.detach().double().square()), n))


def participation_ratio(s: Float[Tensor, "k"]) -> float:
    """exp S_2 = (sum s^2)^2 / sum s^4: how many equal singular values would look like this.

    >>> participation_ratio(torch.ones(7))
    7.0
    """
    return 1.0 / float(_normalised(s.double().square()).square().sum().clamp(min=_SMALLEST))


def stable_rank(s: Float[Tensor, "k"]) -> float:
    """exp S_inf = ||W||_F^2 / ||W||_2^2.

    >>> stable_rank(torch.tensor([1.0, 1.0, 0.0]))
    2.0
    """
    return 1.0 / float(_normalised(s.double().square()).max().clamp(min=_SMALLEST))


def entropy_rank(s: Float[Tensor, "k"]) -> float:
    """exp S_1. (The "effective rank" of Roy and Vetterli 2007 uses sigma instead of sigma^2.)

    >>> round(entropy_rank(torch.ones(5)), 6)
    5.0
    """
    return float(weight_entropy(_normalised(s.double().square()), 1.0).exp())


def entanglement_gap(s: Float[Tensor, "k"]) -> float:
    """xi_2 - xi_1 = 2 ln(s_1 / s_2) of descending `s`; infinite for rank 1.

    xi_i = -ln lambda_i is the entanglement spectrum (Li and Haldane 2008).

    >>> round(entanglement_gap(torch.tensor([2.0, 1.0])), 6)
    1.386294
    """
    if s.numel() < 2 or float(s[1]) == 0.0:
        return float("inf")
    return 2.0 * log(float(s[0]) / float(s[1]))


def weight_entropy(weights: Float[Tensor, "k"], n: float | int = 1.0) -> Float[Tensor, ""]:
    """Renyi-n entropy of Schmidt weights that sum to 1, differentiable, nats.

    Weights of 1e-30 and less count as zero, so gradients stay finite for deficient ranks.

    >>> weights = torch.tensor([0.5, 0.5, 0.0], requires_grad=True)
    >>> weight_entropy(weights).backward(); bool(weights.grad.isfinite().all())
    True
    """
    if n < 0:
        raise UsageError("the Renyi index is negative", expected=">= 0", found=n)
    present = weights > _SMALLEST
    safe = torch.where(present, weights, torch.ones_like(weights))
    if not bool(present.any()):
        return weights.sum()
    if n == 1:
        return (safe * -safe.log()).sum()
    if n == float("inf"):
        return -weights.max().log()
    powers = torch.where(present, safe**n, torch.zeros_like(safe))
    return powers.sum().log() / (1.0 - n)


def schmidt_weights(matrix: Float[Tensor, "m n"]) -> Float[Tensor, "k"]:
    """Schmidt weights of a matrix, ascending, differentiable: spectrum of its Gram over the trace.

    >>> schmidt_weights(torch.eye(2)).tolist()
    [0.5, 0.5]
    """
    gram = _small_gram(matrix)
    return _normalised(torch.linalg.eigvalsh(gram).clamp(min=0))


def renyi2(matrix: Float[Tensor, "m n"]) -> Float[Tensor, ""]:
    """S_2 of a matrix, -ln(||A A^T||^2 / ||A||^4), differentiable and without any SVD.

    >>> round(float(renyi2(torch.eye(4))), 6)
    1.386294
    """
    gram = _small_gram(matrix)
    return 2 * gram.trace().log() - gram.square().sum().log()


def max_entropy(m: int, n: int) -> float:
    """ln min(m, n), the entropy of min(m, n) equal singular values.

    >>> max_entropy(1, 5)
    0.0
    """
    return log(min(m, n))


def random_entropy(m: int, n: int) -> float:
    """Mean S_1 over real Gaussian m x n matrices, nats: the line a trained weight must leave.

    -E sum lambda ln lambda with E sum x ln x of the real Wishart ensemble to order 1/m: its
    Marchenko-Pastur value plus the beta = 1 correction (Bai and Silverstein 2004, eq. 5.13, f = x
    ln x). For m << n this is ln m - (m + 1) / (2 n); Page's formula (complex) has m instead of
    m + 1. What is left out is of order 1/m^2.

    >>> round(random_entropy(256, 256), 4), round(random_entropy(1, 9), 2)
    (5.0437, 0.0)
    """
    m, n = min(m, n), max(m, n)
    ratio = m / n
    root = sqrt(ratio)
    edge = 0.0 if m == n else (1 - root) ** 2 * log1p(-root)
    correction = (edge + (1 + root) ** 2 * log1p(root)) / 2 - ratio
    value = float(digamma(m * n / 2 + 1)) + log(2 / n) - ratio / 2 - correction / m
    return min(max(value, 0.0), max_entropy(m, n))


def random_purity(m: int, n: int) -> float:
    """Mean of sum lambda^2 over real Gaussian m x n matrices, exactly (m + n + 1) / (m n + 2).

    >>> random_purity(1, 10)
    1.0
    """
    return (m + n + 1) / (m * n + 2)


def channel_spectrum(matrix: Float[Tensor, "out into"]) -> Float64[Tensor, "k"]:
    """Singular values over the cut out | in, descending.

    >>> channel_spectrum(torch.eye(3)).tolist()
    [1.0, 1.0, 1.0]
    """
    return singular_values(matrix)


def site_spectra(
    matrix: Float[Tensor, "out into"], out_modes: Sequence[int], in_modes: Sequence[int]
) -> list[Tensor]:
    """Singular values, descending, float64, of every site cut 1 .. d - 1.

    >>> site_spectra(torch.eye(4), (2, 2), (2, 2))[0].round(decimals=9).tolist()
    [2.0, 0.0, 0.0, 0.0]
    """
    tensor = split(matrix, out_modes, in_modes).contiguous()
    return [singular_values(unfold(tensor, cut)) for cut in range(1, len(out_modes))]


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


def _small_gram(matrix: Tensor) -> Tensor:
    wide = matrix.double()
    return wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
