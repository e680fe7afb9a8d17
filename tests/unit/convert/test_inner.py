"""Fewer channels between matrices: predicted losses are those of the fit, and are never beaten."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import LlamaConfig

from qll.calibrate import LinearMoments
from qll.convert.candidates import format_of
from qll.convert.fit import comparable_members, fit
from qll.convert.inner import INNER, inner_ladder
from qll.convert.inner_parts import member_scales
from qll.convert.metric import metric_of
from qll.convert.units import group_unit, template
from qll.tn import tensor_shapes

CONFIG = LlamaConfig(
    hidden_size=32, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2
)
GROUP = dict(zip(INNER, ("gate_up_down", "value_output", "query_key"), strict=True))


def moments(out: int, into: int, seed: int) -> LinearMoments:
    torch.manual_seed(seed)
    x = torch.randn(300, into, dtype=torch.float64) @ torch.randn(into, into, dtype=torch.float64)
    g = torch.randn(300, out, dtype=torch.float64) @ torch.randn(out, out, dtype=torch.float64)
    return LinearMoments(input=x.T @ x, grad=g.T @ g, tokens=300, grad_tokens=300)


def problem(format: str, kind: str = "kfac", gauge: str = "interpolative"):
    unit = group_unit(CONFIG, 0, GROUP[format])
    torch.manual_seed(2)
    weights = [torch.randn(shape, dtype=torch.float64) for shape in unit.shapes]
    # members that read the same vectors share their input moment
    metrics = [metric_of(moments(*shape, seed=3), kind) for shape in unit.shapes]
    return unit, template(unit, format, gauge, 3, CONFIG), weights, metrics


def reader_losses(format, weights, metrics, network):
    members = comparable_members(network, weights)
    errors = [
        scale * metric.norm_squared(weight - member)
        for scale, weight, metric, member in zip(
            member_scales(weights, metrics), weights, metrics, members, strict=True
        )
    ]
    return sum(errors) / 2 if format == "joint_query_key" else errors[-1]


@pytest.mark.parametrize("kind", ["plain", "activation", "kfac"])
@pytest.mark.parametrize("format", INNER)
def test_the_predicted_loss_is_that_of_the_fit(format, kind):
    unit, spec, weights, metrics = problem(format, kind)
    ladder = inner_ladder(unit, spec, weights, metrics)
    assert len(ladder) >= 2
    for item in ladder:
        assert item.params == tensor_shapes(item.spec).num_params < unit.dense_params
        kept, *own = item.spec.ranks
        if format == "joint_channels" and own != [min(kept, 32)] * 3:
            continue  # low-rank parts add what they lose themselves, to first order
        network = fit(weights, item.spec, metrics, torch.float64).network
        found = reader_losses(format, weights, metrics, network)
        assert found == pytest.approx(item.loss, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("format", INNER)
def test_ladders_grow_and_lose_less(format):
    unit, spec, weights, metrics = problem(format)
    ladder = inner_ladder(unit, spec, weights, metrics)
    for smaller, larger in itertools.pairwise(ladder):
        assert smaller.params < larger.params
        assert smaller.loss > larger.loss


@pytest.mark.parametrize("kind", ["plain", "activation", "kfac"])
@pytest.mark.parametrize("gauge", ["none", "interpolative"])
@pytest.mark.parametrize("format", INNER)
def test_full_rank_is_exact(format, gauge, kind):
    _, spec, weights, metrics = problem(format, kind, gauge)
    full = spec.with_ranks(format_of(spec).max_ranks(spec))
    fitted = fit(weights, full, metrics, torch.float64)
    assert max(fitted.rel_error) < 1e-8
    assert fitted.network.spec.gauge == gauge


def test_low_rank_parts_lose_no_more_than_predicted_by_much():
    """The sum over the parts is first order: within a few percent of what down_proj itself loses
    when its part alone is low rank, where it is exact."""
    unit, spec, weights, metrics = problem("joint_channels")
    ladder = inner_ladder(unit, spec, weights, metrics)
    mixed = [item for item in ladder if item.spec.ranks[1:] != (32, 32, 32)]
    for item in mixed[:3]:
        kept, *_, down = item.spec.ranks
        alone = item.spec.with_ranks((kept, min(kept, 32), min(kept, 32), down))
        network = fit(weights, alone, metrics, torch.float64).network
        assert reader_losses("joint_channels", weights, metrics, network) <= item.loss * (1 + 1e-6)


def test_the_basis_of_the_metric_beats_that_of_the_plain_product():
    _, spec, weights, metrics = problem("joint_value_output")
    spec = format_of(spec).clamp(spec.with_ranks((4, 32)))
    aware = fit(weights, spec, metrics, torch.float64).network
    blind = format_of(spec).decompose(weights, spec)
    losses = [
        reader_losses("joint_value_output", weights, metrics, network) for network in (aware, blind)
    ]
    assert losses[0] < losses[1]


def test_pairs_are_chosen_by_what_they_cost():
    """One pair after another is greedy, but among the best sixth of all choices."""
    _, spec, weights, metrics = problem("joint_query_key")
    spec = spec.with_ranks((2,))
    network = fit(weights, spec, metrics, torch.float64).network
    best = reader_losses("joint_query_key", weights, metrics, network)
    kind = format_of(spec)
    others = []
    for pairs in itertools.product(itertools.combinations(range(4), 2), repeat=2):
        other = kind.of_pairs(spec, weights, torch.tensor(pairs))
        others.append(reader_losses("joint_query_key", weights, metrics, other))
    assert best <= sorted(others)[len(others) // 6]
