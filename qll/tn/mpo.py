"""Matrix product operator: a matrix as a chain of cores, one per pair of an out and an in leg.

W[(o_1..o_d), (i_1..i_d)] = G_1[o_1, i_1] G_2[o_2, i_2] .. G_d[o_d, i_d], a product of matrices;
core k is [r_left, m_k, n_k, r_right] with boundary bonds 1. Decomposed by TT-SVD (Oseledets 2011,
alg. 1): in that left-to-right sweep the squared error is exactly the sum of what each bond drops.
Gauge "interpolative" stores every core but the last as its coefficients C, [r_left m n - r_right,
r_right], plus the pivots of its bond (qll.tn.gauge), saving the sum of r_k^2.

>>> first, second = torch.randn(3, 2), torch.randn(4, 5)
>>> modes = {"out": (3, 4), "in": (2, 5)}
>>> spec = NetworkSpec("mpo", (12, 10), ranks=(1,), modes=modes)
>>> network = MPO.decompose(torch.kron(first, second), spec)
>>> torch.allclose(network.to_matrix(), torch.kron(first, second), atol=1e-5)
True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from qll.errors import UsageError
from qll.tn.contract import Plan, bucket, chain, contract, plan
from qll.tn.entropy import site_spectra, von_neumann
from qll.tn.gauge import interpolative, write
from qll.tn.legs import lookup
from qll.tn.modes import merge, paired_modes, split
from qll.tn.network import NetworkSpec, TensorShapes
from qll.tn.svd import singular_values, widened
from qll.tn.sweep import canonical, tensor_train, truncated

_ROWS_CHUNK = 1 << 24  # numbers of one gathered core in `rows`


@dataclass(frozen=True)
class MPO:
    """A chain of cores; see the module for the two gauges. Bond k is between cores k and k + 1."""

    spec: NetworkSpec
    cores: tuple[Tensor, ...]
    indices: tuple[Tensor, ...] = ()
    name: ClassVar[str] = "mpo"

    # -- closed forms ------------------------------------------------------------------------
    @classmethod
    def tensor_shapes(cls, spec: NetworkSpec) -> TensorShapes:
        """Shapes of the cores in the gauge of `spec`, whose ranks must be clamped.

        >>> modes = {"out": (3, 4), "in": (2, 5)}
        >>> MPO.tensor_shapes(NetworkSpec("mpo", (12, 10), (6,), modes, "interpolative")).cores
        ((0, 6), (6, 4, 5, 1))
        """
        full = _core_shapes(spec)
        if spec.gauge == "none":
            return TensorShapes(full)
        stored = tuple((prod(core[:3]) - core[3], core[3]) for core in full[:-1])
        return TensorShapes((*stored, full[-1]), tuple((rank,) for rank in spec.ranks))

    @classmethod
    def max_ranks(cls, spec: NetworkSpec) -> tuple[int, ...]:
        """Per bond, the smaller of the sizes left and right of it.

        >>> modes = {"out": (2, 2, 2), "in": (2, 2, 2)}
        >>> MPO.max_ranks(NetworkSpec("mpo", (8, 8), modes=modes))
        (4, 4)
        """
        sites = _site_sizes(spec)
        return tuple(min(prod(sites[:k]), prod(sites[k:])) for k in range(1, len(sites)))

    @classmethod
    def clamp(cls, spec: NetworkSpec) -> NetworkSpec:
        """Each rank within 1 .. what its neighbours and sites allow."""
        sites = _site_sizes(spec)
        if len(spec.ranks) != len(sites) - 1:
            raise UsageError(
                "one rank per bond is needed",
                where=spec.format,
                expected=len(sites) - 1,
                found=spec.ranks,
            )
        ranks = [max(1, rank) for rank in spec.ranks]
        left = 1
        for k, rank in enumerate(ranks):
            left = ranks[k] = min(rank, left * sites[k])
        right = 1
        for k in reversed(range(len(ranks))):
            right = ranks[k] = min(ranks[k], right * sites[k + 1])
        return spec.with_ranks(ranks)

    # -- from a matrix -----------------------------------------------------------------------
    @classmethod
    def cut_spectra(cls, matrix: Float[Tensor, "out into"], spec: NetworkSpec) -> list[Tensor]:
        """Singular values of the unfolding at each bond, descending, float64."""
        return site_spectra(matrix, *paired_modes(spec.modes, spec.shape))

    @classmethod
    def decompose(cls, matrix: Float[Tensor, "out into"], spec: NetworkSpec) -> MPO:
        """TT-SVD: at most sqrt(d - 1) times the error of the best MPO of these ranks.

        All cores but the last are left-orthogonal; they have the dtype of `matrix`. Raises
        NonFiniteError, ConvergenceError, and UsageError for modes that do not fit.
        """
        spec = cls.clamp(spec).with_gauge("none")
        sites = split(matrix, *paired_modes(spec.modes, spec.shape))
        cores, _ = tensor_train(sites, ranks=spec.ranks)
        return cls(spec, tuple(core.to(matrix) for core in cores))

    # -- verbs -------------------------------------------------------------------------------
    def transform_legs(self, out: Sequence[Tensor | None], into: Sequence[Tensor | None]) -> MPO:
        """(out[0] x .. x out[d-1]) W (into[0] x .. x into[d-1]), Kronecker products of legs.

        None leaves a leg as it is; the gauge is kept.
        """
        cores = self.expand().cores
        if len(out) != len(cores) or len(into) != len(cores):
            raise UsageError(
                "one factor or None per leg is needed",
                expected=len(cores),
                found=(len(out), len(into)),
            )
        changed = []
        for core, left, right in zip(cores, out, into, strict=True):
            if left is not None:
                core = torch.einsum("aoib,po->apib", core, left.to(core))
            if right is not None:
                core = torch.einsum("aoib,ij->aojb", core, right.to(core))
            changed.append(core)
        return self._same_gauge(changed)

    def interpolate(self) -> MPO:
        """The same matrix, every bond in the interpolative gauge."""
        if self.spec.gauge == "interpolative":
            return self
        stored, pivots = [], []
        carry = widened(self.cores[0].new_ones(1, 1))
        for core in self.cores[:-1]:
            left = (carry @ widened(core).flatten(1)).reshape(-1, core.shape[3])
            coefficients, chosen = interpolative(left)
            stored.append(coefficients.to(core))
            pivots.append(chosen.to(core.device))
            carry = left[chosen]
        last = self.cores[-1]
        stored.append((carry @ widened(last).flatten(1)).reshape(last.shape).to(last))
        return MPO(self.spec.with_gauge("interpolative"), tuple(stored), tuple(pivots))

    def expand(self) -> MPO:
        """The same matrix with every core as [r_left, out, in, r_right]."""
        if self.spec.gauge == "none":
            return self
        written = [
            write(pivots, coefficients).reshape(shape)
            for pivots, coefficients, shape in zip(
                self.indices, self.cores[:-1], _core_shapes(self.spec)[:-1], strict=True
            )
        ]
        return MPO(self.spec.with_gauge("none"), (*written, self.cores[-1]))

    def canonicalize(self, center: int) -> MPO:
        """The same matrix, gauge "none", cores left of `center` left-orthogonal, right of it right.

        >>> spec = NetworkSpec("mpo", (4, 4), (4,), {"out": (2, 2), "in": (2, 2)})
        >>> last = MPO.decompose(torch.randn(4, 4), spec).canonicalize(0).cores[1].flatten(1)
        >>> torch.allclose(last @ last.mT, torch.eye(4), atol=1e-5)
        True
        """
        cores = canonical([widened(core) for core in self.expand().cores], center)
        return self._with([core.to(self.cores[-1]) for core in cores])

    def to_matrix(self) -> Float[Tensor, "out into"]:
        """W, padding removed."""
        tensor = contract(chain(len(self.cores), False), *_open(self.expand().cores))
        return merge(tensor, self.spec.shape)

    def apply(self, x: Float[Tensor, "*batch into"]) -> Float[Tensor, "*batch out"]:
        """W x for each row of `x`, in the cheapest order: a sweep from either side, or W first."""
        out_modes, in_modes = self.spec.modes["out"], self.spec.modes["in"]
        flat = x.reshape(-1, x.shape[-1])
        padding = prod(in_modes) - self.spec.shape[1]
        flat = torch.nn.functional.pad(flat, (0, padding)) if padding else flat
        legs = flat.reshape(flat.shape[0], *in_modes)  # refuses any other width of x
        image = contract(
            chain(len(self.cores), True), legs, *_open(self.expand().cores), tokens="a"
        )
        rows = self.spec.shape[0]
        return image.reshape(-1, prod(out_modes))[:, :rows].reshape(*x.shape[:-1], rows)

    def rows(self, ids: Int[Tensor, "*ids"]) -> Float[Tensor, "*ids into"]:
        """Rows `ids` of W: per id one slice of each core, multiplied left to right."""
        per_id = max(prod(shape) // shape[1] for shape in _core_shapes(self.spec))
        chunks = ids.reshape(-1).split(max(1, _ROWS_CHUNK // per_id))
        found = torch.cat([self._row_chain(chunk) for chunk in chunks])
        return found[:, : self.spec.shape[1]].reshape(*ids.shape, self.spec.shape[1])

    def flops(self, tokens: int) -> int:
        """FLOPs of `apply` on `tokens` rows, in the order it takes."""
        return _plan(self.spec, tokens).flops({"a": tokens})

    def bond_spectrum(self, k: int) -> Float64[Tensor, "r"]:
        """Singular values of the unfolding at bond k, from the canonical form, never from W."""
        cores = canonical([widened(core) for core in self.expand().cores], k)
        return singular_values(cores[k].flatten(0, 2))

    def entropy(self, k: int) -> float:
        """Von Neumann entropy of site cut k + 1 (bond k), nats."""
        return von_neumann(self.bond_spectrum(k))

    def round(self, *, rtol: float | None = None, ranks: Sequence[int] | None = None) -> MPO:
        """A quasi-optimal MPO of lower ranks: relative error <= `rtol`, ranks <= `ranks`.

        TT-rounding (Oseledets 2011, alg. 2): QR from the right, truncated SVDs from the left. The
        gauge is kept.

        >>> spec = NetworkSpec("mpo", (4, 4), (4,), {"out": (2, 2), "in": (2, 2)})
        >>> MPO.decompose(torch.eye(4), spec).round(rtol=1e-6).spec.ranks
        (1,)
        """
        cores = canonical([widened(core) for core in self.expand().cores], 0)
        rounded, _ = truncated(cores, ranks, rtol)
        return self._same_gauge([core.to(self.cores[-1]) for core in rounded])

    # -- private -----------------------------------------------------------------------------
    def _row_chain(self, ids: Tensor) -> Tensor:
        """[ids, n_1 .. n_d]: the digit of each id at each site picks a slice of that core."""
        stride = prod(self.spec.modes["out"])
        state = self.cores[0].new_ones(ids.shape[0], 1, 1)
        for k, (left, out, into, right) in enumerate(_core_shapes(self.spec)):
            stride //= out
            # without the remainder in the first digit an id beyond the table is an index error
            digit = (ids // stride % out if k else ids // stride)[:, None, None]
            bond, leg = (torch.arange(size, device=ids.device) for size in (left, into))
            wanted = (bond[:, None] * out + digit) * into + leg
            pivots = self.indices[k] if k < len(self.indices) else None
            slices = lookup(self.cores[k].reshape(-1, right), pivots, wanted)  # [ids, r, n, r']
            columns = state.shape[1] * into
            state = torch.bmm(state, slices.flatten(2)).reshape(ids.shape[0], columns, right)
        return state.flatten(1)

    def _with(self, cores: Sequence[Tensor]) -> MPO:
        ranks = [core.shape[0] for core in cores[1:]]
        return MPO(self.spec.with_gauge("none").with_ranks(ranks), tuple(cores))

    def _same_gauge(self, cores: Sequence[Tensor]) -> MPO:
        network = self._with(cores)
        return network if self.spec.gauge == "none" else network.interpolate()


def _open(cores: Sequence[Tensor]) -> list[Tensor]:
    """Cores without the two boundary bonds of size 1."""
    opened = list(cores)
    opened[0] = opened[0].squeeze(0)
    opened[-1] = opened[-1].squeeze(-1)
    return opened


def _plan(spec: NetworkSpec, tokens: int) -> Plan:
    shapes = list(_core_shapes(spec))
    shapes[0] = shapes[0][1:]
    shapes[-1] = shapes[-1][:-1]
    legs = (bucket(tokens), *spec.modes["in"])
    return plan(chain(len(shapes), True), (legs, *shapes), "a")


def _core_shapes(spec: NetworkSpec) -> tuple[tuple[int, ...], ...]:
    bonds = (1, *spec.ranks, 1)
    legs = zip(spec.modes["out"], spec.modes["in"], strict=True)
    return tuple(
        (left, *pair, right) for left, pair, right in zip(bonds, legs, bonds[1:], strict=False)
    )


def _site_sizes(spec: NetworkSpec) -> tuple[int, ...]:
    out, into = paired_modes(spec.modes, spec.shape)
    return tuple(m * n for m, n in zip(out, into, strict=True))
