"""Starts of the byte embedding: sizes, and what their directions say about bytes."""

from __future__ import annotations

import pytest
import torch

from qll.bytelm.config import VOCAB
from qll.bytelm.documents import Document
from qll.bytelm.embedding import COUNTED, STARTS, bigram_counts, start_of
from qll.bytelm.initial import STD

TEXT = b"".join(b"the %d cats and %d dogs sat on the mat. " % (n, n * n) for n in range(400))


@pytest.fixture(scope="module")
def counts():
    return bigram_counts([Document("text", TEXT)])


@pytest.mark.parametrize("kind", STARTS)
@pytest.mark.parametrize("width", [32, 512])
def test_every_start_has_the_same_size_and_follows_the_seed(kind, width, counts):
    found = start_of(kind, width, counts, seed=3)
    assert found.shape == (VOCAB, width)
    assert torch.isfinite(found).all()
    assert found.square().mean().sqrt().item() == pytest.approx(STD, rel=1e-4)
    assert found.equal(start_of(kind, width, counts, seed=3))


def test_counts_are_of_neighbours_in_a_document_and_of_so_many_bytes(monkeypatch):
    counts = bigram_counts([Document("one", b"aab"), Document("two", b"ba")])
    assert counts[97, 97] == counts[97, 98] == counts[98, 97] == 1
    assert counts.sum() == 3, "no pair across two documents"
    assert len(TEXT) < COUNTED
    monkeypatch.setattr("qll.bytelm.embedding.COUNTED", 100)
    assert bigram_counts([Document("text", TEXT), Document("more", TEXT)]).sum() == 99


def test_orthogonal_bytes_have_no_overlap(counts):
    found = start_of("orthogonal", 300, counts).double()
    gram = found @ found.T
    torch.testing.assert_close(gram, gram.diagonal().diag(), atol=1e-8, rtol=0)


def test_bytes_in_like_places_are_near_in_mutual_information(counts):
    found = torch.nn.functional.normalize(start_of("ppmi", 32, counts).double(), dim=1)
    digits = found[list(b"3456789")]
    letters = found[list(b"hnsmgd")]
    assert (digits @ digits.T).mean() > 2 * (digits @ letters.T).mean()


def test_spectral_pairs_are_eigenvectors_of_the_transitions(counts):
    smooth = counts + 0.1
    transitions = (smooth / smooth.sum(1, keepdim=True)).to(torch.complex128)
    found = torch.view_as_complex(start_of("spectral", 32, counts).double().unflatten(1, (-1, 2)))
    moved = transitions @ found
    values = (found.conj() * moved).sum(0) / found.abs().square().sum(0)
    torch.testing.assert_close(moved, found * values, atol=1e-6, rtol=1e-4)
    assert values.abs()[0].item() == pytest.approx(1.0, abs=1e-5), "the stationary mode comes first"


def test_frequency_phases_turn_with_the_logarithm_of_the_share(counts):
    pairs = torch.view_as_complex(start_of("frequency", 8, counts).double().unflatten(1, (-1, 2)))
    smooth = counts + 0.1
    shares = smooth.sum(1) / smooth.sum()
    expected = torch.polar(torch.ones(VOCAB).double(), -shares.log())
    torch.testing.assert_close(pairs[:, 0] / pairs[:, 0].abs(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(pairs[:, 1] / pairs[:, 1].abs(), expected**2, atol=1e-5, rtol=0)
