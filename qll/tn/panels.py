"""A matrix cut into panels of rows or of columns, each panel a low-rank network of its own.

modes {"rows": (m_1 .. m_p)} stacks p panels [m_k, in]; {"columns": (n_1 .. n_p)} puts p panels
[out, n_k] side by side. A panel is qll.tn.lowrank with its own rank, up to being dense, so ranks go
where the spectrum needs them, and a panel can be square where the matrix is not: at equal storage
the square one loses least of a flat spectrum. (Block low-rank; one row of the grid of BLAST, Lee et
al. 2024, without its shared bases.) With modes["order"] = (m,) the cut leg is permuted first and
the permutation stored as the first index tensor: entry i is the place of row (column) i of W in
the panels. Cores: A_1, B_1, A_2, B_2, ..; indices: the order, then the pivots of each panel.

>>> matrix = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3))
>>> spec = NetworkSpec("panels", (5, 5), (1, 1), {"rows": (2, 3)})
>>> network = Panels.decompose(matrix, spec)
>>> torch.allclose(network.to_matrix(), matrix, atol=1e-6)
True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import ClassVar

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from qll.errors import UsageError
from qll.tn.entropy import von_neumann
from qll.tn.lowrank import LowRank
from qll.tn.network import NetworkSpec, TensorShapes

SIDES = ("rows", "columns")


@dataclass(frozen=True)
class Panels:
    """Low-rank panels of the rows or the columns of one matrix; bond k is that of panel k."""

    spec: NetworkSpec
    cores: tuple[Tensor, ...]
    indices: tuple[Tensor, ...] = ()
    name: ClassVar[str] = "panels"

    # -- closed forms ------------------------------------------------------------------------
    @classmethod
    def tensor_shapes(cls, spec: NetworkSpec) -> TensorShapes:
        """Shapes of the panels' cores, of the order (if any) and of the panels' pivots.

        >>> spec = NetworkSpec("panels", (5, 4), (1, 2), {"rows": (2, 3), "order": (5,)})
        >>> Panels.tensor_shapes(spec)
        TensorShapes(cores=((2, 1), (1, 4), (3, 2), (2, 4)), indices=((5,),))
        """
        parts = [LowRank.tensor_shapes(panel) for panel in panel_specs(spec)]
        order = [tuple(spec.modes["order"])] if "order" in spec.modes else []
        return TensorShapes(
            tuple(shape for part in parts for shape in part.cores),
            (*order, *(shape for part in parts for shape in part.indices)),
        )

    @classmethod
    def max_ranks(cls, spec: NetworkSpec) -> tuple[int, ...]:
        """Per panel, its smaller side."""
        return tuple(min(panel.shape) for panel in panel_specs(spec))

    @classmethod
    def clamp(cls, spec: NetworkSpec) -> NetworkSpec:
        """Each rank within 1 .. the smaller side of its panel."""
        panels = panel_specs(spec)
        if len(spec.ranks) != len(panels):
            raise UsageError(
                "one rank per panel is needed",
                where=spec.format,
                expected=len(panels),
                found=spec.ranks,
            )
        return spec.with_ranks([LowRank.clamp(panel).ranks[0] for panel in panels])

    # -- from a matrix -----------------------------------------------------------------------
    @classmethod
    def cut_spectra(cls, matrix: Float[Tensor, "out into"], spec: NetworkSpec) -> list[Tensor]:
        """Singular values of each panel of `matrix`, taken in its own order."""
        panels = zip(_cut(matrix, spec), panel_specs(spec), strict=True)
        return [LowRank.cut_spectra(part, panel)[0] for part, panel in panels]

    @classmethod
    def decompose(cls, matrix: Float[Tensor, "out into"], spec: NetworkSpec) -> Panels:
        """The best panels of `spec.ranks`, in the order of `matrix` (see `reordered`)."""
        spec = cls.clamp(spec).with_gauge("none")
        panels = zip(_cut(matrix, spec), panel_specs(spec), strict=True)
        return joined([LowRank.decompose(part, panel) for part, panel in panels], spec)

    # -- verbs -------------------------------------------------------------------------------
    def transform_legs(self, out: Sequence[Tensor | None], into: Sequence[Tensor | None]) -> Panels:
        """Panel k times out[k] (row panels) or into[k] (column panels), the other side times the
        one factor of that side; None leaves a leg as it is. The gauge is kept."""
        parts = self.parts()
        wanted = (len(parts), 1) if self._by_rows else (1, len(parts))
        if (len(out), len(into)) != wanted:
            raise UsageError(
                "one factor or None per panel and one for the other side are needed",
                expected=wanted,
                found=(len(out), len(into)),
            )
        lefts = list(out) if self._by_rows else list(out) * len(parts)
        rights = list(into) * len(parts) if self._by_rows else list(into)
        changed = [
            part.transform_legs([left], [right])
            for part, left, right in zip(parts, lefts, rights, strict=True)
        ]
        return joined(changed, self.spec, self._order())

    def interpolate(self) -> Panels:
        """The same matrix, every panel in the interpolative gauge."""
        return joined([part.interpolate() for part in self.parts()], self.spec, self._order())

    def expand(self) -> Panels:
        """The same matrix, every panel as two factors."""
        return joined([part.expand() for part in self.parts()], self.spec, self._order())

    def reordered(self, places: Int[Tensor, " size"]) -> Panels:
        """The panels with another order stored: row (column) i of W is at `places[i]` in them."""
        return joined(self.parts(), self.spec, places.to(self.cores[0].device))

    def to_matrix(self) -> Float[Tensor, "out into"]:
        """W."""
        axis = 0 if self._by_rows else 1
        stacked = torch.cat([part.to_matrix() for part in self.parts()], dim=axis)
        order = self._order()
        return stacked if order is None else stacked.index_select(axis, order)

    def apply(self, x: Float[Tensor, "*batch into"]) -> Float[Tensor, "*batch out"]:
        """W x for each row of `x`, panel by panel."""
        order, parts = self._order(), self.parts()
        if self._by_rows:
            image = torch.cat([part.apply(x) for part in parts], dim=-1)
            return image if order is None else image.index_select(-1, order)
        if order is not None:
            x = torch.zeros_like(x).index_copy(-1, order.long(), x)
        pieces = x.split(self.spec.modes["columns"], dim=-1)
        image = parts[0].apply(pieces[0])
        for part, piece in zip(parts[1:], pieces[1:], strict=True):
            image = image + part.apply(piece)
        return image

    def rows(self, ids: Int[Tensor, "*ids"]) -> Float[Tensor, "*ids into"]:
        """Rows `ids` of W, without building W."""
        flat, order, parts = ids.reshape(-1), self._order(), self.parts()
        if not self._by_rows:
            found = torch.cat([part.rows(flat) for part in parts], dim=-1)
            found = found if order is None else found.index_select(-1, order)
            return found.reshape(*ids.shape, self.spec.shape[1])
        places = flat if order is None else order.index_select(0, flat)
        found = self.cores[0].new_zeros(flat.shape[0], self.spec.shape[1])
        starts = (0, *accumulate(self.spec.modes["rows"]))
        for part, (start, stop) in zip(parts, pairwise(starts), strict=True):
            inside = ((places >= start) & (places < stop)).nonzero().squeeze(1)
            found = found.index_copy(0, inside, part.rows(places[inside] - start))
        return found.reshape(*ids.shape, self.spec.shape[1])

    def flops(self, tokens: int) -> int:
        """FLOPs of `apply` on `tokens` rows."""
        return sum(part.flops(tokens) for part in self.parts())

    def bond_spectrum(self, k: int) -> Float64[Tensor, "r"]:
        """Singular values of panel k, from its factors."""
        return self.parts()[k].bond_spectrum()

    def entropy(self, k: int) -> float:
        """Von Neumann entropy of panel k, nats."""
        return von_neumann(self.bond_spectrum(k))

    def round(self, *, rtol: float | None = None, ranks: Sequence[int] | None = None) -> Panels:
        """Panels of lower ranks: relative error of each <= `rtol`, ranks <= `ranks`."""
        parts = self.parts()
        wanted = [None] * len(parts) if ranks is None else [[rank] for rank in ranks]
        lower = [
            part.round(rtol=rtol, ranks=most) for part, most in zip(parts, wanted, strict=True)
        ]
        return joined(lower, self.spec, self._order())

    def parts(self) -> list[LowRank]:
        """The low-rank network of each panel, on the same tensors."""
        pivots = self.indices[1:] if "order" in self.spec.modes else self.indices
        each = 1 if self.spec.gauge == "interpolative" else 0
        return [
            LowRank(panel, self.cores[2 * k : 2 * k + 2], pivots[k * each : (k + 1) * each])
            for k, panel in enumerate(panel_specs(self.spec))
        ]

    # -- private -----------------------------------------------------------------------------
    @property
    def _by_rows(self) -> bool:
        return "rows" in self.spec.modes

    def _order(self) -> Tensor | None:
        return self.indices[0] if "order" in self.spec.modes else None


def joined(parts: Sequence[LowRank], spec: NetworkSpec, order: Tensor | None = None) -> Panels:
    """The network of `parts`, all in one gauge; without an `order` that `spec` asks for, the
    matrix's own.

    >>> part = LowRank.decompose(torch.eye(2), NetworkSpec("lowrank", (2, 2), (2,)))
    >>> joined([part, part], NetworkSpec("panels", (4, 2), modes={"rows": (2, 2)})).spec.ranks
    (2, 2)
    """
    if order is None and "order" in spec.modes:
        order = torch.arange(spec.modes["order"][0], device=parts[0].cores[0].device)
    own = () if order is None else (order,)
    spec = spec.with_gauge(parts[0].spec.gauge).with_ranks([part.spec.ranks[0] for part in parts])
    cores = tuple(core for part in parts for core in part.cores)
    return Panels(spec, cores, (*own, *(pivots for part in parts for pivots in part.indices)))


def panel_specs(spec: NetworkSpec) -> list[NetworkSpec]:
    """The low-rank spec of each panel; ranks are empty when those of `spec` are.

    Raises UsageError when the panels do not fill the matrix.

    >>> spec = NetworkSpec("panels", (5, 4), (1, 2), {"columns": (1, 3)})
    >>> [panel.shape for panel in panel_specs(spec)]
    [(5, 1), (5, 3)]
    """
    sides = [side for side in SIDES if side in spec.modes]
    order = spec.modes.get("order")
    if len(sides) != 1:
        raise UsageError("panels are of rows or of columns", where="modes", found=spec.modes)
    sizes, axis = spec.modes[sides[0]], SIDES.index(sides[0])
    total = spec.shape[axis]
    if sum(sizes) != total or (order is not None and tuple(order) != (total,)):
        raise UsageError(
            "the panels do not fill the matrix", expected=total, found=(sum(sizes), order)
        )
    shapes = [(size, spec.shape[1]) if axis == 0 else (spec.shape[0], size) for size in sizes]
    single = replace(spec, format=LowRank.name, modes={}, ranks=())
    ranks = [(rank,) for rank in spec.ranks] or [()] * len(sizes)
    if len(ranks) != len(sizes):
        ranks = [()] * len(sizes)
    return [
        replace(single, shape=shape, ranks=rank) for shape, rank in zip(shapes, ranks, strict=True)
    ]


def default_panels(
    shape: tuple[int, int], count: int = 0, axis: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Modes that cut the rows (axis 0), the columns (1) or by default the longer side (rows of a
    square) into `count` equal panels, by default about square ones, two at least.

    >>> default_panels((1536, 576)), default_panels((4, 4), axis=1)
    ({'rows': (512, 512, 512)}, {'columns': (2, 2)})
    """
    axis = int(shape[0] < shape[1]) if axis is None else axis
    longer, shorter = shape[axis], shape[1 - axis]
    count = min(longer, count or max(2, round(longer / shorter)))
    sizes = (longer * (k + 1) // count - longer * k // count for k in range(count))
    return {SIDES[axis]: tuple(sizes)}


def _cut(matrix: Tensor, spec: NetworkSpec) -> Sequence[Tensor]:
    axis = 0 if "rows" in spec.modes else 1
    return matrix.split(spec.modes[SIDES[axis]], dim=axis)
