"""PIFA and MPIFA (Zhao et al. 2025, ICML): pivoting factorisation, and its reconstruction step.

A matrix of rank r is r of its own rows and the coefficients of the others: r (m + n) - r^2 numbers
and r row indices, so the same budget buys the larger rank
r = ((m + n + 1) - sqrt((m + n + 1)^2 - 4 keep m n)) / 2. `whitened_interpolative` stores SVD-LLM's
matrices this way. MPIFA then refits the factors, matrix after matrix, on the stream of the already
compressed model: with x^ its inputs, x those of the dense model and the target
y = (1 - f) W x^ + f W x, f = 0.25, first U by least squares, then V.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import scipy.linalg
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from benchmarks.peers.case import Case, Replacement, matrix_by_matrix, stored
from benchmarks.peers.stream import after, inputs_of
from benchmarks.peers.svd_llm import whitened
from qll.calibrate import LinearMoments
from qll.calibrate.moments import INPUTS
from qll.model import build_block, embed

DENSE_SHARE = 0.25
# towards the dense weight in the refit of V, beside the sum of x^ x^T^ over all tokens
RIDGE = 1e-3


def rank_of(shape: tuple[int, int], keep: float) -> int:
    """The largest rank whose rows, coefficients and pivots are at most `keep` of the matrix.

    >>> rank_of((576, 576), 0.8), params_of((576, 576), 317) / 576**2 <= 0.8
    (317, True)
    """
    out, into = shape
    total = out + into + 1
    return max(1, int((total - math.sqrt(total**2 - 4 * int(keep * out * into))) / 2))


def params_of(shape: tuple[int, int], rank: int) -> int:
    """r (m + n) - r^2 numbers and r pivot indices."""
    return rank * (shape[0] + shape[1]) - rank**2 + rank


def pivoted(
    left: Float64[Tensor, "out r"], right: Float64[Tensor, "r into"]
) -> Float[Tensor, "out into"]:
    """left @ right as its float32 storage gives it back: pivot rows, and combinations of them."""
    matrix = left @ right
    rank = left.shape[1]
    order = scipy.linalg.qr(left.T.numpy(), mode="r", pivoting=True)[1]
    pivots, rest = torch.from_numpy(order[:rank]).long(), torch.from_numpy(order[rank:]).long()
    coefficients = torch.linalg.solve(left[pivots], left[rest], left=False).float()
    rows = matrix[pivots].float()
    result = torch.empty(matrix.shape)
    result[pivots], result[rest] = rows, coefficients @ rows
    return result


def truncate(
    weight: Float64[Tensor, "out into"], moments: LinearMoments, keep: float
) -> Replacement:
    """SVD-LLM's matrix at PIFA's rank."""
    rank = rank_of(weight.shape, keep)
    left, right, _ = whitened(weight, moments.input, rank)
    return stored(pivoted(left, right), params_of(weight.shape, rank))


convert = matrix_by_matrix(truncate)


@torch.no_grad()
def convert_refitted(case: Case) -> Iterator[tuple[str, Replacement]]:
    """MPIFA: group after group of each block, every factor refitted on the compressed stream."""
    dense = embed(case.source, case.windows)
    stream = dense.clone()
    for index in range(case.source.config.num_hidden_layers):
        block = build_block(case.source, index)
        moments = case.moments.block(index)
        targets = {group: inputs_of(block, group, dense) for group in INPUTS}
        dense = after(block, dense)
        for group, members in INPUTS.items():
            inputs = inputs_of(block, group, stream)
            own, cross = _second_moments(inputs, targets.pop(group))
            for member in members:
                name, linear = f"model.layers.{index}.{member}", block.get_submodule(member)
                weight = linear.weight.double()
                rank = rank_of(weight.shape, case.keep)
                start = whitened(weight, moments[name].input, rank)[:2]
                matrix = pivoted(*refit(weight, *start, own, cross, len(inputs)))
                linear.weight = nn.Parameter(matrix, requires_grad=False)
                yield name, stored(matrix, params_of(weight.shape, rank))
        stream = after(block, stream)


def refit(
    weight: Float64[Tensor, "out into"],
    left: Float64[Tensor, "out r"],
    right: Float64[Tensor, "r into"],
    own: Float64[Tensor, "into into"],
    cross: Float64[Tensor, "into into"],
    tokens: int,
) -> tuple[Float64[Tensor, "out r"], Float64[Tensor, "r into"]]:
    """U, then V, in closed form; own = mean x^ x^T^, cross = mean x x^T^ over `tokens` tokens (x^
    compressed).

    U = Y V^T (V X V^T)^-1 minimises ||target - U V x^|| with X = own and
    Y = W ((1 - f) own + f cross); V is the projection of the ridge solution onto the span of U.
    """
    wanted = weight @ ((1 - DENSE_SHARE) * own + DENSE_SHARE * cross)
    left = torch.linalg.lstsq((right @ own @ right.T).T, (wanted @ right.T).T).solution.T
    ridge = RIDGE / tokens
    damped = own + ridge * torch.eye(len(own), dtype=own.dtype)
    full = torch.linalg.solve(damped, wanted + ridge * weight, left=False)
    return left, torch.linalg.lstsq(left, full).solution


def _second_moments(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """mean x^ x^T^ and mean x x^T^ over tokens, float64."""
    own = (inputs.T @ inputs).double() / len(inputs)
    return own, (targets.T @ inputs).double() / len(inputs)
