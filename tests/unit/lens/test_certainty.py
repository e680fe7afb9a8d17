"""Resampled correlations against resampled data, and lists that hold their false discovery rate."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import false_discovery_control

from qll.lens import SparseCodes, Survival
from qll.lens.certainty import DocumentSums, benjamini_hochberg
from qll.lens.intervals import weights
from tests.unit.lens.conftest import random_sae


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_benjamini_hochberg_is_that_of_scipy(p):
    found = benjamini_hochberg(torch.tensor(p, dtype=torch.float64))
    adjusted = torch.from_numpy(false_discovery_control(p))
    near = (adjusted - 0.05).abs() < 1e-9
    assert bool(((adjusted <= 0.05) == found)[~near].all())


def codes_of(dense):
    return SparseCodes(dense, torch.arange(dense.shape[1]).expand(dense.shape).contiguous())


@pytest.fixture(scope="module")
def survival():
    """Six features on 24 documents of 40 tokens: exact, scaled, noisy, blurred, unrelated, rare."""
    hand = torch.Generator().manual_seed(0)
    a = torch.rand(24, 40, 6, generator=hand)
    noise = torch.rand(24, 40, 6, generator=hand)
    b = a + noise * torch.tensor([0.0, 0.0, 0.1, 0.49, 0.0, 0.0])
    b[..., 1] *= 3
    b[..., 4] = noise[..., 4]
    a[1:, :, 5] = b[1:, :, 5] = 0
    found = Survival(random_sae(d_in=4, d_sae=6, k=6), documents=True)
    x = torch.zeros(40, 4)
    for one, two in zip(a, b, strict=True):
        found.update(codes_of(one), codes_of(two), x, x)
    return found, a, b


def test_draws_are_those_of_the_data(survival):
    found, a, b = survival
    drawn, documents = found.documents.drawn(torch.tensor([0, 2, 4]))
    assert documents.tolist() == [24, 24, 24]
    picked = weights(24, len(drawn), 0)[7].long()
    one, two = (
        part.repeat_interleave(picked, 0)[..., [0, 2, 4]].flatten(0, 1).double() for part in (a, b)
    )
    expected = torch.corrcoef(torch.cat([one, two], 1).T)[:3, 3:].diagonal()
    torch.testing.assert_close(drawn[7], expected, rtol=1e-5, atol=1e-6)


def test_certainly_kept_certainly_damaged_and_neither(survival):
    found, _, _ = survival
    sure = found.certainty()
    assert sure["features"].tolist() == [0, 1, 2, 3, 4, 5]
    assert sure["sure"].tolist() == [True, True, True, False, False, False]
    r = found.pearson()
    assert r[3] == pytest.approx(0.9, abs=0.02), "the borderline case"
    assert not sure["damaged"][3]
    assert sure["damaged"].tolist() == [False, False, False, False, True, False]
    assert bool((sure["low"] <= r + 1e-9).all() & (sure["high"] >= r - 1e-9).all())
    low, high = sure["kept_share"]
    assert 0 < low <= 5 / 6
    assert high < 1


def test_one_document_says_nothing():
    found = Survival(random_sae(d_in=4, d_sae=6, k=6), documents=True)
    codes = codes_of(torch.rand(40, 6))
    found.update(codes, codes, torch.zeros(40, 4), torch.zeros(40, 4))
    sure = found.certainty()
    assert sure["kept_share"] is None
    assert not sure["damaged"].any()
    assert not sure["sure"].any()


def test_many_windows_are_joined(monkeypatch):
    monkeypatch.setattr("qll.lens.certainty.DOCUMENTS", 4)
    sums = DocumentSums()
    for number in range(10):
        features = torch.tensor([2, 2, 5])
        values = torch.tensor([1.0, 2.0, number], dtype=torch.float64)
        sums.add(10, features, values, values)
    table = sums._table(torch.tensor([2, 3, 5]), 4)
    assert table[:, 0, 0].tolist() == [9, 9, 6, 6]
    assert table[:, 0, 1].tolist() == [0, 0, 0, 0]
    assert table[1, 2, 2] == 1 + 25 + 81
