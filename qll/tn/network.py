"""What every tensor network is: a spec that fixes its shapes, a tuple of cores, and a few verbs.

A `NetworkSpec` is pure data (it goes into config.json); the tensors are named after it. A format is
a class that implements `MatrixNetwork` and is listed in `qll.tn.NETWORKS`. Adding one is one file
and one line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

GAUGES = ("none", "interpolative")


@dataclass(frozen=True)
class NetworkSpec:
    """Everything about a network but its numbers.

    format: key of `NETWORKS`. shape: (out, in) of the matrix; for a joint format the sum of the
    members' out sizes and the shared in size. modes: physical legs by name, for instance
    {"out": (8, 8, 9), "in": (8, 8, 9)}; their meaning belongs to the format. ranks: one per bond.
    gauge: "none", or "interpolative" when each bond is stored with an identity block left out.
    members: (out, in) of each matrix of a joint format, else empty.
    """

    format: str
    shape: tuple[int, int]
    ranks: tuple[int, ...] = ()
    modes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    gauge: str = "none"
    members: tuple[tuple[int, int], ...] = ()

    def with_ranks(self, ranks: Sequence[int]) -> NetworkSpec:
        """The same spec with other ranks."""
        return replace(self, ranks=tuple(int(rank) for rank in ranks))

    def with_gauge(self, gauge: str) -> NetworkSpec:
        """The same spec with another gauge."""
        return replace(self, gauge=gauge)

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` is its inverse."""
        return {
            "format": self.format,
            "shape": list(self.shape),
            "ranks": list(self.ranks),
            "modes": {name: list(dims) for name, dims in self.modes.items()},
            "gauge": self.gauge,
            "members": [list(shape) for shape in self.members],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> NetworkSpec:
        """The spec written by `to_json`."""
        return cls(
            format=value["format"],
            shape=tuple(value["shape"]),
            ranks=tuple(value["ranks"]),
            modes={name: tuple(dims) for name, dims in value["modes"].items()},
            gauge=value["gauge"],
            members=tuple(tuple(shape) for shape in value["members"]),
        )


@dataclass(frozen=True)
class TensorShapes:
    """Shapes of what a spec stores: floating-point cores and integer pivot indices, in order."""

    cores: tuple[tuple[int, ...], ...]
    indices: tuple[tuple[int, ...], ...] = ()

    @property
    def num_params(self) -> int:
        """Numbers stored, every pivot index counted as one parameter."""
        return sum(math.prod(shape) for shape in (*self.cores, *self.indices))


@runtime_checkable
class MatrixNetwork(Protocol):
    """A matrix W [out, in] written as a tensor network. Immutable; all verbs return new objects."""

    spec: NetworkSpec
    cores: tuple[Tensor, ...]
    indices: tuple[Tensor, ...]
    name: ClassVar[str]

    # -- closed forms that need no tensors -----------------------------------------------------
    @classmethod
    def tensor_shapes(cls, spec: NetworkSpec) -> TensorShapes:
        """Shapes stored for `spec`, in its gauge."""

    @classmethod
    def max_ranks(cls, spec: NetworkSpec) -> tuple[int, ...]:
        """The ranks at which the format is exact for any matrix of this shape and these modes."""

    @classmethod
    def clamp(cls, spec: NetworkSpec) -> NetworkSpec:
        """`spec` with each rank lowered to what its neighbours allow (1 at least)."""

    # -- from a matrix ---------------------------------------------------------------------------
    @classmethod
    def cut_spectra(cls, matrix: Tensor, spec: NetworkSpec) -> list[Tensor]:
        """Singular values of the unfolding at each bond, descending, float64; ranks unused."""

    @classmethod
    def decompose(cls, matrix: Tensor, spec: NetworkSpec) -> MatrixNetwork:
        """Best (quasi-optimal) network of `spec.ranks` in the Frobenius norm, gauge "none"."""

    # -- verbs -------------------------------------------------------------------------------------
    def transform_legs(
        self, out: Sequence[Tensor | None], into: Sequence[Tensor | None]
    ) -> MatrixNetwork:
        """Multiply out leg k by out[k] (on the left), in leg k by into[k] (right); None: as is."""

    def interpolate(self) -> MatrixNetwork:
        """The same matrix with every bond in the interpolative gauge (fewer parameters)."""

    def expand(self) -> MatrixNetwork:
        """The same matrix with gauge "none" (identity blocks written out)."""

    def to_matrix(self) -> Tensor:
        """The matrix [out, in]."""

    def apply(self, x: Tensor) -> Tensor:
        """x W^T for x [..., in]; the matrix is formed only where that costs less."""

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` of the matrix, without the others."""

    def flops(self, tokens: int) -> int:
        """Multiplications and additions of `apply` on `tokens` rows."""

    def bond_spectrum(self, k: int) -> Tensor:
        """Singular values of the unfolding at bond k, descending, float64."""

    def entropy(self, k: int) -> float:
        """Von Neumann entropy of bond k, nats."""

    def round(
        self, *, rtol: float | None = None, ranks: Sequence[int] | None = None
    ) -> MatrixNetwork:
        """A network of lower ranks: relative error at most `rtol`, ranks at most `ranks`."""
