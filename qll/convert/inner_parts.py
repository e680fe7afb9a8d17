"""The small matrices that are left when the channels between matrices are fewer.

Each may be whole or low rank (`qll.tn.parts`): its best fit in a metric, and what its ranks cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from qll.convert.candidates import HALF, tail_energies
from qll.convert.metric import Metric, factor
from qll.convert.short_side import short_truncation
from qll.convert.truncation import truncated
from qll.tn import LowRank, parts, tensor_shapes
from qll.tn.network import NetworkSpec
from qll.tn.symmetric import eigenvalues_descending

# prices of a parameter at which ranks are picked: decades below the dearest, and how many
DECADES = 4
PRICES = 32

Menu = list[tuple[int, int, float]]
"""What one part could be: (rank, parameters, loss)."""

Options = Iterator[tuple[tuple[int, ...], float]]
"""What a group could be: (ranks, loss)."""


def member_scales(weights: Sequence[Tensor], metrics: Sequence[Metric]) -> list[float]:
    """What turns each member's squared error into loss, comparable between matrices."""
    if metrics[0].kind == "kfac":
        return [HALF] * len(weights)
    return [
        1.0 / max(metric.norm_squared(weight), 1e-300)
        for weight, metric in zip(weights, metrics, strict=True)
    ]


def fit_part(matrix: Tensor, spec: NetworkSpec, metric: Metric) -> parts.Part:
    """The part of `spec` nearest to `matrix` in the metric."""
    if parts.is_whole(spec):
        return matrix
    if found := short_truncation(matrix, spec.ranks[0], metric):
        return parts.regauged(found[0], spec.gauge)
    left = None if metric.left is None else factor(metric.left)
    right = None if metric.right is None else factor(metric.right)
    return parts.regauged(truncated(matrix, spec.ranks[0], left, right), spec.gauge)


def block_of(moment: Tensor | None, kept: Tensor) -> Tensor | None:
    """The entries of `moment` between the channels `kept`."""
    return None if moment is None else moment[kept[:, None], kept]


def eigenvalues(gram: Tensor) -> Float64[Tensor, "_"]:
    return eigenvalues_descending(gram).clamp(min=0)


def menu_of(spec: NetworkSpec, squares: Float64[Tensor, "_"], step: int) -> Menu:
    """Ranks of a part in steps, and the whole matrix; `squares` are losses per singular value."""
    tails = tail_energies(squares.sqrt())
    (full,) = LowRank.max_ranks(spec)
    whole = spec.shape[0] * spec.shape[1]
    sized = [(rank, spec.with_ranks((rank,))) for rank in range(step, full, step)]
    menu = [(rank, tensor_shapes(one).num_params, float(tails[rank])) for rank, one in sized]
    return [item for item in menu if item[1] < whole] + [(full, whole, 0.0)]


def mixed(menus: Sequence[Menu]) -> Iterator[tuple[tuple[int, ...], float]]:
    """One choice per menu at every price of a parameter, from cheap to dear."""
    sizes = [torch.tensor([item[1] for item in menu]).double() for menu in menus]
    losses = [torch.tensor([item[2] for item in menu]).double() for menu in menus]
    dearest = max(float(loss.max() / size.min()) for loss, size in zip(losses, sizes, strict=True))
    seen = set()
    for exponent in torch.linspace(-DECADES, 1, PRICES).tolist():
        price = dearest * 10**exponent
        picks = tuple(
            int((loss + price * size).argmin()) for loss, size in zip(losses, sizes, strict=True)
        )
        if picks not in seen:
            seen.add(picks)
            chosen = [menu[pick] for menu, pick in zip(menus, picks, strict=True)]
            yield tuple(item[0] for item in chosen), sum(item[2] for item in chosen)
