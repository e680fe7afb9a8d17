"""A matrix as a sum of Kronecker products, W = sum_j A_j (x) B_j.

The rearrangement of Van Loan and Pitsianis (1993), rows of blocks as vectors, is the unfolding of
W at the site cut between the pair (m_1, n_1) and the pair (m_2, n_2), so the best sum of R terms
is a truncated SVD, and a Kronecker sum is a matrix product operator of two sites under its own
name and layout: cores A [R, m_1, n_1], B [R, m_2, n_2]. Gauge "interpolative": C [m_1 n_1 - R, R],
B, and pivots [R].

>>> import torch
>>> modes = {"out": (2, 3), "in": (3, 2)}
>>> first, second = torch.randn(2, 3), torch.randn(3, 2)
>>> spec = NetworkSpec("kron", (6, 6), (1,), modes)
>>> found = KroneckerSum.decompose(torch.kron(first, second), spec)
>>> torch.allclose(found.to_matrix(), torch.kron(first, second), atol=1e-5)
True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from jaxtyping import Float, Float64, Int
from torch import Tensor

from qll.errors import UsageError
from qll.tn.mpo import MPO
from qll.tn.network import NetworkSpec, TensorShapes


@dataclass(frozen=True)
class KroneckerSum:
    """sum_j A_j (x) B_j; every verb is that of the two-site operator with the same numbers."""

    spec: NetworkSpec
    cores: tuple[Tensor, ...]
    indices: tuple[Tensor, ...] = ()
    name: ClassVar[str] = "kron"

    # -- closed forms ------------------------------------------------------------------------
    @classmethod
    def tensor_shapes(cls, spec: NetworkSpec) -> TensorShapes:
        """Shapes of (A, B), or of (C, B) and the pivots.

        >>> spec = NetworkSpec("kron", (6, 6), (4,), {"out": (2, 3), "in": (3, 2)})
        >>> KroneckerSum.tensor_shapes(spec).cores
        ((4, 2, 3), (4, 3, 2))
        """
        shapes = MPO.tensor_shapes(_chain_spec(spec))
        first, second = shapes.cores
        if spec.gauge == "none":
            first = (first[3], *first[1:3])
        return TensorShapes((first, second[:3]), shapes.indices)

    @classmethod
    def max_ranks(cls, spec: NetworkSpec) -> tuple[int, ...]:
        """(min(m_1 n_1, m_2 n_2),)."""
        return MPO.max_ranks(_chain_spec(spec))

    @classmethod
    def clamp(cls, spec: NetworkSpec) -> NetworkSpec:
        """The number of terms within 1 .. min(m_1 n_1, m_2 n_2)."""
        return spec.with_ranks(MPO.clamp(_chain_spec(spec)).ranks)

    # -- from a matrix -----------------------------------------------------------------------
    @classmethod
    def cut_spectra(cls, matrix: Float[Tensor, "out into"], spec: NetworkSpec) -> list[Tensor]:
        """[the singular values of the rearranged matrix]."""
        return MPO.cut_spectra(matrix, _chain_spec(spec))

    @classmethod
    def decompose(cls, matrix: Float[Tensor, "out into"], spec: NetworkSpec) -> KroneckerSum:
        """The best sum of `spec.ranks[0]` terms; the A_j are orthonormal as vectors."""
        return _named(MPO.decompose(matrix, _chain_spec(spec)))

    # -- verbs -------------------------------------------------------------------------------
    def transform_legs(
        self, out: Sequence[Tensor | None], into: Sequence[Tensor | None]
    ) -> KroneckerSum:
        """(out[0] (x) out[1]) W (into[0] (x) into[1]); None leaves a leg; the gauge is kept."""
        return _named(self._chain().transform_legs(out, into))

    def interpolate(self) -> KroneckerSum:
        """The same matrix with the A_j as coefficients of R of their entries."""
        return _named(self._chain().interpolate())

    def expand(self) -> KroneckerSum:
        """The same matrix as (A, B)."""
        return _named(self._chain().expand())

    def canonicalize(self, center: int) -> KroneckerSum:
        """The same matrix, gauge "none", the factor that is not `center` orthonormal."""
        return _named(self._chain().canonicalize(center))

    def to_matrix(self) -> Float[Tensor, "out into"]:
        """W, padding removed."""
        return self._chain().to_matrix()

    def apply(self, x: Float[Tensor, "*batch into"]) -> Float[Tensor, "*batch out"]:
        """W x for each row of `x`: sum_j A_j X B_j^T in the cheapest order, or W first."""
        return self._chain().apply(x)

    def rows(self, ids: Int[Tensor, "*ids"]) -> Float[Tensor, "*ids into"]:
        """Rows `ids` of W, without building W."""
        return self._chain().rows(ids)

    def flops(self, tokens: int) -> int:
        """FLOPs of `apply` on `tokens` rows."""
        return self._chain().flops(tokens)

    def bond_spectrum(self, k: int = 0) -> Float64[Tensor, "r"]:
        """Singular values of the rearranged matrix, from the cores."""
        return self._chain().bond_spectrum(k)

    def entropy(self, k: int = 0) -> float:
        """Von Neumann entropy of the site cut, nats."""
        return self._chain().entropy(k)

    def round(
        self, *, rtol: float | None = None, ranks: Sequence[int] | None = None
    ) -> KroneckerSum:
        """The best sum of fewer terms: relative error <= `rtol`, terms <= ranks[0]."""
        return _named(self._chain().round(rtol=rtol, ranks=ranks))

    # -- private -----------------------------------------------------------------------------
    def _chain(self) -> MPO:
        first, second = self.cores
        if self.spec.gauge == "none":
            first = first.permute(1, 2, 0)[None]
        return MPO(_chain_spec(self.spec), (first, second[..., None]), self.indices)


def _named(network: MPO) -> KroneckerSum:
    first, second = network.cores
    if network.spec.gauge == "none":
        first = first.squeeze(0).permute(2, 0, 1)
    spec = replace(network.spec, format=KroneckerSum.name)
    return KroneckerSum(spec, (first, second.squeeze(-1)), network.indices)


def _chain_spec(spec: NetworkSpec) -> NetworkSpec:
    if len(spec.modes.get("out", ())) != 2:
        raise UsageError(
            "a Kronecker sum has two factors",
            where="kron",
            expected="two out and two in modes",
            found=dict(spec.modes),
        )
    return replace(spec, format=MPO.name)
