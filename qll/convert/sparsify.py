"""Which entries of a matrix to keep, and with what values, in the metric.

Leaving out the one entry w_ij and refitting all others costs w_ij^2 / ((G_out^-1)_ii (G_in^-1)_jj)
(optimal brain surgeon, Hassibi and Stork 1993, for the Kronecker-factored second derivative): that
is the score. The values kept then minimise tr(E^T G_out E G_in) together, by conjugate gradients.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qll.convert.metric import Factor, Metric, factor
from qll.convert.truncation import truncated
from qll.tn.network import NetworkSpec
from qll.tn.sparse import Sparse, assembled, largest

STEPS = 12
# alternations of the low-rank part and the entries, when there are both
ROUNDS = 3


def sparsify(weight: Float[Tensor, "out into"], spec: NetworkSpec, metric: Metric) -> Sparse:
    """The entries (and low-rank network) of `spec` near `weight` in the metric, gauge "none".

    >>> from qll.convert.metric import plain
    >>> weight = torch.tensor([[3.0, 1.0], [0.5, 2.0]], dtype=torch.float64)
    >>> sparsify(weight, NetworkSpec("sparse", (2, 2), (3,)), plain()).to_matrix().tolist()
    [[3.0, 1.0], [0.0, 2.0]]
    """
    spec = Sparse.clamp(spec).with_gauge("none")
    scale, rest, base = damage(weight.shape, metric), weight, None
    entries = torch.zeros_like(weight)
    roots = _roots(metric) if len(spec.ranks) == 2 else None
    for _ in range(ROUNDS if roots else 1):
        if roots:
            base = truncated(weight - entries, spec.ranks[1], *roots)
            rest = weight - base.to_matrix()
        mask = largest(rest.square() * scale, spec.ranks[0])
        # single precision is plenty for values that are chosen by a sample, and twice as fast
        entries = refitted(rest.float(), mask, metric).to(weight)
    return assembled(entries, mask, base, spec)


def entry_losses(weight: Float[Tensor, "out into"], metric: Metric) -> Float[Tensor, " entries"]:
    """Square roots of the scores of all entries, descending: what each costs left out alone."""
    scores = weight.square() * damage(weight.shape, metric)
    return scores.flatten().sqrt().sort(descending=True).values


def damage(shape: tuple[int, int], metric: Metric) -> Float[Tensor, "out into"]:
    """1 / ((G_out^-1)_ii (G_in^-1)_jj): the score of an entry of one.

    >>> from qll.convert.metric import plain
    >>> damage((1, 2), plain()).tolist()
    [[1.0, 1.0]]
    """
    left, right = (
        torch.ones(size, dtype=torch.float64) if moment is None else 1 / _inverse_diagonal(moment)
        for size, moment in zip(shape, _moments(metric), strict=True)
    )
    return torch.outer(left, right)


def refitted(
    target: Float[Tensor, "out into"],
    mask: Bool[Tensor, "out into"],
    metric: Metric,
    steps: int = STEPS,
) -> Float[Tensor, "out into"]:
    """Values where `mask` is set that bring the metric error to `target` down, zero elsewhere.

    Conjugate gradients from the entries of `target`, with the diagonal of the metric as
    preconditioner. The error falls in every step, so it is never above that of plain masking.
    """
    metric = Metric(metric.kind, *(None if m is None else m.to(target) for m in _moments(metric)))
    found = target * mask
    diagonal = _diagonals(metric).weighted(torch.ones_like(target))
    residual = metric.weighted(target - found) * mask
    step = residual / diagonal
    slope = (residual * step).sum()
    start = slope
    for _ in range(steps):
        if not slope > 1e-24 * start:
            break
        image = metric.weighted(step) * mask
        length = slope / (step * image).sum()
        found = found + length * step
        residual = residual - length * image
        scaled = residual / diagonal
        previous, slope = slope, (residual * scaled).sum()
        step = scaled + (slope / previous) * step
    return found


def _moments(metric: Metric) -> tuple[Tensor | None, Tensor | None]:
    return metric.left, metric.right


def _diagonals(metric: Metric) -> Metric:
    left, right = (
        None if moment is None else moment if moment.ndim == 1 else moment.diagonal()
        for moment in _moments(metric)
    )
    return Metric(metric.kind, left, right)


def _inverse_diagonal(moment: Tensor) -> Tensor:
    inverse = factor(moment).inverse
    return inverse.square() if inverse.ndim == 1 else inverse.square().sum(0)


def _roots(metric: Metric) -> tuple[Factor | None, Factor | None]:
    left, right = (None if moment is None else factor(moment) for moment in _moments(metric))
    return left, right
