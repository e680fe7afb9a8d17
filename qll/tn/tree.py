"""Tree: hierarchical Tucker of one matrix, its row and column legs paired at the leaves.

modes {"out": (m_1, .., m_d), "in": (n_1, .., n_d)}: leaf k carries the pair (m_k, n_k), the leaves
stand in this order under a balanced binary tree (the left half has the odd one). The root would
only join its two children, so it is contracted into the right one, the *sink*: 2 d - 2 cores, 2 d -
3 bonds, every bond pointing at the sink. Modes may multiply to more than the shape (zero padding).

Cores, bonds and ranks are numbered in post-order: left subtree, right subtree, children before
parents; core k owns bond k, and the sink is the last core. A leaf is [m, n, r], an inner core
[r_left, r_right, r], where r of the sink is the bond from the left half. Gauge "interpolative":
each core but the sink, as a matrix [K, r], is P [I; C] R; C [K - r, r] is stored, R goes up.

Fitted from the leaves to the root (Grasedyck, SIAM J. Matrix Anal. Appl. 31, 2010): every step is
an orthogonal projection, so the squared error is the sum of the discarded weights, at most 2 d - 3
times the best; all cores but the sink are isometries.

>>> spec = NetworkSpec("tree", (8, 8), (1,) * 3, {"out": (2, 2, 2), "in": (2, 2, 2)})
>>> network = Tree.decompose(torch.eye(8), spec).interpolate()  # a product operator: rank 1
>>> bool(torch.allclose(network.to_matrix(), torch.eye(8), atol=1e-6)), network.num_floats
(True, 10)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.nn.functional import pad

from qll.errors import ShapeError, UsageError
from qll.tn.contract import contract, plan
from qll.tn.entropy import von_neumann
from qll.tn.gauge import interpolative, write
from qll.tn.legs import exact, leading_basis, lookup, multiply, unfold
from qll.tn.modes import merge, paired_modes, split
from qll.tn.network import GAUGES, NetworkSpec, TensorShapes
from qll.tn.svd import rank_for, singular_values
from qll.tn.topology import (
    TOKEN,
    Node,
    applied,
    core_shapes,
    core_terms,
    leaves,
    lowered,
    nodes,
)

MAX_SITES = 12


@dataclass(frozen=True)
class Tree:
    """Leaves [m_k, n_k, r] and inner cores [r_left, r_right, r]; see the module for their order."""

    spec: NetworkSpec
    cores: tuple[Tensor, ...]
    indices: tuple[Tensor, ...] = ()
    name: ClassVar[str] = "tree"

    @classmethod
    def tensor_shapes(cls, spec: NetworkSpec) -> TensorShapes:
        """Shapes stored for `spec` in its gauge; raises UsageError for a spec that cannot be."""
        if spec.gauge not in GAUGES:
            raise UsageError("unknown gauge", where="tree", expected=GAUGES, found=spec.gauge)
        allowed = cls.clamp(spec).ranks
        if allowed != tuple(spec.ranks):
            raise UsageError(
                "ranks are not what their neighbours allow",
                where="tree",
                expected=allowed,
                found=spec.ranks,
                hint="call Tree.clamp(spec) first",
            )
        shapes = _shapes_of(spec)
        if spec.gauge == "none":
            return TensorShapes(shapes)
        rests = tuple((a * b - rank, rank) for a, b, rank in shapes[:-1])
        return TensorShapes((*rests, shapes[-1]), tuple((rank,) for rank in spec.ranks))

    @classmethod
    def max_ranks(cls, spec: NetworkSpec) -> tuple[int, ...]:
        """Ranks at which any matrix of this shape is exact: the smaller side of each cut."""
        sizes = _site_sizes(spec)
        total = math.prod(sizes)
        inside = [math.prod(sizes[node.first : node.last]) for node in nodes(len(sizes))[:-1]]
        return tuple(min(size, total // size) for size in inside)

    @classmethod
    def clamp(cls, spec: NetworkSpec) -> NetworkSpec:
        """Lower ranks until no leg of a core is above the product of its other two, at least 1."""
        limits = cls.max_ranks(spec)
        if len(spec.ranks) != len(limits):
            raise UsageError(
                "a tree of d sites has 2 d - 3 ranks",
                where="tree",
                expected=len(limits),
                found=len(spec.ranks),
            )
        ranks = [max(1, min(rank, top)) for rank, top in zip(spec.ranks, limits, strict=True)]
        while True:
            clamped = lowered(spec.modes["out"], spec.modes["in"], ranks)
            if clamped == ranks:
                return spec.with_ranks(ranks)
            ranks = clamped

    @classmethod
    def cut_spectra(
        cls, matrix: Float[Tensor, "out into"], spec: NetworkSpec
    ) -> list[Float64[Tensor, "_"]]:
        """Singular values over every bond: the sites below it against the others."""
        tensor = _sites(matrix, spec)
        return [singular_values(_cut(tensor, node)) for node in nodes(tensor.ndim)[:-1]]

    @classmethod
    def decompose(cls, matrix: Float[Tensor, "out into"], spec: NetworkSpec) -> Tree:
        """Hierarchical SVD, at most sqrt(2 d - 3) times the best error; gauge "none".

        Ranks are clamped; cores in the matrix's dtype (float32 for half precision). Raises
        UsageError for modes that do not fit, ShapeError for a matrix of another shape.

        >>> spec = NetworkSpec("tree", (6, 6), (2,), {"out": (2, 3), "in": (3, 2)})
        >>> [tuple(core.shape) for core in Tree.decompose(torch.ones(6, 6), spec).cores]
        [(2, 3, 2), (3, 2, 2)]
        """
        spec = cls.clamp(spec)
        cores = _fit(exact(_sites(matrix, spec)), lambda k, _: spec.ranks[k])
        return _stored(spec, cores, like=matrix)

    @property
    def num_params(self) -> int:
        """Numbers stored, pivot indices counted."""
        return self.num_floats + sum(index.numel() for index in self.indices)

    @property
    def num_floats(self) -> int:
        """Floating-point numbers stored."""
        return sum(core.numel() for core in self.cores)

    def transform_legs(self, out: Sequence[Tensor | None], into: Sequence[Tensor | None]) -> Tree:
        """Row leg k times out[k] (left), column leg k times into[k] (right); same gauge."""
        cores = list(self.expand().cores)
        for position, left, right in zip(leaves(self._sites), out, into, strict=True):
            if left is not None:
                cores[position] = multiply(cores[position], 0, left.to(cores[position]))
            if right is not None:
                cores[position] = multiply(cores[position], 1, right.mT.to(cores[position]))
        result = Tree(self.spec.with_gauge("none"), tuple(cores))
        return result.interpolate() if self.spec.gauge == "interpolative" else result

    def interpolate(self) -> Tree:
        """The same matrix in the interpolative gauge: sum r_k^2 numbers fewer."""
        if self.spec.gauge == "interpolative":
            return self
        cores, pivots = [exact(core) for core in self.cores], []
        for position, node in enumerate(nodes(self._sites)[:-1]):
            matrix = cores[position].flatten(0, 1)
            cores[position], chosen = interpolative(matrix)
            cores[node.parent] = multiply(cores[node.parent], node.leg, matrix[chosen])
            pivots.append(chosen)
        like = self.cores[0]
        return Tree(
            self.spec.with_gauge("interpolative"),
            tuple(core.to(like) for core in cores),
            tuple(index.to(like.device) for index in pivots),
        )

    def expand(self) -> Tree:
        """The same matrix with gauge "none": the identity blocks written out."""
        if self.spec.gauge == "none":
            return self
        stored = zip(self.indices, self.cores[:-1], self._shapes, strict=False)
        cores = (write(pivots, rest).reshape(shape) for pivots, rest, shape in stored)
        return Tree(self.spec.with_gauge("none"), (*cores, self.cores[-1]))

    def to_matrix(self) -> Float[Tensor, "out into"]:
        """The dense matrix."""
        terms = core_terms(self._sites)
        pairs = "".join(terms[position][:2] for position in leaves(self._sites))
        tensor = contract(f"{','.join(terms)}->{pairs}", *self.expand().cores)
        return merge(tensor, self.spec.shape)

    def apply(self, x: Float[Tensor, "*batch into"]) -> Float[Tensor, "*batch out"]:
        """W x for every vector x, in the order with the fewest FLOPs for this many.

        >>> spec = NetworkSpec("tree", (4, 3), (4,), {"out": (2, 2), "in": (2, 2)})
        >>> network = Tree.decompose(torch.eye(4)[:, :3], spec)
        >>> (network.apply(torch.arange(3.0)) + 0.1).round().tolist()
        [0.0, 1.0, 2.0, 0.0]
        """
        legs = self.spec.modes["in"]
        padded = pad(x, (0, math.prod(legs) - self.spec.shape[1]))
        cores = self.expand().cores
        y = contract(applied(self._sites), padded.reshape(-1, *legs), *cores, tokens=TOKEN)
        return y.reshape(*x.shape[:-1], -1)[..., : self.spec.shape[0]]

    def rows(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch into"]:
        """Rows `ids`: one row of every leaf, contracted up the tree."""
        digits = torch.unravel_index(ids.reshape(-1), self.spec.modes["out"])
        terms, cores = core_terms(self._sites), list(self._inner())
        for position, digit in zip(leaves(self._sites), digits, strict=True):
            cores[position] = self._leaf_rows(position, digit)
            terms[position] = TOKEN + terms[position][1:]
        legs = "".join(terms[position][1] for position in leaves(self._sites))
        found = contract(f"{','.join(terms)}->{TOKEN}{legs}", *cores, tokens=TOKEN)
        return found.reshape(*ids.shape, -1)[..., : self.spec.shape[1]]

    def flops(self, tokens: int) -> int:
        """Floating-point operations of `apply` to `tokens` vectors."""
        shapes = ((tokens, *self.spec.modes["in"]), *self._shapes)
        return plan(applied(self._sites), shapes, TOKEN).flops({TOKEN: tokens})

    def bond_spectrum(self, k: int) -> Float64[Tensor, "_"]:
        """Singular values over bond k: the sites below core k against the others."""
        spectrum = singular_values(_cut(self._reduced()[0], nodes(self._sites)[k]))
        return spectrum[: self.spec.ranks[k]]

    def entropy(self, k: int) -> float:
        """Von Neumann entropy over bond k, in nats."""
        return von_neumann(self.bond_spectrum(k))

    def round(self, *, rtol: float | None = None, ranks: Sequence[int] | None = None) -> Tree:
        """Truncate to `ranks`, or to a relative Frobenius error of at most `rtol`; same gauge.

        Works on the tensor between the leaves, which is never larger than the matrix.
        """
        tensor, outer = self._reduced()
        if ranks is None:
            if rtol is None:
                raise UsageError("rounding needs a tolerance or ranks", where="Tree.round")
            tensor, ranks = _within(tensor, rtol)
        lower = [min(new, old) for new, old in zip(ranks, self.spec.ranks, strict=True)]
        spec = self.clamp(self.spec.with_ranks(lower))
        cores = _fit(tensor, lambda k, _: spec.ranks[k])
        for position, left in zip(leaves(self._sites), outer, strict=True):
            cores[position] = left @ cores[position]
        result = _stored(spec, cores, like=self.cores[0])
        return result.interpolate() if self.spec.gauge == "interpolative" else result

    @property
    def _sites(self) -> int:
        return len(self.spec.modes["out"])

    @property
    def _shapes(self) -> tuple[tuple[int, int, int], ...]:
        return _shapes_of(self.spec)

    def _inner(self) -> tuple[Tensor, ...]:
        """Cores with the inner ones written out and the leaves as stored."""
        if self.spec.gauge == "none":
            return self.cores
        written, shapes = set(leaves(self._sites)), self._shapes
        return tuple(
            core
            if position in written or position == len(shapes) - 1
            else write(self.indices[position], core).reshape(shapes[position])
            for position, core in enumerate(self.cores)
        )

    def _leaf_rows(self, position: int, digit: Int[Tensor, " t"]) -> Float[Tensor, "t n rank"]:
        if self.spec.gauge == "none" or position == len(self.cores) - 1:
            return self.cores[position][digit]
        columns = self._shapes[position][1]
        pairs = digit[:, None] * columns + torch.arange(columns, device=digit.device)
        return lookup(self.cores[position], self.indices[position], pairs)

    def _reduced(self) -> tuple[Float64[Tensor, "..."], list[Float64[Tensor, "_ _"]]]:
        """The tensor between orthonormal leaves, and these leaves [m n, k], float64."""
        cores = [exact(core) for core in self.expand().cores]
        outer = []
        for position in leaves(self._sites):
            left, cores[position] = torch.linalg.qr(cores[position].flatten(0, 1))
            outer.append(left)
        return _between(cores, self._sites), outer


def _fit(
    tensor: Float64[Tensor, "..."], pick: Callable[[int, Tensor], int]
) -> list[Float64[Tensor, "..."]]:
    """Cores of a tensor with one leg per site, leaves first; pick(k, unfolding) is rank k.

    Leaves come back as [size, r], inner cores as [r_left, r_right, r].
    """
    tree, below = nodes(tensor.ndim), leaves(tensor.ndim)
    inner = [position for position in range(len(tree)) if position not in below]
    legs, cores = list(below), [tensor] * len(tree)
    for position in (*below, *inner):
        if position == len(tree) - 1:
            continue  # the sink is what remains
        place = legs.index((*tree[position].children, position)[0])
        merged = len(tree[position].children) or 1
        shape = tensor.shape[place : place + merged]
        tensor = tensor.flatten(place, place + merged - 1)
        legs[place : place + merged] = [position]
        unfolded = unfold(tensor, place)
        basis = leading_basis(unfolded, pick(position, unfolded))
        cores[position] = basis.reshape(*shape, -1)
        tensor = multiply(tensor, place, basis.mT)
    cores[-1] = tensor.movedim(0, -1)
    return cores


def _within(
    tensor: Float64[Tensor, "..."], rtol: float
) -> tuple[Float64[Tensor, "..."], list[int]]:
    """The tensor truncated to relative error `rtol`, and the ranks that took.

    Fitting the result at these ranks, clamped, is exact: a wider bond is redundant.
    """
    share = rtol / math.sqrt(len(nodes(tensor.ndim)) - 1)
    cores = _fit(tensor, lambda _, unfolded: rank_for(singular_values(unfolded), share))
    return _between(cores, tensor.ndim), [core.shape[-1] for core in cores[:-1]]


def _between(cores: Sequence[Tensor], sites: int) -> Tensor:
    """The tensor, one leg per site, of cores whose leaves are matrices."""
    terms = core_terms(sites)
    for position in leaves(sites):
        terms[position] = terms[position][1:]
    legs = "".join(terms[position][0] for position in leaves(sites))
    return contract(f"{','.join(terms)}->{legs}", *cores)


def _shapes_of(spec: NetworkSpec) -> tuple[tuple[int, int, int], ...]:
    return core_shapes(tuple(spec.modes["out"]), tuple(spec.modes["in"]), tuple(spec.ranks))


def _cut(tensor: Tensor, node: Node) -> Float[Tensor, "inside outside"]:
    """The tensor's sites below a node against the others."""
    inside = list(range(node.first, node.last))
    outside = [leg for leg in range(tensor.ndim) if leg not in inside]
    size = math.prod(tensor.shape[leg] for leg in inside)
    return tensor.permute(*inside, *outside).reshape(size, -1)


def _site_sizes(spec: NetworkSpec) -> tuple[int, ...]:
    out, into = paired_modes(spec.modes, spec.shape)
    if not 2 <= len(out) <= MAX_SITES:
        raise UsageError(
            "a tree has between 2 and 12 sites", where="tree", expected="2..12", found=len(out)
        )
    return tuple(m * n for m, n in zip(out, into, strict=True))


def _sites(matrix: Tensor, spec: NetworkSpec) -> Tensor:
    """The matrix as a tensor with one leg per site, zero-padded."""
    sizes = _site_sizes(spec)
    if tuple(matrix.shape) != tuple(spec.shape):
        raise ShapeError(
            "matrix differs from its spec", where="tree", expected=spec.shape, found=matrix.shape
        )
    return split(matrix, *paired_modes(spec.modes, spec.shape)).reshape(sizes)


def _stored(spec: NetworkSpec, cores: Sequence[Tensor], like: Tensor) -> Tree:
    dtype = torch.promote_types(like.dtype, torch.float32)
    shaped = (core.reshape(shape) for core, shape in zip(cores, _shapes_of(spec), strict=True))
    stored = tuple(core.to(like.device, dtype).contiguous() for core in shaped)
    return Tree(spec.with_gauge("none"), stored)
