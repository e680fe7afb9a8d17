"""Entropies of matrices with known answers, against the real random-matrix baseline."""

from __future__ import annotations

from itertools import product
from math import log

import numpy as np
import pytest
import torch
from scipy.special import digamma

from qll.errors import UsageError
from qll.tn.entropy import (
    channel_spectrum,
    entanglement_gap,
    entropy_rank,
    max_entropy,
    participation_ratio,
    random_entropy,
    random_purity,
    renyi,
    renyi2,
    schmidt_weights,
    site_spectra,
    stable_rank,
    von_neumann,
    weight_entropy,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian_entropies(m: int, n: int, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """S_1 and purity of `samples` Gaussian matrices, by numpy's SVD and the definition."""
    s = np.linalg.svd(noise(samples, m, n).numpy(), compute_uv=False)
    weights = s**2 / (s**2).sum(-1, keepdims=True)
    entropies = -(weights * np.log(weights)).sum(-1)
    return torch.from_numpy(entropies), torch.from_numpy((weights**2).sum(-1))


@pytest.mark.parametrize("n", [0.0, 0.5, 1, 2, 7.5, float("inf")])
def test_equal_values_have_the_largest_entropy_at_every_index(n):
    assert renyi(torch.ones(6), n) == pytest.approx(log(6))
    assert renyi(torch.tensor([5.0, 0.0, 0.0]), n) == 0.0
    assert max_entropy(6, 40) == pytest.approx(log(6))


def test_von_neumann_by_hand():
    s = torch.tensor([3.0, 1.0]).double()
    assert von_neumann(s) == pytest.approx(-0.9 * log(0.9) - 0.1 * log(0.1))
    assert von_neumann(1e-9 * s.flip(0)) == pytest.approx(von_neumann(s))


def test_renyi_falls_with_the_index_and_is_continuous_at_one():
    s = noise(30).abs()
    orders = [0.0, 0.3, 0.999999, 1.0, 1.000001, 2.0, 10.0, float("inf")]
    values = [renyi(s, order) for order in orders]
    assert values == sorted(values, reverse=True)
    assert values[2] == pytest.approx(values[3], abs=1e-5)
    assert values[4] == pytest.approx(values[3], abs=1e-5)
    with pytest.raises(UsageError):
        renyi(s, -1.0)


def test_effective_ranks_are_exponentials_of_entropies():
    s = noise(20).abs()
    assert participation_ratio(s) == pytest.approx(np.exp(renyi(s, 2.0)))
    assert entropy_rank(s) == pytest.approx(np.exp(von_neumann(s)))
    assert stable_rank(s) == pytest.approx(float(s.square().sum() / s.max().square()))
    assert stable_rank(s) == pytest.approx(np.exp(renyi(s, float("inf"))))
    values = s.sort(descending=True).values
    weights = values.square() / values.square().sum()
    assert entanglement_gap(values) == pytest.approx(float((weights[0] / weights[1]).log()))
    assert entanglement_gap(values[:1]) == float("inf")


def test_a_zero_matrix_has_no_entropy():
    zero = torch.zeros(4)
    assert von_neumann(zero) == renyi(zero, 2.0) == renyi(zero, 0.0) == 0.0
    assert np.isfinite(participation_ratio(zero))


@pytest.mark.parametrize("sites", [(2, 2, 2), (4, 2), (3, 3, 3)])
def test_the_identity_is_a_product_operator_with_full_channel_entropy(sites):
    identity = torch.eye(int(np.prod(sites)))
    assert von_neumann(channel_spectrum(identity)) == pytest.approx(log(len(identity)))
    for spectrum in site_spectra(identity, sites, sites):
        assert von_neumann(spectrum) == pytest.approx(0.0, abs=1e-12)


def test_a_kronecker_product_has_no_entropy_at_its_own_cut():
    matrix = torch.kron(noise(3, 4), torch.kron(noise(5, 2), noise(2, 2)))
    for spectrum in site_spectra(matrix, (3, 5, 2), (4, 2, 2)):
        assert von_neumann(spectrum) == pytest.approx(0.0, abs=1e-12)


def test_site_spectra_are_those_of_the_unfoldings_written_out():
    out, into = (2, 3, 2), (3, 2, 2)
    matrix = noise(11, 12)  # one padded row
    found = site_spectra(matrix, out, into)
    for cut in (1, 2):
        left = list(product(*[range(m * n) for m, n in zip(out[:cut], into[:cut], strict=True)]))
        right = list(product(*[range(m * n) for m, n in zip(out[cut:], into[cut:], strict=True)]))
        unfolding = np.zeros((len(left), len(right)))
        for (a, first), (b, second) in product(enumerate(left), enumerate(right)):
            row = column = 0
            for pair, m, n in zip((*first, *second), out, into, strict=True):
                row, column = row * m + pair // n, column * n + pair % n
            unfolding[a, b] = matrix[row, column] if row < 11 else 0.0
        expected = np.linalg.svd(unfolding, compute_uv=False)
        np.testing.assert_allclose(found[cut - 1].numpy(), expected, atol=1e-12)


def test_permutations_change_site_cuts_but_not_the_channel_cut():
    grid = torch.linspace(0, 1, 64, dtype=torch.float64)
    smooth = torch.exp(-((grid[:, None] - grid) ** 2) / 0.1)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    shuffled = smooth[order][:, order]
    rotated = torch.linalg.qr(noise(64, 64)).Q @ smooth
    channel = von_neumann(channel_spectrum(smooth))
    assert von_neumann(channel_spectrum(shuffled)) == pytest.approx(channel, abs=1e-9)
    assert von_neumann(channel_spectrum(rotated)) == pytest.approx(channel, abs=1e-9)
    modes = (4, 4, 4)
    for before, after in zip(
        site_spectra(smooth, modes, modes), site_spectra(shuffled, modes, modes), strict=True
    ):
        assert von_neumann(after) > von_neumann(before) + 0.5


@pytest.mark.parametrize(("m", "n", "samples"), [(8, 8, 4000), (8, 64, 2000), (24, 40, 1000)])
def test_the_real_baseline_is_the_mean_of_gaussian_matrices(m, n, samples):
    entropies, purities = gaussian_entropies(m, n, samples)
    error = 3 * float(entropies.std()) / samples**0.5 + 0.4 / m**2  # noise + next order in 1/m
    assert random_entropy(m, n) == pytest.approx(float(entropies.mean()), abs=error)
    assert random_entropy(m, n) == random_entropy(n, m)
    error = 3 * float(purities.std()) / samples**0.5
    assert random_purity(m, n) == pytest.approx(float(purities.mean()), abs=error)


@pytest.mark.parametrize("shape", [(64, 64), (48, 300)])
def test_one_random_weight_lies_within_three_deviations(shape):
    entropies, _ = gaussian_entropies(*shape, samples=40)
    one = von_neumann(channel_spectrum(noise(*shape, seed=99)))
    assert one == pytest.approx(random_entropy(*shape), abs=3 * float(entropies.std()))


@pytest.mark.parametrize("sides", [(20, 20), (30, 200), (100, 1000)])
def test_real_noise_lies_below_the_complex_page_value(sides):
    m, n = sides
    page = digamma(m * n + 1) - digamma(n + 1) - (m - 1) / (2 * n)
    gap = page - random_entropy(m, n)
    assert 0 < gap < 1 / (2 * n) * 1.05  # ln m - m/(2n) against ln m - (m + 1)/(2n)


def test_random_baseline_at_the_edges():
    assert random_entropy(1, 1) == 0.0
    assert random_entropy(1, 1000) == pytest.approx(0.0, abs=1e-5)
    assert random_entropy(16, 10**7) == pytest.approx(log(16), abs=1e-5)


def test_differentiable_forms_agree_with_the_spectrum():
    matrix = noise(7, 12)
    s = channel_spectrum(matrix)
    assert float(renyi2(matrix)) == pytest.approx(renyi(s, 2.0))
    weights = schmidt_weights(matrix)
    assert float(weights.sum()) == pytest.approx(1.0)
    assert float(weight_entropy(weights)) == pytest.approx(von_neumann(s))


@pytest.mark.parametrize("n", [0.5, 1.0, 2.0, float("inf")])
def test_gradients_are_finite_on_deficient_ranks(n):
    for matrix in (torch.eye(4, dtype=torch.float64), torch.diag(torch.tensor([2.0, 1, 0, 0]))):
        matrix = matrix.double().requires_grad_()
        s = torch.linalg.svdvals(matrix)
        weight_entropy(s.square() / s.square().sum(), n).backward()
        assert matrix.grad.isfinite().all()


def test_the_gradient_of_the_entropy_is_the_slope():
    matrix, direction = noise(5, 6), noise(5, 6, seed=1)
    steps = [von_neumann(channel_spectrum(matrix + h * direction)) for h in (-1e-5, 1e-5)]
    matrix.requires_grad_()
    weight_entropy(schmidt_weights(matrix)).backward()
    slope = float((matrix.grad * direction).sum())
    assert slope == pytest.approx((steps[1] - steps[0]) / 2e-5, rel=1e-5)
