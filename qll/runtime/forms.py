"""The ways in which one matrix can be applied, and when which is cheapest.

    Whole      W                                       out * in numbers
    Factors    W = A B                                 r (out + in)
    Pivoted    W = P [B; C B], B rows of W itself      r (out + in - r), and a reordering
    Coded      W as integers with scales               out * in, of 4 or 8 bits
    Contracted any other network, by its own contraction

From a stored network follow up to three: as it is stored, its interpolative gauge written out (more
numbers, no reordering), and the matrix. Rows can be permuted for free in all but the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from qll.runtime.costs import DeviceCosts
from qll.tn import JointNetwork, build, parts
from qll.tn.gauge import row_order, write
from qll.tn.lowrank import LowRank
from qll.tn.network import MatrixNetwork
from qll.tn.packed import scaled


@dataclass(frozen=True)
class Whole:
    """W [out, in]."""

    matrix: Float[Tensor, "out into"]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return tuple(self.matrix.shape)

    def permuted(self, rows: Tensor | None, columns: Tensor | None) -> Whole:
        """W[rows][:, columns]."""
        return Whole(_columns(_rows(self.matrix, rows), columns))


@dataclass(frozen=True)
class Factors:
    """W = left @ right, [out, r] and [r, in]."""

    left: Float[Tensor, "out r"]
    right: Float[Tensor, "r into"]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.left.shape[0], self.right.shape[1]

    def permuted(self, rows: Tensor | None, columns: Tensor | None) -> Factors:
        """W[rows][:, columns]."""
        return Factors(_rows(self.left, rows), _columns(self.right, columns))


@dataclass(frozen=True)
class Pivoted:
    """W = [right; rest @ right][order]; order None: they are in place already."""

    rest: Float[Tensor, "rest r"]
    right: Float[Tensor, "r into"]
    order: Int[Tensor, " out"] | None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.rest.shape[0] + self.right.shape[0], self.right.shape[1]

    def permuted(self, rows: Tensor | None, columns: Tensor | None) -> Pivoted:
        """W[rows][:, columns]; rows in the stored order need no reordering any more."""
        order = self.order if rows is None else _rows(self._order(), rows)
        if order is not None and torch.equal(order, torch.arange(len(order), device=order.device)):
            order = None
        return Pivoted(self.rest, _columns(self.right, columns), order)

    def stored_rows(self) -> Int[Tensor, " out"]:
        """The row of W at each place of [right; rest @ right]."""
        return self._order().argsort()

    def _order(self) -> Tensor:
        if self.order is None:
            return torch.arange(self.shape[0], device=self.right.device)
        return self.order


@dataclass(frozen=True)
class Contracted:
    """x -> W x by the network's own contraction."""

    apply: Callable[[Tensor], Tensor]
    shape: tuple[int, int]
    flops: int
    """FLOPs for one token."""
    num_bytes: int
    """Bytes that are read, however many tokens."""
    rows: Int[Tensor, " out"] | None = None
    columns: Int[Tensor, " into"] | None = None
    """x arrives with these columns of the original order."""

    def permuted(self, rows: Tensor | None, columns: Tensor | None) -> Contracted:
        """W[rows][:, columns]."""
        return Contracted(self.apply, self.shape, self.flops, self.num_bytes, rows, columns)

    def __call__(self, x: Float[Tensor, "tokens into"]) -> Float[Tensor, "tokens out"]:
        """W x for every row of x."""
        x = x if self.columns is None else x.index_select(1, self.columns.argsort())
        image = self.apply(x.contiguous())
        return image if self.rows is None else image.index_select(1, self.rows)


@dataclass(frozen=True)
class Coded:
    """W [out, in] as integers with a scale per group of a row, for a kernel that reads them so."""

    codes: Int8[Tensor, "out into"]
    scales: Float[Tensor, "out groups"]
    group: int
    kernel: str
    """A name of `qll.runtime.kernels.CODED`."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return tuple(self.codes.shape)

    def permuted(self, rows: Tensor | None, columns: Tensor | None) -> Coded | Whole:
        """W[rows][:, columns]; groups do not survive another order of the columns."""
        if columns is not None:
            matrix = scaled(self.codes, self.scales, self.shape, self.group)
            return Whole(matrix).permuted(rows, columns)
        codes, scales = _rows(self.codes, rows), _rows(self.scales, rows)
        return Coded(codes, scales, self.group, self.kernel)


Form = Whole | Factors | Pivoted | Coded | Contracted


def forms_of(network: LowRank) -> list[Form]:
    """How a low-rank network can be applied: as stored, written out, as a matrix.

    >>> from qll.tn.network import NetworkSpec
    >>> network = LowRank.decompose(torch.eye(4), NetworkSpec("lowrank", (4, 4), (2,)))
    >>> [type(form).__name__ for form in forms_of(network.interpolate())]
    ['Pivoted', 'Factors', 'Whole']
    """
    first, right = network.cores
    whole = Whole(matrix_of(network))
    if network.spec.gauge == "none":
        return [Factors(first, right), whole]
    order = row_order(network.indices[0], network.spec.shape[0])
    written = Factors(write(network.indices[0], first), right)
    return [Pivoted(first, right, order), written, whole]


def matrix_of(network: MatrixNetwork | JointNetwork, *member: int) -> Float[Tensor, "out into"]:
    """The matrix (of a member), multiplied out in float32 at least, in the dtype of the cores."""
    kind = network.cores[0].dtype
    wide = torch.promote_types(kind, torch.float32)
    cores = [core.to(wide) for core in network.cores]
    return build(network.spec, cores, network.indices).to_matrix(*member).to(kind)


def forms_of_part(part: parts.Part) -> list[Form]:
    """The same for a part of a joint network, which may be stored whole."""
    return forms_of(part) if isinstance(part, LowRank) else [Whole(part)]


def seconds(forms: tuple[Form, ...], tokens: int, costs: DeviceCosts) -> float:
    """Predicted seconds of `qll.runtime.program.Program(forms)` on `tokens` tokens.

    >>> from qll.runtime.costs import Line
    >>> free = (Line(0.0, 0.0),)
    >>> flat = DeviceCosts((1,), {"plain": (Line(0.0, 1.0),)}, free, free)
    >>> seconds((Whole(torch.ones(3, 4)), Factors(torch.ones(3, 2), torch.ones(2, 4))), 1, flat)
    26.0
    """
    into = forms[0].shape[1]
    first = sum(_first_rows(form) for form in forms)
    total = costs.product(tokens, first, into) if first else 0.0
    if stackable(forms):
        return costs.coded(forms[0].kernel, tokens, sum(form.shape[0] for form in forms), into)
    pieces = 0
    for form in forms:
        pieces += 1
        if isinstance(form, Factors):
            total += costs.product(tokens, *form.left.shape)
        elif isinstance(form, Pivoted):
            total += costs.product(tokens, *form.rest.shape) if form.rest.numel() else 0.0
            pieces += form.order is None
            total += costs.gather(tokens, form.shape[0]) if form.order is not None else 0.0
        elif isinstance(form, Coded):
            total += costs.coded(form.kernel, tokens, *form.shape)
        elif isinstance(form, Contracted):
            # a chain of small products: the same FLOPs, never cheaper than one
            total += costs.product(tokens, form.flops // 2, 1)
    if pieces > 1 and not all(isinstance(form, Whole) for form in forms):
        total += costs.join(tokens, sum(form.shape[0] for form in forms))
    return total


def stackable(forms: Sequence[Form]) -> bool:
    """Whether all forms are codes that one kernel can read as one matrix."""
    if not all(isinstance(form, Coded) for form in forms):
        return False
    return len({(form.kernel, form.group, form.scales.shape[1]) for form in forms}) == 1


def _first_rows(form: Form) -> int:
    """Rows of the product with x itself, which all forms of a program share."""
    if isinstance(form, Whole):
        return form.shape[0]
    return form.right.shape[0] if isinstance(form, Factors | Pivoted) else 0


def _rows(matrix: Tensor, rows: Tensor | None) -> Tensor:
    return matrix if rows is None else matrix.index_select(0, rows)


def _columns(matrix: Tensor, columns: Tensor | None) -> Tensor:
    return matrix if columns is None else matrix.index_select(1, columns)
