"""Several matrices that read the same input, as one tree whose members share the input bond.

    W_j = U_j T_j B      U_j [out_j, r_j]    T_j [r_j, r_shared]    B [r_shared, in]

Query, key and value (or gate and up) see the same vectors, so one basis B of the input serves all
of them; it is paid for once. A member whose own rank cannot be below its neighbours' (r_j =
min(out_j, r_shared)) has no bond of its own: U_j absorbs T_j and is [out_j, r_shared]. When that
holds for all members the tree is a star. The fit is a leaves-to-root hierarchical SVD (Grasedyck,
SIAM J. Matrix Anal. Appl. 31, 2010): the squared error is the sum of the discarded squared singular
values over the bonds, exactly.

Stored tensors, in order (S = stack over members of T_j, or of U_j where there is no T_j; K rows):

- gauge "none": B, then for every member U_j and, where the member has a bond of its own, T_j.
- gauge "interpolative": S = P [I; C] S[pivots] is written once for the stack, so that pivots may
  come from any member and r_shared^2 numbers are saved whatever the data; likewise
  U_j = P_j [I; C_j]. Cores B, C [K - r_shared, r_shared], then C_j [out_j - r_j, r_j]; indices
  pivots [r_shared], then pivots_j [r_j]. A member finds its rows of S by its pivot buffer.

>>> matrices = [torch.eye(6)[:4], torch.eye(6)[2:]]
>>> spec = NetworkSpec("joint_tree", (8, 6), (6, 4, 4), members=((4, 6), (4, 6)))
>>> network = JointTree.decompose(matrices, spec).interpolate()
>>> bool(torch.allclose(network.to_matrix(1), matrices[1])), network.num_floats
(True, 48)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from qll.errors import ShapeError, UsageError
from qll.tn.entropy import von_neumann
from qll.tn.gauge import interpolative, row_order, write
from qll.tn.legs import exact, leading_basis, lookup, onto_leg
from qll.tn.network import GAUGES, NetworkSpec, TensorShapes
from qll.tn.svd import rank_for, singular_values


@dataclass(frozen=True)
class JointTree:
    """Matrices W_j = U_j T_j B that share their input bond; see the module for what is stored.

    ranks = (r_shared, r_1, ..., r_J); bond 0 is the shared one, bond j + 1 that of member j.
    """

    spec: NetworkSpec
    cores: tuple[Tensor, ...]
    indices: tuple[Tensor, ...] = ()
    name: ClassVar[str] = "joint_tree"

    @classmethod
    def tensor_shapes(cls, spec: NetworkSpec) -> TensorShapes:
        """Shapes stored for `spec` in its gauge; raises UsageError for a spec that cannot be."""
        _check(spec)
        shared, into = spec.ranks[0], spec.shape[1]
        members = _layout(spec.members, spec.ranks)
        rows = sum(member.rows for member in members)
        branches = [member for member in members if member.branch]
        if spec.gauge == "interpolative":
            rests = [(member.out - member.rank, member.rank) for member in branches]
            pivots = [(member.rank,) for member in branches]
            cores = [(shared, into), (rows - shared, shared), *rests]
            return TensorShapes(tuple(cores), ((shared,), *pivots))
        cores = [(shared, into)]
        for member in members:
            cores.append((member.out, member.rank if member.branch else shared))
            if member.branch:
                cores.append((member.rank, shared))
        return TensorShapes(tuple(cores))

    @classmethod
    def max_ranks(cls, spec: NetworkSpec) -> tuple[int, ...]:
        """Ranks at which any matrices of these shapes are represented exactly."""
        shared = min(spec.shape[1], sum(out for out, _ in spec.members))
        return (shared, *(min(out, shared) for out, _ in spec.members))

    @classmethod
    def clamp(cls, spec: NetworkSpec) -> NetworkSpec:
        """Lower to r_shared <= min(in, sum r_j) and r_j <= min(out_j, r_shared), at least 1."""
        limits = cls.max_ranks(spec)
        if len(spec.ranks) != len(limits):
            raise _rank_count(spec, len(limits))
        shared, *own = (
            max(1, min(rank, top)) for rank, top in zip(spec.ranks, limits, strict=True)
        )
        own = [min(rank, shared) for rank in own]
        return spec.with_ranks((min(shared, sum(own)), *own))

    @classmethod
    def cut_spectra(
        cls, matrices: Sequence[Float[Tensor, "_ into"]], spec: NetworkSpec
    ) -> list[Float64[Tensor, "_"]]:
        """Singular values of the stacked matrix, then of each member: one spectrum per bond."""
        _check_matrices(matrices, spec)
        return [singular_values(matrix) for matrix in (torch.cat(list(matrices)), *matrices)]

    @classmethod
    def decompose(cls, matrices: Sequence[Float[Tensor, "_ into"]], spec: NetworkSpec) -> JointTree:
        """Quasi-optimal tree (factor sqrt(J + 1)) of `spec.ranks`, Frobenius norm, gauge "none".

        Ranks are clamped; cores have the members' dtype (float32 for half precision).
        Raises UsageError for members that do not fit the shape, ShapeError for other matrices.

        >>> spec = NetworkSpec("joint_tree", (5, 4), (2, 2, 1), members=((3, 4), (2, 4)))
        >>> tree = JointTree.decompose([torch.ones(3, 4), torch.ones(2, 4)], spec)
        >>> [tuple(core.shape) for core in tree.cores]
        [(2, 4), (3, 2), (2, 1), (1, 2)]
        """
        _check_members(spec)
        _check_matrices(matrices, spec)
        spec = cls.clamp(spec)
        basis, factors = _fit([exact(matrix) for matrix in matrices], spec.ranks)
        return _assemble(spec, basis, factors, like=matrices[0])

    @property
    def num_params(self) -> int:
        """Numbers stored, pivot indices counted."""
        return self.num_floats + sum(index.numel() for index in self.indices)

    @property
    def num_floats(self) -> int:
        """Floating-point numbers stored."""
        return sum(core.numel() for core in self.cores)

    @property
    def members(self) -> int:
        """How many matrices share the tree."""
        return len(self.spec.members)

    @classmethod
    def readers(cls, spec: NetworkSpec) -> tuple[int, ...]:
        """How many members share `project(x)` with each, itself counted: all of them."""
        return (len(spec.members),) * len(spec.members)

    def applied_shape(self, member: int) -> tuple[int, int]:
        """(out, in) of what `apply` does."""
        return self.spec.members[member]

    def transform_legs(
        self, out: Sequence[Tensor | None], into: Sequence[Tensor | None]
    ) -> JointTree:
        """W_j -> out[j] W_j into[0]; None leaves a leg as it is. The gauge is kept."""
        plain = self.expand()
        cores = list(plain.cores)
        if into[0] is not None:
            cores[0] = cores[0] @ into[0].to(cores[0])
        for position, matrix in zip(_leaf_positions(self.spec), out, strict=True):
            if matrix is not None:
                cores[position] = matrix.to(cores[position]) @ cores[position]
        moved = replace(plain, cores=tuple(cores))
        return moved.interpolate() if self.spec.gauge == "interpolative" else moved

    def interpolate(self) -> JointTree:
        """The same matrices in the interpolative gauge: r_shared^2 + sum r_j^2 numbers fewer."""
        if self.spec.gauge == "interpolative":
            return self
        basis, *_ = cores = [exact(core) for core in self.cores]
        stack, own = [], []
        for member, position in zip(self._layout, _leaf_positions(self.spec), strict=True):
            if member.branch:
                rest, pivots = interpolative(cores[position])
                own.append((rest, pivots))
                stack.append(cores[position][pivots] @ cores[position + 1])
            else:
                stack.append(cores[position])
        rows = torch.cat(stack)
        rest, pivots = interpolative(rows)
        stored = (rows[pivots] @ basis, rest, *(item[0] for item in own))
        return JointTree(
            self.spec.with_gauge("interpolative"),
            tuple(core.to(self.cores[0]) for core in stored),
            tuple(index.to(self.cores[0].device) for index in (pivots, *(item[1] for item in own))),
        )

    def expand(self) -> JointTree:
        """The same matrices with gauge "none": the identity blocks written out."""
        if self.spec.gauge == "none":
            return self
        basis, rest, *own = self.cores
        stack = write(self.indices[0], rest)
        cores, branch = [basis], 0
        for member in self._layout:
            rows = stack[member.start : member.start + member.rows]
            if member.branch:
                cores.append(write(self.indices[1 + branch], own[branch]))
                branch += 1
            cores.append(rows)
        return JointTree(self.spec.with_gauge("none"), tuple(cores))

    def project(self, x: Float[Tensor, "*batch into"]) -> Float[Tensor, "*batch shared"]:
        """The part of W_j x that all members share, to be passed to `apply` as `shared`.

        Gauge "none": x B^T. Interpolative: all K rows of S B x at once, pivot rows first, so that
        a member has only its rows to pick.
        """
        bond = x @ self.cores[0].mT
        if self.spec.gauge == "none":
            return bond
        return torch.cat([bond, bond @ self.cores[1].mT], -1)

    def apply(
        self,
        x: Float[Tensor, "*batch into"],
        member: int,
        shared: Float[Tensor, "*batch shared"] | None = None,
    ) -> Float[Tensor, "*batch out"]:
        """W_member x for every vector x; `shared` is `project(x)` if it is known already.

        >>> spec = NetworkSpec("joint_tree", (5, 4), (4, 3, 2), members=((3, 4), (2, 4)))
        >>> tree = JointTree.decompose([torch.ones(3, 4), torch.eye(4)[:2]], spec).interpolate()
        >>> tree.apply(torch.arange(4.0), 1).round().tolist()
        [0.0, 1.0]
        """
        shared = self.project(x) if shared is None else shared
        place = self._layout[member]
        if self.spec.gauge == "none":
            position = _leaf_positions(self.spec)[member]
            inner = shared @ self.cores[position + 1].mT if place.branch else shared
            return inner @ self.cores[position].mT
        order = row_order(self.indices[0], shared.shape[-1])
        own = shared.index_select(-1, order[place.start : place.start + place.rows])
        if not place.branch:
            return own
        bond = self._bond(member)
        return onto_leg(own, self.cores[1 + bond], self.indices[bond])

    def to_matrix(self, member: int) -> Float[Tensor, "out into"]:
        """W_member as a dense matrix."""
        return self._leaf(member) @ self.cores[0]

    def rows(self, ids: Int[Tensor, "*batch"], member: int) -> Float[Tensor, "*batch into"]:
        """Rows `ids` of W_member; the matrix is not formed."""
        place = self._layout[member]
        if self.spec.gauge == "none":
            position = _leaf_positions(self.spec)[member]
            picked = self.cores[position][ids]
            inner = picked @ self.cores[position + 1] if place.branch else picked
        elif place.branch:
            bond = self._bond(member)
            own = lookup(self.cores[1 + bond], self.indices[bond], ids)
            steps = torch.arange(place.start, place.start + place.rows, device=ids.device)
            inner = own @ lookup(self.cores[1], self.indices[0], steps)
        else:
            inner = lookup(self.cores[1], self.indices[0], ids + place.start)
        return inner @ self.cores[0]

    def flops(self, tokens: int) -> int:
        """Floating-point operations of applying every member to the same `tokens` vectors."""
        return 2 * tokens * self.num_floats

    def bond_spectrum(self, k: int) -> Float[Tensor, " values"]:
        """Singular values over bond k: 0 cuts outputs from input, j + 1 cuts member j off."""
        _, _, smalls = self._reduced()
        return singular_values(torch.cat(smalls) if k == 0 else smalls[k - 1])

    def entropy(self, k: int) -> float:
        """Von Neumann entropy over bond k, in nats."""
        return von_neumann(self.bond_spectrum(k))

    def round(self, *, rtol: float | None = None, ranks: Sequence[int] | None = None) -> JointTree:
        """Truncate to `ranks`, or so that the relative Frobenius error of all is at most `rtol`.

        Keeps the gauge. Works on the small matrices between orthonormal factors.
        """
        outer, rows, smalls = self._reduced()
        if ranks is None:
            if rtol is None:
                raise UsageError("rounding needs a tolerance or ranks", where="JointTree.round")
            smalls, ranks = _within(smalls, rtol)
        lower = [min(new, old) for new, old in zip(ranks, self.spec.ranks, strict=True)]
        spec = self.clamp(self.spec.with_ranks(lower))
        basis, factors = _fit(smalls, spec.ranks)
        lifted = [
            (left, small) if transfer is None else (left @ small, transfer)
            for left, (small, transfer) in zip(outer, factors, strict=True)
        ]
        result = _assemble(spec, basis @ rows, lifted, like=self.cores[0])
        return result.interpolate() if self.spec.gauge == "interpolative" else result

    @property
    def _layout(self) -> tuple[_Member, ...]:
        return _layout(self.spec.members, self.spec.ranks)

    def _bond(self, member: int) -> int:
        """Number of a branch member's own bond among the stored ones."""
        return 1 + sum(other.branch for other in self._layout[:member])

    def _leaf(self, member: int) -> Float[Tensor, "out shared"]:
        """U_j T_j, the member's map from the shared bond to its output."""
        plain = self.expand()
        position = _leaf_positions(self.spec)[member]
        leaf = plain.cores[position]
        return leaf @ plain.cores[position + 1] if self._layout[member].branch else leaf

    def _reduced(self) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """Orthonormal Q_j [out_j, k_j], rows V and small M_j with W_j = Q_j M_j V, float64."""
        plain = self.expand()
        cores = [exact(core) for core in plain.cores]
        rows, mix = torch.linalg.qr(cores[0].mT)
        outer, smalls = [], []
        for member, position in zip(self._layout, _leaf_positions(self.spec), strict=True):
            left, small = torch.linalg.qr(cores[position])
            small = small @ cores[position + 1] if member.branch else small
            outer.append(left)
            smalls.append(small @ mix.mT)
        return outer, rows.mT, smalls


@dataclass(frozen=True)
class _Member:
    """A member's place: its bond, and its rows in the stack over the shared bond."""

    out: int
    rank: int
    branch: bool
    start: int
    rows: int


@lru_cache(maxsize=1024)
def _layout(members: tuple[tuple[int, int], ...], ranks: tuple[int, ...]) -> tuple[_Member, ...]:
    layout, start = [], 0
    for (out, _), rank in zip(members, ranks[1:], strict=True):
        branch = rank < min(out, ranks[0])
        rows = rank if branch else out
        layout.append(_Member(out, rank, branch, start, rows))
        start += rows
    return tuple(layout)


def _leaf_positions(spec: NetworkSpec) -> list[int]:
    """Position of every U_j among the cores of gauge "none" (T_j, if any, is the next one)."""
    positions, position = [], 1
    for member in _layout(spec.members, spec.ranks):
        positions.append(position)
        position += 2 if member.branch else 1
    return positions


def _fit(
    matrices: Sequence[Tensor], ranks: Sequence[int]
) -> tuple[Tensor, list[tuple[Tensor, Tensor | None]]]:
    """Shared basis of the stack, then (U_j, T_j) per member; T_j None if nothing is cut."""
    basis = leading_basis(torch.cat(list(matrices)).mT, ranks[0]).mT
    factors: list[tuple[Tensor, Tensor | None]] = []
    for matrix, rank in zip(matrices, ranks[1:], strict=True):
        inner = matrix @ basis.mT
        if rank >= min(inner.shape):
            factors.append((inner, None))
        else:
            left = leading_basis(inner, rank)
            factors.append((left, left.mT @ inner))
    return basis, factors


def _assemble(
    spec: NetworkSpec,
    basis: Tensor,
    factors: Sequence[tuple[Tensor, Tensor | None]],
    like: Tensor,
) -> JointTree:
    """Cores of gauge "none" from a basis and factors, in the dtype and on the device of `like`."""
    cores = [basis]
    for member, (left, transfer) in zip(_layout(spec.members, spec.ranks), factors, strict=True):
        if member.branch and transfer is not None:
            cores += [left, transfer]
        else:
            cores.append(left if transfer is None else left @ transfer)
    dtype = torch.promote_types(like.dtype, torch.float32)
    stored = tuple(core.to(like.device, dtype).contiguous() for core in cores)
    return JointTree(spec.with_gauge("none"), stored)


def _within(matrices: Sequence[Tensor], rtol: float) -> tuple[list[Tensor], list[int]]:
    """The matrices truncated to relative error `rtol`, half of it (squared) at either level.

    With the ranks used. Fitting the result at those ranks clamped is exact: a bond wider than its
    neighbours together is redundant.
    """
    share = rtol / math.sqrt(2)
    spectra = [singular_values(matrix) for matrix in (torch.cat(list(matrices)), *matrices)]
    shared, *own = (rank_for(spectrum, share) for spectrum in spectra)
    ranks = [shared, *(min(rank, shared) for rank in own)]
    basis, factors = _fit(matrices, ranks)
    inner = (left if transfer is None else left @ transfer for left, transfer in factors)
    return [matrix @ basis for matrix in inner], ranks


def _check_members(spec: NetworkSpec) -> None:
    outs = [out for out, _ in spec.members]
    if not outs or spec.shape[0] != sum(outs) or any(n != spec.shape[1] for _, n in spec.members):
        raise UsageError(
            "the members of a joint tree share one input and their outputs add up to the shape",
            where=spec.format,
            expected=spec.shape,
            found=spec.members,
        )


def _check(spec: NetworkSpec) -> None:
    _check_members(spec)
    if spec.gauge not in GAUGES:
        raise UsageError("unknown gauge", where=spec.format, expected=GAUGES, found=spec.gauge)
    allowed = JointTree.clamp(spec).ranks
    if allowed != tuple(spec.ranks):
        raise UsageError(
            "ranks are not what their neighbours allow",
            where=spec.format,
            expected=allowed,
            found=spec.ranks,
            hint="call JointTree.clamp(spec) first",
        )


def _rank_count(spec: NetworkSpec, expected: int) -> UsageError:
    return UsageError(
        "a joint tree has one rank for the shared bond and one per member",
        where=spec.format,
        expected=expected,
        found=len(spec.ranks),
    )


def _check_matrices(matrices: Sequence[Tensor], spec: NetworkSpec) -> None:
    found = tuple(tuple(matrix.shape) for matrix in matrices)
    if found != tuple(spec.members):
        raise ShapeError(
            "matrices differ from the members of the spec",
            where=spec.format,
            expected=spec.members,
            found=found,
        )
