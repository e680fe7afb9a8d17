"""Tucker: a matrix read as a 3- or 4-way tensor, a small core times one factor per leg.

modes {"stack": (n_1, .., n_d)}: the leading legs whose sizes multiply to the row count are the
rows, the others the columns, first leg slowest. (9, 64, 576) reads a query matrix [576, 576] as
heads x channels x input; (576, 9, 64) an output matrix as output x heads x channels.

    T[i_1, .., i_d] = sum G[a_1, .., a_d] F_1[i_1, a_1] .. F_d[i_d, a_d]

Fitted by the truncated multilinear SVD, then by HOOI sweeps (De Lathauwer, De Moor, Vandewalle,
SIAM J. Matrix Anal. Appl. 21, 2000: alternating least squares with orthonormal factors; the error
never grows). The factors are orthonormal, so the squared error is ||T||^2 - ||G||^2.

Stored tensors, in order: G, then F_k [n_k, r_k] (gauge "none") or C_k [n_k - r_k, r_k] with pivots
[r_k] as indices (gauge "interpolative": F_k = P_k [I; C_k] F_k[pivots], the square goes into G).

>>> spec = NetworkSpec("tucker", (6, 4), (2, 3, 4), {"stack": (2, 3, 4)})
>>> network = Tucker.decompose(torch.eye(6)[:, :4], spec).interpolate()
>>> bool(torch.allclose(network.to_matrix(), torch.eye(6)[:, :4], atol=1e-6)), network.num_floats
(True, 24)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_lowercase, ascii_uppercase
from typing import ClassVar

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from qll.errors import ShapeError, UsageError
from qll.tn.contract import contract, plan
from qll.tn.entropy import von_neumann
from qll.tn.gauge import interpolative, write
from qll.tn.legs import exact, leading_basis, lookup, multiply, unfold
from qll.tn.network import GAUGES, NetworkSpec, TensorShapes
from qll.tn.svd import rank_for, singular_values

SWEEPS = 10
_ENOUGH = 1e-9  # a sweep that gains less of the squared norm is the last

_TOKEN = "Z"


@dataclass(frozen=True)
class Tucker:
    """A core and one factor per leg; bond k joins the core and factor k. See the module."""

    spec: NetworkSpec
    cores: tuple[Tensor, ...]
    indices: tuple[Tensor, ...] = ()
    name: ClassVar[str] = "tucker"

    @classmethod
    def tensor_shapes(cls, spec: NetworkSpec) -> TensorShapes:
        """Shapes stored for `spec` in its gauge; raises UsageError for a spec that cannot be."""
        _check(spec)
        pairs = list(zip(_legs(spec), spec.ranks, strict=True))
        if spec.gauge == "interpolative":
            rests = tuple((size - rank, rank) for size, rank in pairs)
            return TensorShapes((spec.ranks, *rests), tuple((rank,) for rank in spec.ranks))
        return TensorShapes((spec.ranks, *pairs))

    @classmethod
    def max_ranks(cls, spec: NetworkSpec) -> tuple[int, ...]:
        """Ranks at which any matrix of this shape is exact: min(n_k, product of the other legs)."""
        legs = _legs(spec)
        total = math.prod(legs)
        return tuple(min(size, total // size) for size in legs)

    @classmethod
    def clamp(cls, spec: NetworkSpec) -> NetworkSpec:
        """Lower ranks until r_k <= min(n_k, product of the other ranks), at least 1."""
        limits = cls.max_ranks(spec)
        if len(spec.ranks) != len(limits):
            raise UsageError(
                "Tucker has one rank per leg", expected=len(limits), found=len(spec.ranks)
            )
        ranks = [max(1, min(rank, top)) for rank, top in zip(spec.ranks, limits, strict=True)]
        widest = max(range(len(ranks)), key=ranks.__getitem__)  # no other can be above the product
        ranks[widest] = min(ranks[widest], math.prod(ranks) // ranks[widest])
        return spec.with_ranks(ranks)

    @classmethod
    def cut_spectra(
        cls, matrix: Float[Tensor, "out into"], spec: NetworkSpec
    ) -> list[Float64[Tensor, "_"]]:
        """Singular values of the unfolding of every leg (the multilinear singular values)."""
        tensor = _stack(matrix, spec)
        return [singular_values(unfold(tensor, leg)) for leg in range(tensor.ndim)]

    @classmethod
    def decompose(
        cls, matrix: Float[Tensor, "out into"], spec: NetworkSpec, sweeps: int = SWEEPS
    ) -> Tucker:
        """HOSVD (factor sqrt(d) of the best), improved by at most `sweeps` HOOI sweeps.

        Ranks are clamped; gauge "none"; cores in the matrix's dtype (float32 for half precision).
        Raises UsageError for legs that do not fit, ShapeError for a matrix of another shape.

        >>> spec = NetworkSpec("tucker", (6, 4), (1, 2, 2), {"stack": (2, 3, 4)})
        >>> [tuple(core.shape) for core in Tucker.decompose(torch.ones(6, 4), spec).cores]
        [(1, 2, 2), (2, 1), (3, 2), (4, 2)]
        """
        spec = cls.clamp(spec)
        core, factors = fit(exact(_stack(matrix, spec)), spec.ranks, sweeps)
        return _stored(spec, core, factors, like=matrix)

    @property
    def num_params(self) -> int:
        """Numbers stored, pivot indices counted."""
        return self.num_floats + sum(index.numel() for index in self.indices)

    @property
    def num_floats(self) -> int:
        """Floating-point numbers stored."""
        return sum(core.numel() for core in self.cores)

    def transform_legs(self, out: Sequence[Tensor | None], into: Sequence[Tensor | None]) -> Tucker:
        """Row leg k times out[k] (left), column leg k times into[k] (right); same gauge."""
        core, *factors = self.expand().cores
        sides = [*out, *(None if matrix is None else matrix.mT for matrix in into)]
        moved = [
            factor if side is None else side.to(factor) @ factor
            for factor, side in zip(factors, sides, strict=True)
        ]
        result = Tucker(self.spec.with_gauge("none"), (core, *moved))
        return result.interpolate() if self.spec.gauge == "interpolative" else result

    def interpolate(self) -> Tucker:
        """The same matrix in the interpolative gauge: sum r_k^2 numbers fewer."""
        if self.spec.gauge == "interpolative":
            return self
        core, *factors = (exact(stored) for stored in self.cores)
        rests, pivots = [], []
        for leg, factor in enumerate(factors):
            rest, chosen = interpolative(factor)
            core = multiply(core, leg, factor[chosen])
            rests.append(rest)
            pivots.append(chosen)
        like = self.cores[0]
        return Tucker(
            self.spec.with_gauge("interpolative"),
            tuple(stored.to(like) for stored in (core, *rests)),
            tuple(index.to(like.device) for index in pivots),
        )

    def expand(self) -> Tucker:
        """The same matrix with gauge "none": the identity blocks written out."""
        if self.spec.gauge == "none":
            return self
        pairs = zip(self.indices, self.cores[1:], strict=True)
        factors = (write(pivots, rest) for pivots, rest in pairs)
        return Tucker(self.spec.with_gauge("none"), (self.cores[0], *factors))

    def to_matrix(self) -> Float[Tensor, "out into"]:
        """The dense matrix."""
        legs = len(self.spec.ranks)
        equation = f"{_weights(legs)}->{ascii_uppercase[:legs]}"
        return contract(equation, *self.expand().cores).reshape(self.spec.shape)

    def apply(self, x: Float[Tensor, "*batch into"]) -> Float[Tensor, "*batch out"]:
        """W x for every vector x, in the order with the fewest FLOPs for this many.

        >>> spec = NetworkSpec("tucker", (4, 4), (2, 2, 4), {"stack": (2, 2, 4)})
        >>> Tucker.decompose(torch.eye(4), spec).apply(torch.arange(4.0)).round().abs().tolist()
        [0.0, 1.0, 2.0, 3.0]
        """
        rows, columns = _sides(self.spec)
        tokens = x.reshape(-1, *columns)
        y = contract(_applied(self.spec), tokens, *self.expand().cores, tokens=_TOKEN)
        return y.reshape(*x.shape[:-1], math.prod(rows))

    def rows(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch into"]:
        """Rows `ids`; neither the matrix nor a row factor is formed."""
        digits = torch.unravel_index(ids.reshape(-1), _sides(self.spec)[0])
        pivots = self.indices or [None] * len(self.spec.ranks)
        stored = list(zip(self.cores[1:], pivots, strict=True))
        cut = len(digits)
        terms, factors = [ascii_lowercase[: len(stored)]], []
        for bond, (core, chosen), digit in zip(terms[0], stored, digits, strict=False):
            terms.append(_TOKEN + bond)
            factors.append(lookup(core, chosen, digit))
        for bond, (core, chosen) in zip(terms[0][cut:], stored[cut:], strict=True):
            terms.append(bond.upper() + bond)
            factors.append(core if chosen is None else write(chosen, core))
        equation = f"{','.join(terms)}->{_TOKEN}{terms[0][cut:].upper()}"
        found = contract(equation, self.cores[0], *factors, tokens=_TOKEN)
        return found.reshape(*ids.shape, self.spec.shape[1])

    def flops(self, tokens: int) -> int:
        """Floating-point operations of `apply` to `tokens` vectors."""
        shapes = self.tensor_shapes(self.spec.with_gauge("none")).cores
        columns = _sides(self.spec)[1]
        order = plan(_applied(self.spec), ((tokens, *columns), *shapes), _TOKEN)
        return order.flops({_TOKEN: tokens})

    def bond_spectrum(self, k: int) -> Float64[Tensor, "_"]:
        """Singular values of the unfolding of leg k."""
        return singular_values(unfold(self._reduced()[0], k))

    def entropy(self, k: int) -> float:
        """Von Neumann entropy between leg k and the others, in nats."""
        return von_neumann(self.bond_spectrum(k))

    def round(self, *, rtol: float | None = None, ranks: Sequence[int] | None = None) -> Tucker:
        """Truncate to `ranks`, or to a relative Frobenius error of at most `rtol`; same gauge."""
        core, outer = self._reduced()
        if ranks is None:
            if rtol is None:
                raise UsageError("rounding needs a tolerance or ranks", where="Tucker.round")
            core, ranks = within(core, rtol)
        lower = [min(new, old) for new, old in zip(ranks, self.spec.ranks, strict=True)]
        spec = self.clamp(self.spec.with_ranks(lower))
        core, inner = fit(core, spec.ranks)
        factors = [left @ right for left, right in zip(outer, inner, strict=True)]
        result = _stored(spec, core, factors, like=self.cores[0])
        return result.interpolate() if self.spec.gauge == "interpolative" else result

    def _reduced(self) -> tuple[Tensor, list[Tensor]]:
        """Core between orthonormal factors, float64."""
        core, *factors = (exact(stored) for stored in self.expand().cores)
        outer = []
        for leg, factor in enumerate(factors):
            left, mix = torch.linalg.qr(factor)
            core = multiply(core, leg, mix)
            outer.append(left)
        return core, outer


def fit(
    tensor: Float64[Tensor, "..."], ranks: Sequence[int], sweeps: int = SWEEPS
) -> tuple[Float64[Tensor, "..."], list[Float64[Tensor, "_ _"]]]:
    """Core and orthonormal factors of `ranks`: sequential HOSVD, then HOOI until nothing is gained.

    >>> core, factors = fit(torch.ones(2, 3, 4).double(), (1, 1, 1))
    >>> round(core.square().sum().item(), 6)
    24.0
    """
    core, factors = tensor, []
    for leg, rank in enumerate(ranks):
        factors.append(leading_basis(unfold(core, leg), rank))
        core = multiply(core, leg, factors[leg].mT)
    total = tensor.square().sum().item()
    kept = core.square().sum().item()
    for _ in range(sweeps):
        for leg, rank in enumerate(ranks):
            projected = tensor
            for other, factor in enumerate(factors):
                if other != leg:
                    projected = multiply(projected, other, factor.mT)
            factors[leg] = leading_basis(unfold(projected, leg), rank)
            core = multiply(projected, leg, factors[leg].mT)
        before, kept = kept, core.square().sum().item()
        if kept - before <= _ENOUGH * total:
            break
    return core, factors


def within(tensor: Float64[Tensor, "..."], rtol: float) -> tuple[Float64[Tensor, "..."], list[int]]:
    """The tensor projected to relative error `rtol`, and the ranks that took.

    An equal share of the squared error per leg. Fitting the result at these ranks, clamped, loses
    nothing: a rank above the product of the others is redundant.

    >>> within(torch.ones(2, 3, 4).double(), 0.1)[1]
    [1, 1, 1]
    """
    share, ranks, core, bases = rtol / math.sqrt(tensor.ndim), [], tensor, []
    for leg in range(tensor.ndim):
        unfolded = unfold(tensor, leg)
        ranks.append(rank_for(singular_values(unfolded), share))
        bases.append(leading_basis(unfolded, ranks[leg]))
        core = multiply(core, leg, bases[leg].mT)
    for leg, basis in enumerate(bases):
        core = multiply(core, leg, basis)
    return core, ranks


def _stored(spec: NetworkSpec, core: Tensor, factors: Sequence[Tensor], like: Tensor) -> Tucker:
    dtype = torch.promote_types(like.dtype, torch.float32)
    cores = tuple(tensor.to(like.device, dtype).contiguous() for tensor in (core, *factors))
    return Tucker(spec.with_gauge("none"), cores)


def _stack(matrix: Tensor, spec: NetworkSpec) -> Tensor:
    legs = _legs(spec)
    if tuple(matrix.shape) != tuple(spec.shape):
        raise ShapeError(
            "matrix differs from its spec", where="tucker", expected=spec.shape, found=matrix.shape
        )
    return matrix.reshape(legs)


def _legs(spec: NetworkSpec) -> tuple[int, ...]:
    rows, columns = _sides(spec)
    return rows + columns


def _sides(spec: NetworkSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Row legs and column legs: where the running product of the stack reaches the row count."""
    legs = tuple(spec.modes.get("stack", ()))
    for cut in range(1, len(legs)):
        if (math.prod(legs[:cut]), math.prod(legs[cut:])) == tuple(spec.shape):
            return legs[:cut], legs[cut:]
    raise UsageError(
        "no cut of the stack's legs gives the matrix's rows and columns",
        where="tucker",
        expected=spec.shape,
        found=legs,
        hint='choose modes {"stack": legs} whose leading legs multiply to the row count',
    )


def _weights(legs: int) -> str:
    """The einsum terms of core and factors: bonds a b c.., legs A B C.."""
    bonds = ascii_lowercase[:legs]
    return ",".join([bonds, *(bond.upper() + bond for bond in bonds)])


def _applied(spec: NetworkSpec) -> str:
    """The einsum equation of x [tokens, column legs], core and factors."""
    rows, columns = _sides(spec)
    legs = ascii_uppercase[: len(rows) + len(columns)]
    into, out = legs[len(rows) :], legs[: len(rows)]
    return f"{_TOKEN}{into},{_weights(len(legs))}->{_TOKEN}{out}"


def _check(spec: NetworkSpec) -> None:
    if spec.gauge not in GAUGES:
        raise UsageError("unknown gauge", where="tucker", expected=GAUGES, found=spec.gauge)
    allowed = Tucker.clamp(spec).ranks
    if allowed != tuple(spec.ranks):
        raise UsageError(
            "ranks are not what their neighbours allow",
            where="tucker",
            expected=allowed,
            found=spec.ranks,
            hint="call Tucker.clamp(spec) first",
        )
