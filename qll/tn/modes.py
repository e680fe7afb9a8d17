"""Physical legs: how the rows and columns of a matrix split into the sites of a network.

Row o of W [out, in] is read as a multi-index (o_1 .. o_d), o_1 slowest, and column i likewise;
site k carries the pair (o_k, i_k). When the modes multiply to more than the matrix has, the rest
is zero rows and columns (a vocabulary of 128256 = 2^8 * 3 * 167 has no balanced factors, 128625
has). Every reshape of a weight into legs goes through this file.

>>> default_modes((1536, 576), 3)
{'out': (8, 12, 16), 'in': (9, 8, 8)}
>>> sites = split(torch.arange(12.0).reshape(4, 3), (2, 2), (3, 1))
>>> sites.shape, torch.equal(merge(sites, (4, 3)), torch.arange(12.0).reshape(4, 3))
(torch.Size([2, 3, 2, 1]), True)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from qll.errors import UsageError

LARGEST_PRIME = 64  # a mode with a larger prime factor is padded instead
_SMOOTH = (2, 3, 5, 7)


def default_modes(shape: tuple[int, int], sites: int) -> dict[str, tuple[int, ...]]:
    """{"out": (m_1 .. m_d), "in": (n_1 .. n_d)}: as equal as possible, padded only where needed.

    Out modes ascend and in modes descend: a left-to-right sweep is then cheapest (it trades in
    legs for out legs one site at a time) and the sites m_k n_k come out near equal. A size whose
    largest prime factor is above 64 is padded to the next product of 2, 3, 5 and 7. Raises
    UsageError for sizes or site counts below 1.

    >>> default_modes((577, 24), 2)
    {'out': (21, 28), 'in': (6, 4)}
    """
    if sites < 1 or min(shape) < 1:
        raise UsageError(
            "cannot split",
            where="default_modes",
            expected="sizes and sites >= 1",
            found=(shape, sites),
        )
    out, into = (balanced_factors(_padded(size, sites), sites) for size in shape)
    return {"out": out, "in": into[::-1]}


def skewed_modes(shape: tuple[int, int], sites: int, axis: int) -> dict[str, tuple[int, ...]]:
    """Modes whose first cut is nearly rows against columns; {} where `axis` does not split.

    Only the least prime factor p of side `axis` (0: out, 1: in) stands on the other side's half
    of that cut, so each other leg is whole and sees its second moment whole: (M / p, 1) | (p, N)
    or (1, N / p) | (M, p). Sites after the second take a prime factor each off the whole leg.
    The cut between all rows and all columns is never one of its cuts.

    >>> skewed_modes((12, 10), 2, axis=0), skewed_modes((12, 10), 3, axis=1)
    ({'out': (6, 2), 'in': (1, 10)}, {'out': (1, 6, 2), 'in': (5, 2, 1)})
    """
    split, whole = shape[axis], shape[1 - axis]
    factor = _least_prime(split)
    tail: list[int] = []
    for _ in range(sites - 2):
        tail.insert(0, _least_prime(whole))
        whole //= tail[0]
    if factor == split or factor > _SMOOTH[-1] or whole == 1 or 1 in tail:
        return {}
    cut = (split // factor, factor, *(1 for _ in tail))
    rest = (1, whole, *tail)
    return {"out": cut, "in": rest} if axis == 0 else {"out": rest, "in": cut}


@lru_cache(maxsize=4096)
def balanced_factors(size: int, parts: int, least: int = 1) -> tuple[int, ...]:
    """`parts` ascending factors of `size`, none below `least`, with the smallest sum; () if none.

    >>> balanced_factors(576, 3), balanced_factors(13, 2)
    ((8, 8, 9), (1, 13))
    """
    if parts == 1:
        return (size,) if size >= least else ()
    best: tuple[int, ...] = ()
    factor = least
    while factor**parts <= size:
        if size % factor == 0:
            rest = balanced_factors(size // factor, parts - 1, factor)
            if rest and (not best or factor + sum(rest) < sum(best)):
                best = (factor, *rest)
        factor += 1
    return best


def paired_modes(
    modes: Mapping[str, Sequence[int]], shape: tuple[int, int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The checked (out modes, in modes) of a spec: equally many, and large enough for `shape`.

    Raises UsageError.

    >>> paired_modes({"out": (2, 3), "in": (4, 1)}, (5, 4))
    ((2, 3), (4, 1))
    """
    try:
        out, into = tuple(modes["out"]), tuple(modes["in"])
    except KeyError as error:
        raise UsageError("modes lack a side", where=str(error), expected="out and in") from None
    if len(out) != len(into) or not out or min(out + into) < 1:
        raise UsageError("out and in need equally many modes >= 1", found=(out, into))
    if prod(out) < shape[0] or prod(into) < shape[1]:
        raise UsageError(
            "the modes are too small for the matrix",
            expected=f"products >= {shape}",
            found=(prod(out), prod(into)),
        )
    return out, into


def split(
    matrix: Float[Tensor, "out into"], out_modes: Sequence[int], in_modes: Sequence[int]
) -> Float[Tensor, "..."]:
    """The tensor [m_1, n_1, ..., m_d, n_d] of a matrix, zero-padded where the modes ask for it.

    >>> split(torch.ones(3, 2), (2, 2), (1, 2)).sum().item()
    6.0
    """
    rows, columns = prod(out_modes), prod(in_modes)
    padded = matrix
    if (rows, columns) != tuple(matrix.shape):
        padded = torch.nn.functional.pad(
            matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0])
        )
    sites = len(out_modes)
    order = [leg + side * sites for leg in range(sites) for side in (0, 1)]
    return padded.reshape(*out_modes, *in_modes).permute(order)


def merge(tensor: Float[Tensor, "..."], shape: tuple[int, int]) -> Float[Tensor, "out into"]:
    """The matrix of a tensor [m_1, n_1, ..., m_d, n_d], cut to `shape`: inverse of `split`.

    >>> merge(split(torch.ones(3, 2), (2, 2), (1, 2)), (3, 2)).shape
    torch.Size([3, 2])
    """
    order = [*range(0, tensor.ndim, 2), *range(1, tensor.ndim, 2)]
    rows = prod(tensor.shape[0::2])
    return tensor.permute(order).reshape(rows, -1)[: shape[0], : shape[1]]


def unfold(tensor: Float[Tensor, "..."], cut: int) -> Float[Tensor, "left right"]:
    """The matrix A_k of a split tensor at site cut k: the first k sites against the others.

    >>> unfold(torch.zeros(2, 3, 4, 5), 1).shape
    torch.Size([6, 20])
    """
    return tensor.reshape(prod(tensor.shape[: 2 * cut]), -1)


def _padded(size: int, sites: int) -> int:
    if sites == 1 or _largest_prime(size) <= LARGEST_PRIME:
        return size
    while not _is_smooth(size):
        size += 1
    return size


def _largest_prime(size: int) -> int:
    largest, factor = 1, 2
    while factor * factor <= size:
        while size % factor == 0:
            size, largest = size // factor, factor
        factor += 1
    return max(largest, size)


def _least_prime(size: int) -> int:
    """The smallest prime factor, or 1 of 1."""
    return next((f for f in range(2, int(size**0.5) + 1) if size % f == 0), size)


def _is_smooth(size: int) -> bool:
    for prime in _SMOOTH:
        while size % prime == 0:
            size //= prime
    return size == 1
