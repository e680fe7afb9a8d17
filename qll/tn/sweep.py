"""Sweeps along a chain of cores [r_left, m, n, r_right]: decompose, orthogonalise, truncate.

What a left-to-right sweep of truncated SVDs drops at each bond is orthogonal to all it keeps, so
the squared error is exactly the sum of the drops (Oseledets 2011, thm 2.2).

>>> cores, dropped = tensor_train(torch.randn(2, 2, 3, 3, dtype=torch.float64), rtol=1e-12)
>>> left = canonical(cores, 1)[0].flatten(0, 2)
>>> torch.allclose(left.mT @ left, torch.eye(4).double()), sum(dropped) <= 1e-24
(True, True)
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from qll.tn.svd import truncated_svd


def tensor_train(
    sites: Float[Tensor, "..."], *, ranks: Sequence[int] | None = None, rtol: float | None = None
) -> tuple[list[Tensor], list[float]]:
    """TT-SVD of [m_1, n_1, ..]: cores [r, m, n, r'], and the weight each bond dropped.

    All cores but the last are left-orthogonal. The weights are fractions of ||T||^2 and sum to
    the squared relative error, which is at most rtol^2 (each bond may drop rtol^2 / (d - 1)).

    >>> cores, dropped = tensor_train(torch.randn(2, 2, 2, 2), ranks=[3])
    >>> [tuple(core.shape) for core in cores], len(dropped)
    ([(1, 2, 2, 3), (3, 2, 2, 1)], 1)
    """
    shapes = list(zip(sites.shape[0::2], sites.shape[1::2], strict=True))
    bonds = max(len(shapes) - 1, 1)
    rest, rank, left_over = sites.detach().reshape(1, -1), 1, 1.0
    cores, dropped = [], []
    for k, (out, into) in enumerate(shapes[:-1]):
        u, s, vh, weight = truncated_svd(
            rest.reshape(rank * out * into, -1),
            rank=None if ranks is None else ranks[k],
            rtol=_share(rtol, bonds, left_over),
        )
        dropped.append(weight * left_over)
        left_over -= dropped[-1]
        cores.append(u.reshape(rank, out, into, -1))
        rest, rank = s[:, None] * vh, s.numel()
    cores.append(rest.reshape(rank, *shapes[-1], 1))
    return cores, dropped


def truncated(
    cores: Sequence[Tensor], ranks: Sequence[int] | None, rtol: float | None
) -> tuple[list[Tensor], list[float]]:
    """Lower the bonds of a chain in canonical form around its first core; also what each dropped.

    TT-rounding (Oseledets 2011, alg. 2), after its QR sweep. Same meaning of `ranks`, `rtol` and
    of the weights as in `tensor_train`.

    >>> cores, _ = tensor_train(torch.ones(2, 2, 2, 2), ranks=[4])
    >>> [tuple(core.shape) for core in truncated(canonical(cores, 0), None, 1e-6)[0]]
    [(1, 2, 2, 1), (1, 2, 2, 1)]
    """
    cores, left_over, dropped = list(cores), 1.0, []
    for k in range(len(cores) - 1):
        u, s, vh, weight = truncated_svd(
            cores[k].flatten(0, 2),
            rank=None if ranks is None else ranks[k],
            rtol=_share(rtol, len(cores) - 1, left_over),
        )
        dropped.append(weight * left_over)
        left_over -= dropped[-1]
        cores[k] = u.reshape(*cores[k].shape[:3], -1)
        cores[k + 1] = torch.einsum("ab,boic->aoic", s[:, None] * vh, cores[k + 1])
    return cores, dropped


def canonical(cores: Sequence[Tensor], center: int) -> list[Tensor]:
    """The same chain with cores before `center` left-orthogonal and after it right-orthogonal.

    >>> right = canonical([torch.ones(1, 2, 2, 2), torch.ones(2, 1, 5, 1)], 0)[1].flatten(1)
    >>> torch.allclose(right @ right.mT, torch.eye(2))
    True
    """
    cores = list(cores)
    for k in range(center):
        q, r = torch.linalg.qr(cores[k].flatten(0, 2))
        cores[k] = q.reshape(*cores[k].shape[:3], -1)
        cores[k + 1] = torch.einsum("ab,boic->aoic", r, cores[k + 1])
    for k in range(len(cores) - 1, center, -1):
        q, r = torch.linalg.qr(cores[k].flatten(1).mT)
        cores[k] = q.mT.reshape(-1, *cores[k].shape[1:])
        cores[k - 1] = torch.einsum("aoib,cb->aoic", cores[k - 1], r)
    return cores


def _share(rtol: float | None, bonds: int, left_over: float) -> float | None:
    """One bond's tolerance relative to what is left, so that all together stay below `rtol`."""
    return None if rtol is None else rtol / sqrt(bonds * max(left_over, 1e-300))
