"""Low rank by the short side: the same networks as by roots of both moments."""

from __future__ import annotations

import pytest
import torch

from qll.convert.fit import fit, spectra
from qll.convert.metric import Metric, factor, plain
from qll.convert.short_side import short_spectrum, short_truncation
from qll.convert.truncation import truncated
from qll.tn.network import NetworkSpec

F64 = torch.float64


def moment(size: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 2 * size, generator=draw, dtype=F64) * torch.rand(size, 1, generator=draw)
    return x @ x.T / (2 * size) + 0.05 * torch.eye(size, dtype=F64)


METRICS = {
    "plain": lambda out, into: plain(),
    "activation": lambda out, into: Metric("activation", right=moment(into, 1)),
    "kfac": lambda out, into: Metric("kfac", left=moment(out, 2), right=moment(into, 1)),
    "diagonal": lambda out, into: Metric(
        "kfac", left=1 + torch.arange(out, dtype=F64), right=moment(into, 1)
    ),
}


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("shape", [(72, 200), (200, 72), (80, 80)])
def test_same_matrix_and_spectrum_as_by_roots(kind, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    metric = METRICS[kind](*shape)
    left, right = (None if m is None else factor(m) for m in (metric.left, metric.right))
    expected = truncated(weight, 30, left, right).to_matrix()
    network, lost, total = short_truncation(weight, 30, metric)
    assert torch.allclose(network.to_matrix(), expected, atol=1e-9)
    assert metric.norm_squared(weight) == pytest.approx(total, rel=1e-10)
    error = metric.norm_squared(weight - expected)
    assert error == pytest.approx(lost * total, rel=1e-8)
    values = short_spectrum(weight, metric)
    assert float(values[30:].square().sum()) == pytest.approx(error, rel=1e-8)


def test_fit_takes_it_and_stores_rows_of_the_matrix():
    weight, metric = torch.randn(96, 128, dtype=F64), METRICS["activation"](96, 128)
    spec = NetworkSpec("lowrank", (96, 128), (40,), gauge="interpolative")
    found = fit([weight], spec, [metric], F64)
    assert found.metric_error[0] ** 2 == pytest.approx(found.discarded_weight, rel=1e-8)
    values = spectra([weight], spec, [metric])[0]
    assert float(values[40:].square().sum() / values.square().sum()) == pytest.approx(
        found.discarded_weight, rel=1e-9
    )


def test_left_to_the_decomposition_where_squares_would_round():
    exact = torch.randn(80, 10, dtype=F64) @ torch.randn(10, 90, dtype=F64)
    assert short_truncation(exact, 20, plain()) is None
    assert short_spectrum(exact, plain()) is None
    assert short_truncation(torch.randn(8, 90), 4, plain()) is None
    found = fit([exact], NetworkSpec("lowrank", (80, 90), (20,)), [plain()], F64)
    assert found.rel_error[0] < 1e-12


def test_a_singular_moment_of_the_short_side():
    x = torch.randn(70, 20, dtype=F64)
    metric = Metric("kfac", left=x @ x.T, right=moment(90, 3))
    weight = torch.randn(70, 90, dtype=F64)
    network, lost, total = short_truncation(weight, 10, metric)
    error = metric.norm_squared(weight - network.to_matrix())
    assert error == pytest.approx(lost * total, rel=1e-3)


def test_errors_of_large_matrices_are_those_of_small_ones(monkeypatch):
    error, metric = torch.randn(90, 120, dtype=F64), METRICS["kfac"](90, 120)
    exact = metric.norm_squared(error)
    monkeypatch.setattr("qll.convert.metric._LARGE", 1)
    assert metric.norm_squared(error) == pytest.approx(exact, rel=1e-5)
