"""Entropies of one matrix: values known by hand, invariances, the random line, padding."""

from __future__ import annotations

from math import log, sqrt

import numpy as np
import pytest
import torch

from qll.errors import NonFiniteError, ShapeError, UsageError
from qll.lens import look, matrix_entropies, random_spectrum, spectrum


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_cut(entries: list[dict]) -> dict[str, dict]:
    return {entry["cut"]: entry for entry in entries}


def test_identity_is_maximal_at_the_channel_cut_and_zero_at_site_cuts():
    found = by_cut(matrix_entropies("w", torch.eye(64), sites=3))
    assert list(found) == ["channel", "site1", "site2"]
    assert found["channel"]["nats"] == pytest.approx(log(64), abs=1e-9)
    assert found["channel"]["nats"] == pytest.approx(found["channel"]["max_nats"], abs=1e-9)
    assert found["channel"]["participation_ratio"] == pytest.approx(64)
    assert found["site1"]["nats"] == pytest.approx(0, abs=1e-9)
    assert found["site2"]["nats"] == pytest.approx(0, abs=1e-9)


def test_kronecker_product_has_no_entropy_at_its_own_site_cut():
    product = torch.kron(noise(4, 3), noise(5, 6, seed=1))
    modes = {"out": (4, 5), "in": (3, 6)}
    found = by_cut(matrix_entropies("w", product, modes=modes))
    assert found["site1"]["nats"] == pytest.approx(0, abs=1e-6)
    shuffled = product[torch.randperm(20, generator=torch.Generator().manual_seed(2))]
    moved = by_cut(matrix_entropies("w", shuffled, modes=modes))
    assert moved["site1"]["nats"] > 0.5, "a site cut depends on the order of rows"
    assert moved["channel"]["nats"] == pytest.approx(found["channel"]["nats"], abs=1e-6)


def test_site_cut_agrees_with_a_direct_svd_of_the_unfolding():
    matrix = noise(12, 20)
    unfolding = matrix.reshape(3, 4, 4, 5).permute(0, 2, 1, 3).reshape(12, 20)
    weights = torch.linalg.svdvals(unfolding.double()).square()
    weights /= weights.sum()
    entry = by_cut(matrix_entropies("w", matrix, modes={"out": (3, 4), "in": (4, 5)}))["site1"]
    assert entry["nats"] == pytest.approx(float(-(weights * weights.log()).sum()), abs=1e-7)
    assert entry["renyi2"] == pytest.approx(float(-weights.square().sum().log()), abs=1e-7)
    assert entry["participation_ratio"] == pytest.approx(float(1 / weights.square().sum()))
    assert entry["max_nats"] == pytest.approx(log(12))


def test_noise_lies_on_its_random_line_at_every_cut():
    for entry in matrix_entropies("w", noise(96, 160), sites=2):
        assert entry["nats"] == pytest.approx(entry["nats_random"], abs=0.01), entry["cut"]


def test_padding_does_not_raise_the_random_line():
    """67 is prime and above the largest leg: its modes hold 70 rows, 3 of them zero."""
    entries = by_cut(matrix_entropies("w", noise(67, 64), sites=2))
    assert entries["channel"]["nats"] == pytest.approx(entries["channel"]["nats_random"], abs=0.01)
    site = entries["site1"]
    assert site["nats"] == pytest.approx(site["nats_random"], abs=0.03)
    assert site["nats"] < site["max_nats"]


def test_truncation_lowers_the_entropy_and_scale_does_not_matter():
    matrix = noise(32, 48)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    cut = (left[:, :8] * values[:8]) @ right[:8]
    entry = matrix_entropies("w", 1e3 * matrix, 1e-3 * cut)[0]
    assert entry["nats_converted"] <= log(8) + 1e-6
    assert entry["nats"] == pytest.approx(matrix_entropies("w", matrix)[0]["nats"], abs=1e-6)
    assert matrix_entropies("w", matrix)[0]["nats_converted"] is None


def test_look_is_the_other_two_together():
    dense, converted = noise(24, 36), noise(24, 36, seed=1)
    seen = look("w", dense, converted, points=9)
    assert seen.entropies == matrix_entropies("w", dense, converted)
    assert seen.spectrum == spectrum("w", dense, converted, points=9)


def test_spectrum_holds_the_singular_values_over_their_root_mean_square():
    matrix = noise(40, 30)
    values = torch.linalg.svdvals(matrix.double())
    values = (values / values.square().mean().sqrt()).tolist()
    entry = spectrum("w", matrix, 2 * matrix, points=12)
    assert entry["rank"][0] == 1
    assert entry["rank"][-1] == 30
    assert entry["rank"] == sorted(set(entry["rank"]))
    expected = [values[rank - 1] for rank in entry["rank"]]
    assert entry["dense"] == pytest.approx(expected, rel=1e-3)
    assert entry["converted"] == pytest.approx([2 * value for value in expected], rel=1e-3)


def test_random_spectrum_is_what_a_gaussian_matrix_has():
    for shape in ((200, 200), (120, 480)):
        values = torch.linalg.svdvals(noise(*shape).double())
        values = values / values.square().mean().sqrt()
        ranks = [1, 20, 60, 100]
        found = random_spectrum(*shape, ranks)
        assert found == pytest.approx([float(values[rank - 1]) for rank in ranks], rel=0.03)
    every = random_spectrum(300, 900, range(1, 301))
    assert sqrt(np.mean(np.square(every))) == pytest.approx(1.0, abs=1e-3)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ShapeError, match=r"w: .* \(expected \(4, 4\), found \(4, 5\)\)"):
        look("w", torch.eye(4), noise(4, 5))
    with pytest.raises(UsageError, match="too few points"):
        spectrum("w", torch.eye(4), points=1)
    with pytest.raises(UsageError, match="too small"):
        matrix_entropies("w", torch.eye(9), modes={"out": (2, 2), "in": (3, 3)})
    with pytest.raises(NonFiniteError):
        matrix_entropies("w", torch.full((4, 4), float("nan")))


def test_chunks_of_a_long_matrix_add_up(monkeypatch):
    matrix = noise(500, 12)
    whole = look("w", matrix)
    monkeypatch.setattr("qll.lens.spectra.CHUNK", 100)
    chunked = look("w", matrix)
    for one, other in zip(whole.entropies, chunked.entropies, strict=True):
        assert one["nats"] == pytest.approx(other["nats"], abs=1e-12)


def test_zero_matrix_has_finite_numbers():
    seen = look("w", torch.zeros(8, 8))
    assert all(np.isfinite(entry["nats"]) for entry in seen.entropies)
    assert set(seen.spectrum["dense"]) == {0.0}
