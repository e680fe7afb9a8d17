"""Query and key with fewer rotary pairs: which go, and what is lost.

A score loses q_i k_i whether row i of one matrix or of both is dropped, so the losses of the two
are two estimates of one thing: their mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from qll.convert.inner_parts import Options, member_scales
from qll.convert.metric import Metric
from qll.tn import JointQueryKey
from qll.tn.joint_query_key import pair_rows
from qll.tn.network import NetworkSpec


def fit_query_key(
    weights: Sequence[Tensor], spec: NetworkSpec, metrics: Sequence[Metric]
) -> JointQueryKey:
    """The rows of the rotary pairs that are dearest to lose."""
    order, _ = _pair_order(spec, weights, metrics, member_scales(weights, metrics))
    return JointQueryKey.of_pairs(spec, weights, order[: spec.ranks[0]].sort(0).values.mT)


def query_key_options(
    spec: NetworkSpec,
    weights: Sequence[Tensor],
    metrics: Sequence[Metric],
    scales: Sequence[float],
    step: int,
) -> Options:
    _, losses = _pair_order(spec, weights, metrics, scales)
    for kept, loss in enumerate(losses[:-1], start=1):
        yield (kept,), loss


def _pair_order(
    spec: NetworkSpec,
    weights: Sequence[Tensor],
    metrics: Sequence[Metric],
    scales: Sequence[float],
) -> tuple[Int64[Tensor, "pairs kv_heads"], list[float]]:
    """Pairs of each key-value head, the last to go first, and the loss with the first 1, 2, ..

    Every head loses its cheapest pair in turn. The loss of rows R is the sum over R x R of
    G * (W C W^T), so it needs one number for every two pairs.
    """
    costs = sum(
        0.5 * scale * _pair_costs(pair_rows(spec, member), weight, metric)
        for member, (weight, metric, scale) in enumerate(zip(weights, metrics, scales, strict=True))
    )
    kv_heads = spec.modes["heads"][1]
    dropping = costs.diagonal().clone()  # what the loss would grow by
    order, losses, total = [], [], 0.0
    for _ in range(len(costs) // kv_heads):
        losses.append(total)
        gone = []
        for head in dropping.unflatten(0, (kv_heads, -1)):
            pair = int(head.argmin())
            number = len(gone) * len(head) + pair
            total += float(head[pair])
            gone.append(pair)
            dropping += 2 * costs[number]
            dropping[number] = torch.inf
        order.append(gone)
    return torch.tensor(order[::-1]), losses[::-1]


def _pair_costs(
    rows: Int64[Tensor, "pairs heads 2"], weight: Tensor, metric: Metric
) -> Float64[Tensor, "pairs pairs"]:
    moved = weight if metric.right is None else weight @ metric.right
    loss = moved @ weight.mT
    loss = torch.diag(loss.diagonal()) if metric.left is None else loss * metric.left
    flat = rows.flatten(1)
    return loss[flat][:, :, flat].sum((1, 3))
