"""Rounding the cores of a network together: below nearest rounding, and never getting worse."""

import pytest
import torch

from qll.convert.alternate import Problem, round_matrix, round_network
from qll.convert.candidates import format_of
from qll.convert.fit import dense_members, fit
from qll.convert.metric import Metric, metric_of, plain
from qll.tn.network import NetworkSpec
from qll.tn.packed import Packing, as_rows, from_rows
from qll.tn.rounding import round_nearest
from tests.unit.convert.test_fit import JOINT, SPECS, moments

PACKING = Packing(4, 8)


def fitted(format: str, gauge: str = "interpolative"):
    """A truncated network of `format`, and the metrics that it was fitted in."""
    torch.manual_seed(3)
    spec = (SPECS | JOINT)[format].with_gauge(gauge)
    shapes = spec.members or (spec.shape,)
    weights = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    metrics = [metric_of(moments(*shape, seed=k), "kfac") for k, shape in enumerate(shapes)]
    kind = format_of(spec)
    most = kind.max_ranks(spec)
    ranks = [max(1, 2 * rank // 3) for rank in most]
    return fit(weights, kind.clamp(spec.with_ranks(ranks)), metrics, torch.float64).network, metrics


def nearest(network):
    return [
        from_rows(
            round_nearest(as_rows(core, PACKING.group), PACKING).values,
            tuple(core.shape),
            PACKING.group,
        )
        if core.numel()
        else core
        for core in network.cores
    ]


@pytest.mark.parametrize("format", sorted(SPECS | JOINT))
@pytest.mark.parametrize("gauge", ["interpolative", "none"])
def test_every_format_beats_nearest_rounding_and_never_gets_worse(format, gauge):
    network, metrics = fitted(format, gauge)
    found = round_network(network, PACKING, metrics)
    problem = Problem(network, metrics, PACKING)
    assert found.losses[-1] * problem.norm < 0.8 * problem.loss(nearest(network))
    assert list(found.losses) == sorted(found.losses, reverse=True)
    # the loss it reports is that of the cores it gives
    assert problem.loss(found.network.cores) / problem.norm == pytest.approx(found.losses[-1])
    for core, rounded in zip(found.network.cores, found.rounded, strict=True):
        assert torch.equal(as_rows(core, PACKING.group), rounded.values)


@pytest.mark.parametrize("gauge", ["interpolative", "none"])
def test_the_pair_of_low_rank_is_the_metric_of_each_core(gauge):
    """Moving a core by D costs tr(D^T left D right), exactly."""
    network, metrics = fitted("lowrank", gauge)
    problem, cores = Problem(network, metrics, PACKING), list(network.cores)
    for k, core in enumerate(cores):
        left, right = problem.pair(cores, k)
        step = torch.randn_like(core)
        moved = [*cores[:k], core + step, *cores[k + 1 :]]
        rows = as_rows(step, PACKING.group)
        assert problem.loss(moved) == pytest.approx(float((left @ rows @ right * rows).sum()))


def test_probes_estimate_the_same_pair():
    network, metrics = fitted("lowrank", "none")
    problem, cores = Problem(network, metrics, PACKING), list(network.cores)
    for k in range(2):
        exact, probed = problem.pair(cores, k), problem._probed_pair(cores, k)
        for one, other in zip(exact, probed, strict=True):
            cosine = (one * other).sum() / one.norm() / other.norm()
            assert cosine > 0.85


@pytest.mark.parametrize("format", ["lowrank", "mpo", "joint_tree"])
def test_refitting_a_core_undoes_the_damage_to_it(format):
    network, metrics = fitted(format)
    problem, cores = Problem(network, metrics, PACKING), list(network.cores)
    for k, core in enumerate(cores):
        damaged = [*cores[:k], core + 0.1 * torch.randn_like(core), *cores[k + 1 :]]
        before = problem.loss(damaged)
        damaged[k] = problem.refit(damaged, k, problem.pair(damaged, k))
        assert problem.loss(damaged) < (1e-12 if format == "lowrank" else 0.05) * before


def test_it_is_deterministic():
    network, metrics = fitted("mpo")
    one, two = (round_network(network, PACKING, metrics) for _ in range(2))
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(one.rounded, two.rounded, strict=True))


def test_a_core_without_numbers_is_no_obstacle():
    spec = NetworkSpec("lowrank", (6, 5), (5,), gauge="interpolative")
    square = spec.with_ranks((5,))
    network = fit([torch.randn(6, 5)], square, [plain()], torch.float64).network
    full = NetworkSpec("lowrank", (5, 6), (5,), gauge="interpolative")
    empty = fit([torch.randn(5, 6)], full, [plain()], torch.float64).network
    assert empty.cores[0].numel() == 0
    for each in (network, empty):
        assert round_network(each, PACKING, [plain()]).losses[-1] < 0.01


def test_a_long_side_is_seen_by_its_diagonal(monkeypatch):
    network, metrics = fitted("mpo")
    monkeypatch.setattr("qll.convert.alternate.MOST_COUPLED", 1)
    left, right = Problem(network, metrics, PACKING).pair(list(network.cores), 1)
    assert (left.ndim, right.ndim) == (1, 2)
    found = round_network(network, PACKING, metrics)
    problem = Problem(network, metrics, PACKING)
    assert found.losses[-1] * problem.norm < problem.loss(nearest(network))


def test_a_dense_matrix_with_few_columns_is_grouped_down_its_rows():
    weight = torch.randn(40, 3, dtype=torch.float64)
    metric = metric_of(moments(40, 3, seed=1), "kfac")
    found = round_matrix(weight, Packing(4, 32), metric)
    assert found.matrix.shape == (40, 3)
    assert found.rounded.codes.shape == (3, 40)
    rows = Metric("kfac", left=metric.left.diagonal(), right=metric.right)
    assert round_matrix(weight, Packing(4, 32), rows).matrix.shape == (40, 3)
    blind = from_rows(round_nearest(as_rows(weight, 32), Packing(4, 32)).values, (40, 3), 32)
    assert metric.norm_squared(weight - found.matrix) < metric.norm_squared(weight - blind)


def test_dense_members_are_what_the_codes_stand_for():
    network, metrics = fitted("joint_tree")
    found = round_network(network, Packing(8, 8), metrics)
    for wanted, member in zip(dense_members(network), dense_members(found.network), strict=True):
        assert (wanted - member).norm() < 0.05 * wanted.norm()
