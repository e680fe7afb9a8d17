"""Panels in the metric: which row (column) goes where, and sweeps that undo the cut.

Sorted by importance, the loud channels share a panel that may stay dense while the quiet ones are
truncated hard. A panel's closed form sees the block of the metric that is its own. What couples it
to the others is seen in sweeps: with the error E of the others fixed, the best panel k is the
truncation of W_k + G_kk^-1 G_k,: E in its own metric, which is exact, so the error never rises.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from qll.convert.metric import Factor, Metric, factor
from qll.convert.truncation import truncated
from qll.convert.whitened import Whitened, apply_roots
from qll.tn.network import NetworkSpec
from qll.tn.panels import Panels, joined


def whiten_panels(weight: Float[Tensor, "out into"], spec: NetworkSpec, metric: Metric) -> Whitened:
    """The matrix in panel order, each panel in its own block of the metric.

    >>> spec = NetworkSpec("panels", (2, 1), modes={"rows": (1, 1), "order": (2,)})
    >>> seen = whiten_panels(torch.tensor([[1.0], [2.0]]).double(), spec, Metric("plain"))
    >>> seen.matrices[0].tolist(), seen.order.tolist()
    ([[2.0], [1.0]], [1, 0])
    """
    by_rows = "rows" in spec.modes
    axis = 0 if by_rows else 1
    cut, whole = (metric.left, metric.right) if by_rows else (metric.right, metric.left)
    sequence = importance(weight, metric, axis).argsort(descending=True, stable=True)
    if "order" not in spec.modes:
        sequence = torch.arange(weight.shape[axis])
    groups = sequence.split(spec.modes["rows" if by_rows else "columns"])
    own = [None if cut is None else factor(_block(cut, group)) for group in groups]
    other = None if whole is None else factor(whole)
    pieces = []
    for group, root in zip(groups, own, strict=True):
        piece = weight.index_select(axis, group)
        sides = ([root], [other]) if by_rows else ([other], [root])
        pieces.append(apply_roots(sides[0], piece, sides[1]))
    order = torch.argsort(sequence) if "order" in spec.modes else None
    out, into = (own, [other]) if by_rows else ([other], own)
    return Whitened([torch.cat(pieces, dim=axis)], spec, out, into, order)


def importance(
    weight: Float[Tensor, "out into"], metric: Metric, axis: int
) -> Float[Tensor, " size"]:
    """What leaving out each row (axis 0) or column (1) alone would add to the squared error.

    >>> importance(torch.tensor([[1.0], [2.0]]), Metric("plain"), 0).tolist()
    [1.0, 4.0]
    """
    cut, whole = (metric.left, metric.right) if axis == 0 else (metric.right, metric.left)
    lines = Metric("", right=whole) if axis == 0 else Metric("", left=whole)
    norms = (lines.weighted(weight) * weight).sum(1 - axis)
    return norms if cut is None else norms * (cut if cut.ndim == 1 else cut.diagonal())


def swept_panels(
    network: Panels,
    weight: Float[Tensor, "out into"],
    seen: Whitened,
    metric: Metric,
    sweeps: int,
) -> Panels:
    """The panels after `sweeps` rounds of refitting each under the whole metric, gauge "none"."""
    by_rows = "rows" in network.spec.modes
    coupling = metric.left if by_rows else metric.right
    if coupling is None or coupling.ndim == 1:
        return network  # nothing couples the panels: the closed form is the best there is
    parts = network.parts()
    groups = _groups(network)
    roots = [(root, seen.into[0]) if by_rows else (seen.out[0], root) for root in _own(seen)]
    # rows first from here on, so that both cuts read the same
    wanted = weight if by_rows else weight.mT
    error = wanted - (network.to_matrix() if by_rows else network.to_matrix().mT)
    solvers = [torch.linalg.cholesky(_block(coupling, group)) for group in groups]
    for _ in range(sweeps):
        for k, group in enumerate(groups):
            error[group] = 0
            pull = torch.cholesky_solve(coupling[group] @ error, solvers[k])
            target = wanted[group] + pull
            parts[k] = truncated(target if by_rows else target.mT, network.spec.ranks[k], *roots[k])
            found = parts[k].to_matrix()
            error[group] = wanted[group] - (found if by_rows else found.mT)
    return joined(parts, network.spec, seen.order)


def _own(seen: Whitened) -> Sequence[Factor | None]:
    return seen.out if "rows" in seen.spec.modes else seen.into


def _groups(network: Panels) -> Sequence[Int64[Tensor, " size"]]:
    """Row (column) numbers of W in each panel."""
    modes = network.spec.modes
    sizes = modes["rows"] if "rows" in modes else modes["columns"]
    places = network.indices[0] if "order" in modes else torch.arange(sum(sizes))
    return torch.argsort(places).split(sizes)


def _block(moment: Tensor, group: Tensor) -> Tensor:
    return moment[group] if moment.ndim == 1 else moment[group][:, group]
