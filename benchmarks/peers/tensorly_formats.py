"""Tensor trains and Tucker as tensorly and tensorly-torch make them of a weight: no calibration.

A matrix [out, in] becomes a tensor of its factored indices. Tensor-train matrix: one bond dimension
for all bonds, capped where a cut allows less, the largest that fits. Tucker: all ranks the same
share of their dimension, the largest that fits, then single ranks raised while they fit; every
factor matrix is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import tensorly
import torch
from jaxtyping import Float64
from tensorly.decomposition import tensor_train_matrix, tucker
from tensorly.tt_matrix import tt_matrix_to_tensor
from torch import Tensor, nn

from benchmarks.peers.case import Method, Replacement, stored, weight_by_weight
from qll.tn import default_modes

TRAIN_SITES = 3
TUCKER_SITES = 2
# shares of the dimensions that are tried for Tucker
STEPS = 1000


def tensor_train(weight: Float64[Tensor, "out into"], moments: object, keep: float) -> Replacement:
    """tensorly's tensor_train_matrix of three cores."""
    out, into = modes(weight.shape, TRAIN_SITES)
    ranks = train_ranks(out, into, keep)
    # tensorly-torch, once imported, leaves another backend behind
    with tensorly.backend_context("numpy"):
        cores = tensor_train_matrix(weight.reshape(*out, *into).numpy(), list(ranks))
        matrix = torch.from_numpy(tt_matrix_to_tensor(cores).reshape(weight.shape))
    return stored(matrix, train_params(out, into, ranks))


def tucker_matrix(weight: Float64[Tensor, "out into"], moments: object, keep: float) -> Replacement:
    """tensorly's Tucker (higher-order orthogonal iteration) of four modes."""
    dims = tuple(dim for side in modes(weight.shape, TUCKER_SITES) for dim in side)
    ranks = tucker_ranks(dims, keep)
    with tensorly.backend_context("numpy"):
        core = tucker(weight.reshape(dims).numpy(), ranks, init="svd", n_iter_max=10)
        matrix = torch.from_numpy(tensorly.tucker_to_tensor(core).reshape(weight.shape))
    return stored(matrix, tucker_params(dims, ranks))


def factorized_linear(kind: str) -> Method:
    """tensorly-torch's FactorizedLinear.from_linear, `kind` blocktt or tucker, of three sites."""

    def convert(weight: Float64[Tensor, "out into"], moments: object, keep: float) -> Replacement:
        import tltorch

        out, into = modes(weight.shape, TRAIN_SITES)
        ranks = (
            train_ranks(out, into, keep) if kind == "blocktt" else tucker_ranks(out + into, keep)
        )
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight.float())
        with tensorly.backend_context("pytorch"):
            layer = tltorch.FactorizedLinear.from_linear(
                linear,
                auto_tensorize=False,
                in_tensorized_features=into,
                out_tensorized_features=out,
                factorization=kind,
                rank=ranks,
                bias=False,
            )
            params = sum(tensor.numel() for tensor in layer.weight.parameters())
            return stored(layer.weight.to_matrix().detach().reshape(weight.shape), params)

    return weight_by_weight(convert)


def modes(shape: Sequence[int], sites: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Factors of the out and of the in dimension, one pair a site."""
    found = default_modes(tuple(shape), sites)
    return tuple(found["out"]), tuple(found["in"])


def train_ranks(out: Sequence[int], into: Sequence[int], keep: float) -> tuple[int, ...]:
    """(1, r, .., r, 1) with the largest r that fits `keep`, each at most what its cut allows."""
    sizes = [a * b for a, b in zip(out, into, strict=True)]
    most = [min(prod(sizes[:k]), prod(sizes[k:])) for k in range(1, len(sizes))]

    def sized(bond: int) -> tuple[int, ...]:
        return (1, *(min(bond, limit) for limit in most), 1)

    return _largest(sized, max(most), lambda ranks: train_params(out, into, ranks), out, into, keep)


def train_params(out: Sequence[int], into: Sequence[int], ranks: Sequence[int]) -> int:
    """Numbers in the cores [r, out, in, r].

    >>> train_params((2, 3), (4, 5), (1, 6, 1))
    138
    """
    return sum(
        ranks[k] * a * b * ranks[k + 1] for k, (a, b) in enumerate(zip(out, into, strict=True))
    )


def tucker_ranks(dims: Sequence[int], keep: float) -> tuple[int, ...]:
    """Ranks in proportion to `dims`, then one more wherever `keep` of their product allows it."""

    def sized(step: int) -> tuple[int, ...]:
        return tuple(max(1, round(step / STEPS * dim)) for dim in dims)

    ranks = _largest(sized, STEPS, lambda ranks: tucker_params(dims, ranks), dims, (), keep)
    while larger := _one_more(dims, ranks, keep * prod(dims)):
        ranks = larger
    return ranks


def _one_more(dims: Sequence[int], ranks: tuple[int, ...], budget: float) -> tuple[int, ...] | None:
    """`ranks` with the smallest share of its dimension raised that fits; None when none does."""
    for leg in sorted(range(len(dims)), key=lambda leg: ranks[leg] / dims[leg]):
        more = (*ranks[:leg], ranks[leg] + 1, *ranks[leg + 1 :])
        if ranks[leg] < dims[leg] and tucker_params(dims, more) <= budget:
            return more
    return None


def tucker_params(dims: Sequence[int], ranks: Sequence[int]) -> int:
    """Numbers in the core and the factor matrices.

    >>> tucker_params((4, 5), (2, 3))
    29
    """
    return prod(ranks) + sum(dim * rank for dim, rank in zip(dims, ranks, strict=True))


def _largest(
    sized: Callable[[int], tuple[int, ...]],
    limit: int,
    params: Callable[[Sequence[int]], int],
    out: Sequence[int],
    into: Sequence[int],
    keep: float,
) -> tuple[int, ...]:
    """The last of sized(1), sized(2), .. within the budget (sizes never shrink)."""
    budget, low, high = keep * prod(out) * prod(into), 1, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if params(sized(middle)) <= budget else (low, middle - 1)
    return sized(low)


tensor_train_cells = weight_by_weight(tensor_train)
tucker_cells = weight_by_weight(tucker_matrix)
blocktt_cells = factorized_linear("blocktt")
factorized_tucker_cells = factorized_linear("tucker")
