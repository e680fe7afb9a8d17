"""An MLP with fewer channels: which go, what is lost, and the refitted matrices.

The loss is that of down_proj in its own metric, without some of its inputs and with the others
making up for them (`qll.tn.elimination`). The three reduced matrices may be low rank as well; what
each loses in its own metric then adds up, to first order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from jaxtyping import Float64, Int64
from torch import Tensor

from qll.convert.candidates import format_of
from qll.convert.inner_parts import Options, block_of, eigenvalues, fit_part, menu_of, mixed
from qll.convert.metric import Metric, factor
from qll.tn import JointChannels, parts
from qll.tn.elimination import Elimination, eliminate, regression
from qll.tn.joint_channels import part_specs
from qll.tn.network import NetworkSpec

# shares of the channels at which low rank inside is tried; without it every number of channels is
SHARES = (0.5, 0.6, 0.7, 0.8, 0.875, 0.95)


def fit_channels(
    weights: Sequence[Tensor], spec: NetworkSpec, metrics: Sequence[Metric]
) -> JointChannels:
    down = weights[2]
    kept = _eliminated(down, metrics).kept(spec.ranks[0])
    gate, up, last = part_specs(spec)
    # moments of the channels are large: one at a time, and read again rather than kept
    fitted = regression(down, metrics[2].right, kept)
    if not parts.is_whole(last):
        fitted = fit_part(fitted, last, _of_inputs(metrics[2], kept))
    own = [
        fit_part(weight[kept], part, _of_channels(metrics[j], kept))
        for j, (weight, part) in enumerate(zip(weights[:2], (gate, up), strict=True))
    ]
    return JointChannels.of_parts(spec, kept, [*own, fitted])


def channel_options(
    spec: NetworkSpec,
    weights: Sequence[Tensor],
    metrics: Sequence[Metric],
    scales: Sequence[float],
    step: int,
) -> Options:
    model, channels = weights[2].shape
    elimination = _eliminated(weights[2], metrics)
    losses = elimination.losses.flip(0) * scales[2]
    for kept in range(step, channels + 1, step):
        yield (kept, model, model, model), float(losses[kept])
    sizes = sorted({max(step, int(share * channels) // step * step) for share in SHARES})
    stages = [elimination.kept(size) for size in sizes]
    readers = [_reader_spectra(weights[j], metrics[j], elimination.order, sizes) for j in range(2)]
    for k, (size, kept) in enumerate(zip(sizes, stages, strict=True)):
        squares = [readers[0][k], readers[1][k], eigenvalues(elimination.gram(len(kept)))]
        sized = format_of(spec).clamp(spec.with_ranks((size, model, model, model)))
        menus = [
            menu_of(part, values * scale, step)
            for part, values, scale in zip(part_specs(sized), squares, scales, strict=True)
        ]
        for ranks, loss in mixed(menus):
            yield (size, *ranks), loss + float(losses[size])


def _of_channels(metric: Metric, kept: Tensor) -> Metric:
    """The metric of the rows `kept`."""
    return Metric(metric.kind, block_of(metric.left, kept), metric.right)


def _of_inputs(metric: Metric, kept: Tensor) -> Metric:
    """The metric of the columns `kept`."""
    return Metric(metric.kind, metric.left, block_of(metric.right, kept))


def _reader_spectra(
    weight: Tensor, metric: Metric, order: Int64[Tensor, " n"], sizes: Sequence[int]
) -> list[Float64[Tensor, "_"]]:
    """Squared singular values of the rows that stay, in their metric, for each of `sizes`.

    The Gram matrix grows by the rows that a larger size adds.
    """
    rows = weight if metric.right is None else weight @ factor(metric.right).root
    # those that stay longest first, so that every size is a slice
    rows, kept = rows[order.flip(0)], order.flip(0)
    left = block_of(metric.left, kept)
    del metric  # where it was read for this call alone, its moment is given back
    gram, found = rows.new_zeros(rows.shape[1], rows.shape[1]), []
    for before, size in itertools.pairwise([0, *sizes]):
        added = rows[before:size]
        if left is None:
            gram = gram + added.mT @ added
        else:
            known, own = left[before:size, :before], left[before:size, before:size]
            half = added.mT @ (known @ rows[:before] + 0.5 * own @ added)
            gram = gram + half + half.mT
        found.append(eigenvalues(gram)[:size])
    return found


def _eliminated(down: Tensor, metrics: Sequence[Metric]) -> Elimination:
    """The channels in the order they go, in the metric of the member that reads them.

    That metric is read twice, so that nothing here keeps the moment that `eliminate` gives back.
    """
    left = metrics[2].left
    seen = down if left is None else factor(left).root.mT @ down
    return eliminate(seen, metrics[2].right)
