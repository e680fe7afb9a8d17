"""Truncated SVD: the optimum, its error, its shortcuts, and inputs that must be refused."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

import qll.tn.svd as svd
from qll.errors import ConvergenceError, NonFiniteError, UsageError
from qll.tn.svd import METHODS, discarded_weight, rank_for, singular_values, truncated_svd


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(rows: int, columns: int, values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    left = torch.linalg.qr(noise(rows, len(values), seed=seed)).Q
    right = torch.linalg.qr(noise(columns, len(values), seed=seed + 1)).Q
    return (left * values) @ right.mT


def relative_error(matrix: torch.Tensor, found) -> float:
    return float(((found.u * found.s) @ found.vh - matrix).norm() / matrix.norm())


@pytest.mark.parametrize("method", ["auto", "svd", "gram"])
@pytest.mark.parametrize("shape", [(90, 70), (70, 90), (300, 64), (64, 300), (5, 9)])
def test_agrees_with_numpy_and_reports_its_own_error(method, shape):
    matrix = noise(*shape)
    expected = np.linalg.svd(matrix.numpy(), compute_uv=False)
    found = truncated_svd(matrix, rank=4, method=method)
    np.testing.assert_allclose(found.s.numpy(), expected[:4], rtol=1e-10)
    best = np.sqrt((expected[4:] ** 2).sum() / (expected**2).sum())
    assert relative_error(matrix, found) == pytest.approx(best, rel=1e-9)
    assert found.discarded_weight == pytest.approx(best**2, rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_wide_is_tall_transposed(method):
    matrix = noise(80, 200)
    wide = truncated_svd(matrix, rank=7, method=method)
    tall = truncated_svd(matrix.mT, rank=7, method=method)
    assert wide.u.shape == (80, 7)
    assert wide.vh.shape == (7, 200)
    torch.testing.assert_close(wide.s, tall.s, rtol=1e-10, atol=0)
    product = (wide.u * wide.s) @ wide.vh
    torch.testing.assert_close(product, ((tall.u * tall.s) @ tall.vh).mT, rtol=0, atol=1e-8)


def test_factors_are_orthonormal_even_when_the_gram_matrix_cannot_see_the_tail():
    values = torch.logspace(0, -9, 80, dtype=torch.float64)
    matrix = with_spectrum(300, 100, values)
    u, s, vh, _ = truncated_svd(matrix, rank=80)
    identity = torch.eye(80, dtype=torch.float64)
    torch.testing.assert_close(u.mT @ u, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(vh @ vh.mT, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(s, values, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rtol", [0.5, 1e-2, 1e-5])
def test_rtol_is_kept_with_the_fewest_values(dtype, rtol):
    matrix = with_spectrum(120, 90, torch.logspace(0, -7, 90, dtype=torch.float64)).to(dtype)
    found = truncated_svd(matrix, rtol=rtol)
    assert relative_error(matrix.double(), found) <= rtol
    fewer = truncated_svd(matrix, rank=found.s.numel() - 1)
    assert relative_error(matrix.double(), fewer) > rtol


@pytest.mark.parametrize("ratio", [0.08, 1e-3])
def test_large_float32_matrices_lose_no_more_than_the_best(monkeypatch, ratio):
    """The Gram matrix is in float32 where the kept values are of a size, else in float64."""
    monkeypatch.setattr(svd, "_WIDE_SIDE", 96)
    values = torch.cat([torch.ones(1), torch.linspace(1.5 * ratio, ratio / 2, 95)]).double()
    matrix = with_spectrum(96, 400, values)
    u, s, vh, weight = truncated_svd(matrix.float(), rank=48)
    assert u.dtype == torch.float32
    best = float((values[48:].square().sum() / values.square().sum()).sqrt())
    error = float(((u.double() * s.double()) @ vh.double() - matrix).norm() / matrix.norm())
    assert error == pytest.approx(best, rel=1e-5)
    assert weight == pytest.approx(best**2, rel=1e-3)
    for gram in (u.mT @ u, vh @ vh.mT):
        torch.testing.assert_close(gram, torch.eye(48), rtol=0, atol=1e-4)


def test_rtol_and_rank_together_take_the_smaller():
    matrix = with_spectrum(40, 40, torch.logspace(0, -4, 40, dtype=torch.float64))
    assert truncated_svd(matrix, rank=3, rtol=1e-3).s.numel() == 3
    assert truncated_svd(matrix, rank=40, rtol=0.5).s.numel() < 10


@pytest.mark.parametrize("method", METHODS)
def test_full_rank_loses_nothing(method):
    matrix = noise(70, 66)
    found = truncated_svd(matrix, rank=500, method=method)
    assert found.s.numel() == 66
    assert found.discarded_weight == 0.0
    assert relative_error(matrix, found) < 1e-12


def test_randomised_is_near_optimal_on_a_flat_spectrum_and_repeatable():
    matrix = noise(400, 300)
    best = truncated_svd(matrix, rank=30, method="svd")
    state = torch.random.get_rng_state()
    found = truncated_svd(matrix, rank=30, method="rand", seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    assert relative_error(matrix, found) < 1.02 * relative_error(matrix, best)
    assert found.discarded_weight == pytest.approx(relative_error(matrix, found) ** 2, rel=1e-9)
    again = truncated_svd(matrix, rank=30, method="rand", seed=3)
    assert torch.equal(found.u, again.u)


def test_randomised_stops_at_rtol():
    matrix = with_spectrum(300, 200, torch.logspace(0, -6, 200, dtype=torch.float64))
    found = truncated_svd(matrix, rank=60, rtol=1e-1, method="rand")
    assert found.s.numel() == truncated_svd(matrix, rtol=1e-1, method="svd").s.numel()
    assert relative_error(matrix, found) <= 1e-1


@pytest.mark.parametrize("shape", [(100, 100), (64, 5000), (5000, 64), (3, 4)])
def test_singular_values_agree_with_numpy(shape):
    matrix = noise(*shape)
    expected = np.linalg.svd(matrix.numpy(), compute_uv=False)
    np.testing.assert_allclose(singular_values(matrix).numpy(), expected, rtol=1e-7)


def test_singular_values_resolve_zeros():
    values = torch.cat((torch.ones(40), torch.full((40,), 1e-11))).double()
    matrix = with_spectrum(400, 80, values)
    found = singular_values(matrix)
    assert found[:40].sub(1).abs().max() < 1e-12
    assert found[40:].max() < 1.1e-11


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(dtype):
    matrix = noise(70, 80).to(dtype)
    found = truncated_svd(matrix)
    assert found.u.dtype == torch.float64
    assert relative_error(matrix.double(), found) < 1e-12
    assert singular_values(matrix).dtype == torch.float64


@pytest.mark.parametrize("method", METHODS)
def test_zero_matrix(method):
    found = truncated_svd(torch.zeros(80, 70), rank=3, rtol=0.1, method=method)
    assert found.discarded_weight == 0.0
    assert not found.s.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_input_is_refused(bad):
    matrix = torch.ones(4, 4)
    matrix[1, 2] = bad
    with pytest.raises(NonFiniteError, match="1"):
        truncated_svd(matrix)
    with pytest.raises(NonFiniteError):
        singular_values(matrix)


@pytest.mark.parametrize(
    "options",
    [{"rank": 0}, {"rtol": -1.0}, {"rtol": float("nan")}, {"method": "qr"}, {"method": "rand"}],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(UsageError):
        truncated_svd(torch.ones(2, 2), **options)


def test_a_solver_that_fails_is_named(monkeypatch):
    def fails(*_, **__):
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "svd", fails)
    with pytest.raises(ConvergenceError, match="no convergence"):
        truncated_svd(torch.eye(3))
    monkeypatch.setattr(scipy.linalg, "eigh", fails)
    with pytest.raises(ConvergenceError, match="no convergence"):
        truncated_svd(torch.eye(70))


def test_overflow_inside_the_solver_is_an_error():
    with pytest.raises(ConvergenceError, match="not finite"):
        truncated_svd(torch.full((70, 70), 1e200, dtype=torch.float64))


def test_the_tail_is_summed_from_the_small_end():
    s = torch.cat((torch.tensor([1e4]), torch.full((10_000,), 1e-5))).float()
    assert discarded_weight(s, 1) == pytest.approx(1e-6 / (1e8 + 1e-6), rel=1e-5)
    assert discarded_weight(s, s.numel()) == 0.0


def test_rank_for_counts_at_least_one():
    assert rank_for(torch.zeros(3), 0.1) == 1
    assert rank_for(torch.tensor([1.0, 1.0]), 2.0) == 1
    assert rank_for(torch.tensor([1.0, 1.0]), 0.0) == 2
