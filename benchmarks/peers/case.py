"""What a published method is given, and what it gives back.

Whatever a method stores, the model is scored with the dense matrices its factors multiply to (rows
and columns it removes are zero there, which is the same function), and `params` is the count of the
numbers it would store for them, an index counting as a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float, Float32, Float64, Int
from torch import Tensor

from qll.calibrate import LINEARS, LinearMoments, MomentStore
from qll.load import Source

# of GPTQ and SparseGPT, as published: share of the mean diagonal added to the Hessian, and columns
# handled at a time
DAMPING, PANEL = 0.01, 128


@dataclass(frozen=True)
class Replacement:
    """What stands in for one linear layer."""

    matrix: Float[Tensor, "out into"]
    """The matrix the layer multiplies with."""
    params: int
    """Numbers stored for it, indices included."""
    bytes: int
    """Bytes they take: four each in float32, or the packed size of a quantised matrix."""


@dataclass(frozen=True)
class Case:
    """One model to compress to `keep` of its block linears' parameters."""

    source: Source
    gather: Callable[[], MomentStore]
    """What gives `moments`; called when a method asks for them."""
    windows: Int[Tensor, "windows context"]
    """The calibration tokens."""
    keep: float
    seed: int
    cache: Path
    """Folder for what several cells of one seed share."""

    @cached_property
    def moments(self) -> MomentStore:
        """Second moments of inputs and output gradients over `windows`."""
        return self.gather()


@dataclass(frozen=True)
class Factors:
    """A matrix as left[:, :r] @ right[:r] for every rank r, with the squared singular values that
    the method truncates."""

    left: Float32[Tensor, "out k"]
    right: Float32[Tensor, "k into"]
    energies: Float64[Tensor, " k"]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, into)."""
        return self.left.shape[0], self.right.shape[1]

    def at(self, rank: int) -> Float32[Tensor, "out into"]:
        """The matrix of rank `rank`."""
        return self.left[:, :rank] @ self.right[:rank]

    def tail(self, rank: int) -> float:
        """Sum of the squared singular values after the first `rank`."""
        return float(self.energies[rank:].flip(0).sum())

    @property
    def break_even(self) -> int:
        """The largest rank whose two factors hold no more numbers than the matrix."""
        return self.shape[0] * self.shape[1] // sum(self.shape)


Method = Callable[[Case], Iterator[tuple[str, Replacement]]]
MatrixMethod = Callable[[Tensor, LinearMoments, float], Replacement]


def weights(case: Case) -> Iterator[tuple[str, Float64[Tensor, "out into"]]]:
    """Path and float64 weight of every block linear, block by block."""
    for index in range(case.source.config.num_hidden_layers):
        for path in LINEARS:
            name = f"model.layers.{index}.{path}"
            yield name, case.source.read(f"{name}.weight").double()


def linears(case: Case) -> Iterator[tuple[str, Float64[Tensor, "out into"], LinearMoments]]:
    """Path, float64 weight and moments of every block linear, block by block."""
    for index in range(case.source.config.num_hidden_layers):
        moments = case.moments.block(index)
        for path in LINEARS:
            name = f"model.layers.{index}.{path}"
            yield name, case.source.read(f"{name}.weight").double(), moments[name]


def matrix_by_matrix(method: MatrixMethod) -> Method:
    """`method` on every matrix with the same share of its parameters."""

    def convert(case: Case) -> Iterator[tuple[str, Replacement]]:
        for name, weight, moments in linears(case):
            yield name, method(weight, moments, case.keep)

    return convert


def weight_by_weight(method: Callable[[Tensor, object, float], Replacement]) -> Method:
    """The same for a method without calibration: no moments are read or measured."""

    def convert(case: Case) -> Iterator[tuple[str, Replacement]]:
        for name, weight in weights(case):
            yield name, method(weight, None, case.keep)

    return convert


def stored(matrix: Float[Tensor, "out into"], params: int) -> Replacement:
    """A replacement whose `params` numbers are float32."""
    return Replacement(matrix.float(), params, 4 * params)


def truncated(
    case: Case, found: dict[str, Factors], ranks: dict[str, int | None]
) -> Iterator[tuple[str, Replacement]]:
    """Every matrix at its rank, or dense where that is None."""
    for name, factors in found.items():
        rank, (out, into) = ranks[name], factors.shape
        if rank is None:
            yield name, stored(case.source.read(f"{name}.weight"), out * into)
        else:
            yield name, stored(factors.at(rank), pair_params(factors.shape, rank))


def pair_rank(shape: tuple[int, int], keep: float) -> int:
    """Largest rank whose two factors hold at most `keep` of the numbers of a matrix.

    >>> pair_rank((576, 1536), 0.8), 335 * (576 + 1536) <= 0.8 * 576 * 1536
    (335, True)
    """
    out, into = shape
    return max(1, int(keep * out * into / (out + into)))


def pair_params(shape: tuple[int, int], rank: int) -> int:
    """Numbers in the two factors of a matrix of rank `rank`."""
    return rank * (shape[0] + shape[1])


def damped_hessian(moments: LinearMoments) -> Float64[Tensor, "into into"]:
    """mean x x^T with a hundredth of its mean diagonal added to the diagonal."""
    hessian = moments.input / moments.tokens
    return hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian)).double()


def inverse_root(hessian: Float64[Tensor, "n n"]) -> Float64[Tensor, "n n"]:
    """The upper Cholesky factor U of H^-1: row j over U_jj says what an error of one in column j
    does to the later columns.

    >>> inverse_root(4.0 * torch.eye(2).double()).diagonal().tolist()
    [0.5, 0.5]
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def cholesky(moment: Float64[Tensor, "n n"]) -> Float64[Tensor, "n n"]:
    """The lower root of a second moment, shifted by its least eigenvalue plus 1e-6 where it is not
    positive definite: the cure in the published code of SVD-LLM."""
    root, failed = torch.linalg.cholesky_ex(moment)
    if not int(failed):
        return root
    shift = 1e-6 - float(torch.linalg.eigvalsh(moment)[0])
    return torch.linalg.cholesky(moment + shift * torch.eye(len(moment), dtype=moment.dtype))
