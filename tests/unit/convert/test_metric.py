"""Metrics: the norm they define, their factors, singular moments, legs."""

import pytest
import torch

from qll.calibrate import LinearMoments
from qll.convert.metric import Metric, factor, leg_moments, metric_of, plain, shrink
from qll.errors import NonFiniteError


def random_moments(out: int = 5, into: int = 7, samples: int = 40) -> tuple:
    torch.manual_seed(0)
    x = torch.randn(samples, into, dtype=torch.float64) * torch.linspace(0.1, 3, into)
    g = torch.randn(samples, out, dtype=torch.float64) * torch.linspace(2, 0.1, out)
    return x, g, LinearMoments(input=x.T @ x, grad=g.T @ g, tokens=samples, grad_tokens=samples)


def test_activation_norm_is_the_output_error_on_the_sample(monkeypatch):
    monkeypatch.setattr("qll.convert.metric.SHRINK_INPUT", 0.0)
    x, _, moments = random_moments()
    error = torch.randn(5, 7, dtype=torch.float64)
    expected = (x @ error.T).square().sum() / len(x)
    assert metric_of(moments, "activation").norm_squared(error) == pytest.approx(float(expected))


def test_kfac_norm_is_the_mean_over_independent_pairs(monkeypatch):
    monkeypatch.setattr("qll.convert.metric.SHRINK_INPUT", 0.0)
    monkeypatch.setattr("qll.convert.metric.SHRINK_GRAD", 0.0)
    x, g, moments = random_moments()
    error = torch.randn(5, 7, dtype=torch.float64)
    expected = (g @ error @ x.T).square().mean()
    assert metric_of(moments, "kfac").norm_squared(error) == pytest.approx(float(expected))


def test_plain_is_frobenius():
    error = torch.randn(4, 3, dtype=torch.float64)
    assert plain().norm_squared(error) == pytest.approx(float(error.square().sum()))


def test_norm_squared_equals_the_whitened_frobenius_norm():
    _, _, moments = random_moments()
    metric = metric_of(moments, "kfac")
    error = torch.randn(5, 7, dtype=torch.float64)
    whitened = factor(metric.left).root.T @ error @ factor(metric.right).root
    assert float(whitened.square().sum()) == pytest.approx(metric.norm_squared(error))


@pytest.mark.parametrize("left", ["none", "diagonal", "matrix"])
@pytest.mark.parametrize("right", ["none", "diagonal", "matrix"])
def test_panels_of_a_large_error_add_up(left, right, monkeypatch):
    x, g, _ = random_moments()
    sides = {"none": lambda m: None, "diagonal": torch.diagonal, "matrix": lambda m: m}
    metric = Metric("kfac", sides[left](g.T @ g), sides[right](x.T @ x))
    error = torch.randn(5, 7, dtype=torch.float64)
    exact = metric.norm_squared(error)
    monkeypatch.setattr("qll.convert.metric._LARGE", 1)
    monkeypatch.setattr("qll.convert.metric._PANEL", 3)
    assert metric.norm_squared(error) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_factor_of_a_singular_moment_is_a_root_with_an_inverse(rank):
    torch.manual_seed(1)
    x = torch.randn(6, rank, dtype=torch.float64)
    moment = shrink(x @ x.T, 1e-3)
    result = factor(moment)
    torch.testing.assert_close(result.root @ result.root.mT, moment)
    identity = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(result.inverse @ result.root, identity, atol=1e-8, rtol=0)


def test_factor_without_shrinkage_falls_back_to_eigenvectors(caplog):
    x = torch.ones(6, 1, dtype=torch.float64)
    result = factor(x @ x.T)
    torch.testing.assert_close(result.root @ result.root.mT, x @ x.T, atol=1e-9, rtol=0)
    assert torch.isfinite(result.inverse).all()
    assert "singular" in caplog.text


def test_diagonal_factor():
    result = factor(torch.tensor([4.0, 9.0], dtype=torch.float64))
    assert result.root.tolist() == [2.0, 3.0]
    assert result.inverse_transposed.tolist() == [0.5, 1 / 3]


def test_shrink_refuses_nan():
    with pytest.raises(NonFiniteError, match="not finite"):
        shrink(torch.full((2, 2), float("nan")), 0.1)


def test_leg_moments_of_a_kronecker_product_are_its_factors():
    torch.manual_seed(2)
    parts = []
    for size in (2, 3, 4):
        root = torch.randn(size, size, dtype=torch.float64)
        parts.append(root @ root.T)
    whole = torch.kron(torch.kron(parts[0], parts[1]), parts[2])
    legs = leg_moments(whole, (2, 3, 4))
    torch.testing.assert_close(
        torch.kron(torch.kron(legs[0], legs[1]), legs[2]), whole, rtol=1e-6, atol=1e-6
    )


def test_leg_moments_of_a_diagonal_equal_those_of_its_matrix():
    values = torch.rand(12, dtype=torch.float64) + 0.1
    as_matrix = leg_moments(torch.diag(values), (3, 4))
    for leg, matrix in zip(leg_moments(values, (3, 4)), as_matrix, strict=True):
        torch.testing.assert_close(leg, matrix.diagonal())


def test_padded_legs_stay_invertible():
    values = torch.ones(10, dtype=torch.float64)
    legs = leg_moments(torch.diag(values), (4, 4))
    assert [len(leg) for leg in legs] == [4, 4]
    for leg in legs:
        assert torch.isfinite(factor(leg).inverse).all()
