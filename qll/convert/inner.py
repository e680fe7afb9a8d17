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
from qll.tn import JointChannels, JointQueryKey, JointValueOutput, parts, tensor_shapes
from qll.tn.joint_channels import part_specs
from qll.tn.joint_value_output import output_part
from qll.tn.network import NetworkSpec

INNER = ("joint_channels", "joint_value_output", "joint_query_key")


def inner_ladder(
    unit: Unit,
    spec: NetworkSpec,
    weights: Sequence[Float[Tensor, "_ _"]],
    metrics: Sequence[Metric],
    step: int = RANK_STEP,
    is_whole: bool = False,
) -> list[Candidate]:
    """Candidates of an inner format, each with less loss than all smaller ones.

    Losses are in nats per token in the K-FAC metric, else relative to the member that loses.
    is_whole: only those whose matrices are all whole, none of low rank.
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
        if is_whole and not is_whole_inside(sized):
            continue
        found.append(Candidate(unit, sized, tensor_shapes(sized).num_params, loss))
    return useful(found, unit.dense_params)


def is_whole_inside(spec: NetworkSpec) -> bool:
    """Whether the format is one of fewer channels, and none of its matrices is low rank.

    >>> is_whole_inside(NetworkSpec("lowrank", (4, 4), (2,)))
    False
    """
    return spec.format in INNER and all(map(parts.is_whole, _inside(spec)))


def _inside(spec: NetworkSpec) -> tuple[NetworkSpec, ...]:
    """The matrices of an inner format that may be low rank."""
    if spec.format == "joint_channels":
        return part_specs(spec)
    return (output_part(spec),) if spec.format == "joint_value_output" else ()


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
