"""A matrix as two factors W = A B with one bond, the network every other format competes with.

Gauge "none": cores A [out, r], B [r, in], r (out + in) numbers. Gauge "interpolative": B is r rows
of W itself, cores C [out - r, r] and B, indices pivots [r]; r^2 numbers fewer, so full rank costs
exactly out * in (qll.tn.gauge; "pivoting factorization", Zhao et al. 2025).

>>> matrix = torch.randn(6, 5, dtype=torch.float64)
>>> network = LowRank.decompose(matrix, NetworkSpec("lowrank", (6, 5), ranks=(2,)))
>>> stored = network.interpolate()
>>> sum(core.numel() for core in network.cores), sum(core.numel() for core in stored.cores)
(22, 18)
>>> torch.allclose(stored.to_matrix(), network.to_matrix())
True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from qll.errors import UsageError
from qll.tn.entropy import von_neumann
from qll.tn.gauge import interpolative, row_order, write
from qll.tn.network import NetworkSpec, TensorShapes
from qll.tn.svd import rank_for, singular_values, truncated_svd, widened


@dataclass(frozen=True)
class LowRank:
    """W = A B; see the module for the two gauges."""

    spec: NetworkSpec
    cores: tuple[Tensor, ...]
    indices: tuple[Tensor, ...] = ()
    name: ClassVar[str] = "lowrank"

    # -- closed forms ------------------------------------------------------------------------
    @classmethod
    def tensor_shapes(cls, spec: NetworkSpec) -> TensorShapes:
        """Shapes of (A, B), or of (C, B) and the pivots.

        >>> LowRank.tensor_shapes(NetworkSpec("lowrank", (6, 5), (2,), gauge="interpolative"))
        TensorShapes(cores=((4, 2), (2, 5)), indices=((2,),))
        """
        (out, into), (rank,) = spec.shape, spec.ranks
        if spec.gauge == "none":
            return TensorShapes(((out, rank), (rank, into)))
        return TensorShapes(((out - rank, rank), (rank, into)), ((rank,),))

    @classmethod
    def max_ranks(cls, spec: NetworkSpec) -> tuple[int, ...]:
        """(min(out, in),)."""
        return (min(spec.shape),)

    @classmethod
    def clamp(cls, spec: NetworkSpec) -> NetworkSpec:
        """The rank within 1 .. min(out, in)."""
        return spec.with_ranks([max(1, min(spec.ranks[0], *spec.shape))])

    # -- from a matrix -----------------------------------------------------------------------
    @classmethod
    def cut_spectra(cls, matrix: Float[Tensor, "out into"], spec: NetworkSpec) -> list[Tensor]:
        """[the singular values of the matrix]."""
        return [singular_values(matrix)]

    @classmethod
    def decompose(cls, matrix: Float[Tensor, "out into"], spec: NetworkSpec) -> LowRank:
        """The best approximation of rank `spec.ranks[0]` (Eckart-Young), A orthonormal.

        Cores have the dtype of `matrix`. Raises NonFiniteError, ConvergenceError.
        """
        spec = cls.clamp(spec).with_gauge("none")
        u, s, vh, _ = truncated_svd(matrix, rank=spec.ranks[0])
        return cls(spec, (u.to(matrix), (s[:, None] * vh).to(matrix)))

    # -- verbs -------------------------------------------------------------------------------
    def transform_legs(
        self, out: Sequence[Tensor | None], into: Sequence[Tensor | None]
    ) -> LowRank:
        """out[0] W into[0]; None leaves a side as it is, a vector is a diagonal. Keeps the gauge.

        >>> spec = NetworkSpec("lowrank", (2, 2), (1,))
        >>> ones = LowRank.decompose(torch.ones(2, 2), spec)
        >>> half = ones.transform_legs([0.5 * torch.eye(2)], [None]).to_matrix()
        >>> torch.allclose(half, torch.full((2, 2), 0.5))
        True
        """
        if len(out) != 1 or len(into) != 1:
            raise UsageError("a low-rank network has one leg a side", found=(len(out), len(into)))
        left, right = self.expand().cores
        left = left if out[0] is None else _times(out[0].to(left), left)
        right = right if into[0] is None else _times(_transposed(into[0].to(right)), right.mT).mT
        return self._same_gauge((left, right))

    def interpolate(self) -> LowRank:
        """The same matrix as rows of itself and coefficients for the others."""
        if self.spec.gauge == "interpolative":
            return self
        left, right = self.cores
        coefficients, pivots = interpolative(left)
        rows = widened(left)[pivots.to(coefficients.device)] @ widened(right)
        spec = self.spec.with_gauge("interpolative")
        return LowRank(spec, (coefficients.to(left), rows.to(right)), (pivots.to(left.device),))

    def expand(self) -> LowRank:
        """The same matrix as (A, B)."""
        if self.spec.gauge == "none":
            return self
        coefficients, right = self.cores
        left = write(self.indices[0], coefficients)
        return LowRank(self.spec.with_gauge("none"), (left, right))

    def to_matrix(self) -> Float[Tensor, "out into"]:
        """W."""
        if self.spec.gauge == "none":
            return self.cores[0] @ self.cores[1]
        coefficients, right = self.cores
        stacked = torch.cat((right, coefficients @ right))
        return stacked.index_select(0, row_order(self.indices[0], self.spec.shape[0]))

    def apply(self, x: Float[Tensor, "*batch into"]) -> Float[Tensor, "*batch out"]:
        """W x for each row of `x`; W itself is built only for ranks where that is cheaper."""
        if self._rebuilds(x.numel() // x.shape[-1]):
            return x @ self.to_matrix().mT
        left, right = self.cores
        hidden = torch.nn.functional.linear(x, right)
        if self.spec.gauge == "interpolative" and self._trains(hidden):
            # backward through a gather of weights is far cheaper than through one of activations
            return torch.nn.functional.linear(hidden, write(self.indices[0], left))
        image = torch.nn.functional.linear(hidden, left)
        if self.spec.gauge == "none":
            return image
        order = row_order(self.indices[0], self.spec.shape[0])
        return torch.cat((hidden, image), dim=-1).index_select(-1, order)

    def rows(self, ids: Int[Tensor, "*ids"]) -> Float[Tensor, "*ids into"]:
        """Rows `ids` of W, without building W."""
        flat, (left, right) = ids.reshape(-1), self.cores
        if self.spec.gauge == "none":
            found = left.index_select(0, flat) @ right
        else:
            found = self._interpolated_rows(flat)
        return found.reshape(*ids.shape, self.spec.shape[1])

    def flops(self, tokens: int) -> int:
        """FLOPs of `apply` on `tokens` rows."""
        out, into = self.spec.shape
        if self._rebuilds(tokens):
            return self._rebuild_flops() + 2 * tokens * out * into
        return 2 * tokens * self._weights()

    def bond_spectrum(self, k: int = 0) -> Float64[Tensor, "r"]:
        """Singular values of W over the bond, from QR of the factors, never from W."""
        left, right = (widened(core) for core in self.expand().cores)
        small = torch.linalg.qr(left, mode="r").R @ torch.linalg.qr(right.mT, mode="r").R.mT
        return singular_values(small)

    def entropy(self, k: int = 0) -> float:
        """Von Neumann entropy of the bond, nats."""
        return von_neumann(self.bond_spectrum(k))

    def round(self, *, rtol: float | None = None, ranks: Sequence[int] | None = None) -> LowRank:
        """The best network of lower rank: relative error <= `rtol`, rank <= ranks[0]."""
        left, right = (widened(core) for core in self.expand().cores)
        (q_left, r_left), (q_right, r_right) = torch.linalg.qr(left), torch.linalg.qr(right.mT)
        u, s, vh, _ = truncated_svd(r_left @ r_right.mT)
        kept = s.numel() if ranks is None else min(ranks[0], s.numel())
        kept = kept if rtol is None else min(kept, rank_for(s, rtol))
        pair = (q_left @ u[:, :kept], (s[:kept, None] * vh[:kept]) @ q_right.mT)
        return self._same_gauge(tuple(core.to(self.cores[1]) for core in pair))

    # -- private -----------------------------------------------------------------------------
    def _same_gauge(self, factors: tuple[Tensor, ...]) -> LowRank:
        spec = self.spec.with_gauge("none").with_ranks([factors[1].shape[0]])
        network = LowRank(spec, factors)
        return network if self.spec.gauge == "none" else network.interpolate()

    def _trains(self, hidden: Tensor) -> bool:
        """Whether gradients are wanted for more tokens than the bond is wide."""
        return hidden.requires_grad and hidden.numel() > hidden.shape[-1] ** 2

    def _weights(self) -> int:
        return self.cores[0].numel() + self.cores[1].numel()

    def _rebuild_flops(self) -> int:
        return 2 * self.cores[0].numel() * self.spec.shape[1]

    def _rebuilds(self, tokens: int) -> bool:
        saved = self._weights() - self.spec.shape[0] * self.spec.shape[1]
        return 2 * tokens * saved > self._rebuild_flops()

    def _interpolated_rows(self, ids: Tensor) -> Tensor:
        """A pivot row is stored in B; any other is its coefficients times B."""
        (coefficients, right), rank = self.cores, self.spec.ranks[0]
        place = row_order(self.indices[0], self.spec.shape[0]).index_select(0, ids)
        pivot_rows = right.index_select(0, place.clamp(max=rank - 1))
        if coefficients.shape[0] == 0:
            return pivot_rows
        others = coefficients.index_select(0, (place - rank).clamp(min=0)) @ right
        return torch.where((place < rank)[:, None], pivot_rows, others)


def _times(factor: Tensor, matrix: Tensor) -> Tensor:
    """factor @ matrix; one dimension stands for a diagonal (of a vocabulary, say)."""
    return factor[:, None] * matrix if factor.ndim == 1 else factor @ matrix


def _transposed(factor: Tensor) -> Tensor:
    return factor if factor.ndim == 1 else factor.mT
