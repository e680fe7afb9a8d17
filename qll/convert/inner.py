"""Fewer channels between matrices: candidates along a ladder of sizes, and the best fit.

`inner_channels` has the mathematics of an MLP, `inner_heads` that of value and
output, `inner_pairs` that of query and key.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from qll.convert.candidates import RANK_STEP, Candidate, format_of, useful
from qll.convert.inner_channels import channel_options, fit_channels
from qll.convert.inner_heads import fit_value_output, value_output_options
from qll.convert.inner_pairs import fit_query_key, query_key_options
from qll.convert.inner_parts import member_scales
from qll.convert.metric import Metric
from qll.convert.units import Unit
from qll.tn import JointChannels, JointQueryKey, JointValueOutput, tensor_shapes
from qll.tn.network import NetworkSpec

INNER = ("joint_channels", "joint_value_output", "joint_query_key")


def inner_ladder(
    unit: Unit,
    spec: NetworkSpec,
    weights: Sequence[Float[Tensor, "_ _"]],
    metrics: Sequence[Metric],
    step: int = RANK_STEP,
) -> list[Candidate]:
    """Candidates of an inner format, each with less loss than all smaller ones.

    Losses are in nats per token in the K-FAC metric, else relative to the member that loses.
    """
    exact = [weight.to(torch.float64) for weight in weights]
    scales = member_scales(exact, metrics)
    options = {
        "joint_channels": channel_options,
        "joint_value_output": value_output_options,
        "joint_query_key": query_key_options,
    }[spec.format](spec, exact, metrics, scales, step)
    found = []
    for ranks, loss in options:
        sized = format_of(spec).clamp(spec.with_ranks(ranks))
        found.append(Candidate(unit, sized, tensor_shapes(sized).num_params, loss))
    return useful(found, unit.dense_params)


def fit_inner(
    weights: Sequence[Float64[Tensor, "_ _"]], spec: NetworkSpec, metrics: Sequence[Metric]
) -> JointChannels | JointValueOutput | JointQueryKey:
    """The network of `spec` with the least loss in the metrics, in float64."""
    spec = format_of(spec).clamp(spec)
    if spec.format == "joint_channels":
        return fit_channels(weights, spec, metrics)
    if spec.format == "joint_value_output":
        return fit_value_output(weights, spec, metrics)
    return fit_query_key(weights, spec, metrics)
