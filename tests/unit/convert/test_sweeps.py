"""Sweeps: the metric error never rises, and falls where the closed form saw less than it."""

from itertools import pairwise

import pytest
import torch

from qll.calibrate import LinearMoments
from qll.convert.candidates import format_of
from qll.convert.fit import fit, whiten
from qll.convert.metric import Metric, metric_of, plain
from qll.convert.sparsify import refitted
from qll.convert.sweeps import solved, swept_cores
from qll.tn import default_modes
from qll.tn.network import NetworkSpec

SHAPE = (24, 18)
SPECS = {
    "mpo": NetworkSpec("mpo", SHAPE, (6, 6), default_modes(SHAPE, 3), "interpolative"),
    "kron": NetworkSpec("kron", SHAPE, (5,), default_modes(SHAPE, 2), "interpolative"),
    "kron_padded": NetworkSpec("kron", SHAPE, (5,), {"out": (5, 5), "in": (5, 4)}),
    "tree": NetworkSpec("tree", SHAPE, (4,) * 4, default_modes(SHAPE, 3), "interpolative"),
    "tucker": NetworkSpec("tucker", SHAPE, (3, 4, 9), {"stack": (4, 6, 18)}, "interpolative"),
    "rows": NetworkSpec("panels", SHAPE, (4, 3), {"rows": (12, 12), "order": (24,)}),
    "columns": NetworkSpec("panels", SHAPE, (2, 5, 3), {"columns": (6, 8, 4)}, "interpolative"),
}


@pytest.fixture(scope="module")
def weight():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module")
def metric():
    torch.manual_seed(1)
    out, into = SHAPE
    x = torch.randn(64, into, dtype=torch.float64) @ torch.randn(into, into, dtype=torch.float64)
    g = torch.randn(64, out, dtype=torch.float64) @ torch.randn(out, out, dtype=torch.float64)
    return metric_of(LinearMoments(x.T @ x, g.T @ g, tokens=64, grad_tokens=64), "kfac")


def clamped(spec: NetworkSpec) -> NetworkSpec:
    kind = format_of(spec)
    wanted = zip(spec.ranks + (4,) * 9, kind.max_ranks(spec), strict=False)
    return kind.clamp(spec.with_ranks([min(pair) for pair in wanted]))


@pytest.mark.parametrize("name", sorted(SPECS))
def test_every_sweep_lowers_the_error_in_the_whole_metric(name, weight, metric):
    spec = clamped(SPECS[name])
    errors = [
        fit([weight], spec, [metric], torch.float64, sweeps).metric_error[0] for sweeps in range(4)
    ]
    assert errors[1] < 0.999 * errors[0]
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(errors))


@pytest.mark.parametrize("name", sorted(SPECS))
def test_full_ranks_stay_exact(name, weight, metric):
    spec = SPECS[name]
    spec = spec.with_ranks(format_of(spec).max_ranks(spec))
    assert fit([weight], spec, [metric], torch.float64, 1).rel_error[0] < 1e-7


@pytest.mark.parametrize("name", ["mpo", "kron", "tree", "tucker"])
def test_the_precision_of_the_saved_cores_is_enough(name, weight, metric):
    spec = clamped(SPECS[name])
    errors = [
        fit([weight], spec, [metric], dtype, 2).metric_error[0]
        for dtype in (torch.float64, torch.float32)
    ]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


def test_one_core_reaches_the_least_squares_solution(weight, metric):
    """Conjugate gradients, run long, against the normal equations written out."""
    spec = SPECS["kron"]
    seen = whiten([weight], spec, [plain()])
    network = format_of(spec).decompose(seen.matrices[0], seen.spec.with_gauge("none"))
    found = solved(network, 1, weight, metric, steps=200).cores[1]
    columns = []
    for entry in torch.eye(found.numel(), dtype=torch.float64):
        cores = (network.cores[0], entry.reshape(found.shape))
        columns.append(type(network)(network.spec, cores).to_matrix().flatten())
    basis = torch.stack(columns, 1)
    whole = torch.kron(metric.left, metric.right)
    expected = torch.linalg.solve(basis.T @ whole @ basis, basis.T @ whole @ weight.flatten())
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-6, atol=1e-8)


def test_a_diagonal_moment_leaves_the_closed_form(weight):
    spec = clamped(SPECS["kron"])
    metric = Metric("kfac", left=torch.arange(1.0, 25).double())
    seen = whiten([weight], spec, [metric])
    network = format_of(spec).decompose(seen.matrices[0], seen.spec.with_gauge("none"))
    assert swept_cores(network, seen, metric, 3) is network


def test_panels_at_equal_ranks_beat_their_closed_form_by_what_couples_them(weight, metric):
    """With a metric that couples nothing, sweeps change nothing."""
    free = Metric("kfac", torch.diag(metric.left.diagonal()), metric.right)
    spec = SPECS["rows"]
    before, after = (fit([weight], spec, [free], torch.float64, k) for k in (0, 2))
    torch.testing.assert_close(before.network.to_matrix(), after.network.to_matrix())


def test_a_sparse_refit_beats_masking_and_reaches_least_squares(weight, metric):
    mask = torch.rand(SHAPE, generator=torch.Generator().manual_seed(2)) < 0.5
    found = refitted(weight, mask, metric, steps=2000)
    assert not found[~mask].any()
    whole = torch.kron(metric.left, metric.right)[mask.flatten()]
    expected = torch.linalg.solve(whole[:, mask.flatten()], whole @ weight.flatten())
    torch.testing.assert_close(found[mask], expected, rtol=1e-4, atol=1e-5)
    few = metric.norm_squared(weight - refitted(weight, mask, metric, steps=3))
    assert metric.norm_squared(weight - found) < few < metric.norm_squared(weight * ~mask)


@pytest.mark.parametrize("ranks", [(200,), (13,), (100, 3)])
def test_sparse_is_fitted_in_the_metric(ranks, weight, metric):
    spec = NetworkSpec("sparse", SHAPE, ranks, gauge="interpolative")
    aware = fit([weight], spec, [metric], torch.float64)
    blind = fit([weight], spec, [plain()], torch.float64).network.to_matrix()
    error = metric.norm_squared(weight - blind) / metric.norm_squared(weight)
    assert aware.metric_error[0] ** 2 < error
    assert aware.network.spec.ranks == ranks
    assert aware.discarded_weight == pytest.approx(aware.metric_error[0] ** 2, rel=1e-6)
