"""Sums of Kronecker products: planted sums are found, and the two-site operator is the same."""

from __future__ import annotations

import pytest
import torch

from qll.errors import UsageError
from qll.tn.kron import KroneckerSum
from qll.tn.mpo import MPO
from qll.tn.network import NetworkSpec

MODES = {"out": (4, 6), "in": (5, 3)}
SPEC = NetworkSpec("kron", (24, 15), (3,), MODES)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(terms: int) -> torch.Tensor:
    return sum(torch.kron(noise(4, 5, seed=j), noise(6, 3, seed=100 + j)) for j in range(terms))


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_planted_sums_are_recovered(terms):
    found = KroneckerSum.decompose(planted(terms), SPEC.with_ranks([terms]))
    torch.testing.assert_close(found.to_matrix(), planted(terms))
    assert (KroneckerSum.cut_spectra(planted(terms), SPEC)[0][terms:] < 1e-6).all()


def test_the_matrix_is_the_sum_of_its_terms():
    found = KroneckerSum.decompose(noise(24, 15), SPEC)
    first, second = found.cores
    assert first.shape == (3, 4, 5)
    assert second.shape == (3, 6, 3)
    terms = sum(torch.kron(a, b) for a, b in zip(first, second, strict=True))
    torch.testing.assert_close(found.to_matrix(), terms)


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_application_is_a_x_b_transposed(tokens):
    found = KroneckerSum.decompose(noise(24, 15), SPEC)
    x = noise(tokens, 15, seed=1)
    expected = sum(
        (a @ x.reshape(tokens, 5, 3) @ b.mT).reshape(tokens, 24)
        for a, b in zip(*found.cores, strict=True)
    )
    torch.testing.assert_close(found.apply(x), expected)
    torch.testing.assert_close(found.interpolate().apply(x), expected)


def test_the_gauge_saves_the_square_of_the_terms():
    plain = KroneckerSum.decompose(noise(24, 15), SPEC)
    stored = plain.interpolate()
    floats = [sum(core.numel() for core in found.cores) for found in (plain, stored)]
    assert floats[0] - floats[1] == 9
    assert KroneckerSum.tensor_shapes(stored.spec).cores == ((17, 3), (3, 6, 3))
    torch.testing.assert_close(stored.expand().to_matrix(), plain.to_matrix())


def test_every_verb_is_that_of_the_two_site_operator():
    matrix = noise(24, 15)
    found = KroneckerSum.decompose(matrix, SPEC).interpolate()
    other = MPO.decompose(matrix, NetworkSpec("mpo", (24, 15), (3,), MODES)).interpolate()
    torch.testing.assert_close(found.to_matrix(), other.to_matrix())
    torch.testing.assert_close(found.bond_spectrum(), other.bond_spectrum(0))
    assert found.entropy() == pytest.approx(other.entropy(0))
    assert found.flops(9) == other.flops(9)
    ids = torch.tensor([23, 0])
    torch.testing.assert_close(found.rows(ids), other.rows(ids))
    legs = [noise(4, 4), None], [None, noise(3, 3)]
    torch.testing.assert_close(
        found.transform_legs(*legs).to_matrix(), other.transform_legs(*legs).to_matrix()
    )
    smaller = found.round(ranks=[2])
    assert smaller.spec == found.spec.with_ranks([2])
    torch.testing.assert_close(smaller.to_matrix(), other.round(ranks=[2]).to_matrix())


def test_terms_are_clamped():
    assert KroneckerSum.max_ranks(SPEC) == (18,)
    assert KroneckerSum.clamp(SPEC.with_ranks([99])).ranks == (18,)
    assert KroneckerSum.clamp(SPEC).format == "kron"


def test_three_factors_are_refused():
    with pytest.raises(UsageError, match="two factors"):
        KroneckerSum.max_ranks(
            NetworkSpec("kron", (8, 8), modes={"out": (2, 2, 2), "in": (2,) * 3})
        )
