"""Energies have the right sign and scale, and the objective adds what it is told to."""

from __future__ import annotations

import math

import pytest
import torch

from qll.bytelm.config import VOCAB, LossConfig
from qll.bytelm.energy import (
    cut_purity,
    entanglement_energy,
    neighbour_energy,
    pair_energy,
    phasors,
)
from qll.bytelm.losses import Objective, cross_entropy, unlikelihood
from qll.errors import UsageError
from tests.unit.bytelm.byte_models import byte_model, text


def stream(coherent: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(2, 50, 16, generator=generator, dtype=torch.float64)
    return random[:, :1].expand_as(random) * 3 if coherent else random


@pytest.mark.parametrize("energy", [neighbour_energy, pair_energy])
def test_coherent_phases_have_less_energy_than_random_ones(energy):
    assert energy(phasors(stream(True))).abs() < 1e-9
    assert abs(energy(phasors(stream(False))) - 1) < 0.1
    # a mean: neither length nor width nor batch changes its scale
    assert abs(energy(phasors(stream(False).repeat(2, 1, 3))) - 1) < 0.1


def test_minimising_an_energy_makes_phases_coherent():
    x = stream(False).requires_grad_()
    before = pair_energy(phasors(x))
    before.backward()
    with torch.no_grad():
        assert pair_energy(phasors(x - 20 * x.grad)) < before


def test_entanglement_across_a_cut():
    product = torch.outer(torch.rand(4), torch.rand(4)).flatten()
    maximal = torch.eye(4).flatten()
    assert cut_purity(product).item() == pytest.approx(1)
    assert cut_purity(maximal).item() == pytest.approx(1 / 4)
    assert entanglement_energy(product[None, None]).item() == pytest.approx(1, abs=1e-5)
    assert entanglement_energy(maximal[None, None]).item() == pytest.approx(0, abs=1e-5)


def test_a_cross_entropy_of_equal_logits_is_eight_bits():
    targets = text(2, 7)
    assert cross_entropy(torch.zeros(2, 7, VOCAB), targets).item() == pytest.approx(math.log(256))


def test_unlikelihood_finds_exactly_the_wrong_repetitions():
    """Brute force: what followed the last four bytes before, unless it is right now too."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 2, (3, 40), generator=generator)
    targets = torch.cat((ids[:, 1:], torch.zeros(3, 1, dtype=torch.long)), dim=1)
    logits = torch.randn(3, 40, VOCAB, generator=generator, dtype=torch.float64)
    probability, terms = logits.softmax(dim=-1), []
    for row in range(3):
        for t in range(3, 40):
            last = ids[row, t - 3 : t + 1].tolist()
            followers = {
                int(ids[row, s + 1])
                for s in range(3, t)
                if ids[row, s - 3 : s + 1].tolist() == last
            }
            for byte in followers - {int(targets[row, t])}:
                terms.append(-math.log1p(-probability[row, t, byte].item()))
    assert len(terms) > 10
    expected = sum(terms) / len(terms)
    assert unlikelihood(logits, ids, targets).item() == pytest.approx(expected)


def test_pushing_the_unlikelihood_down_lowers_the_probability_of_repeating():
    ids = torch.tensor([[1, 2, 3, 4, 9, 1, 2, 3, 4]])
    logits = torch.zeros(1, 9, VOCAB, requires_grad=True)
    unlikelihood(logits, ids, ids + 1).backward()
    assert logits.grad[0, -1, 9] > 0
    assert not logits.grad[0, :-1].any()


def test_all_energies_are_off_by_default():
    model = byte_model("plain")
    ids = text(2, 9)
    loss, terms, _ = Objective(LossConfig())(model, ids, ids)
    assert terms.keys() == {"cross_entropy"}
    assert torch.equal(loss, cross_entropy(model(ids), ids))


def test_terms_are_added_with_their_weights():
    model, ids = byte_model("plain"), text(2, 9)
    names = ("coherence", "interference", "entanglement", "unlikelihood")
    weights = {name: 0.1 * (place + 1) for place, name in enumerate(names)}
    loss, terms, _ = Objective(LossConfig(**weights))(model, ids, ids)
    expected = terms["cross_entropy"] + sum(weights[name] * terms[name] for name in names)
    torch.testing.assert_close(loss, expected)
    ramp = Objective(LossConfig(**weights, weighting="ramp"))
    assert ramp(model, ids, ids, share=0.0)[0] == terms["cross_entropy"]
    torch.testing.assert_close(ramp(model, ids, ids, share=0.5)[0], expected)
    # a loss that is first on after 0.6 of the run has its whole weight after half of the rest
    late = Objective(LossConfig(**weights, weighting="ramp"), dict.fromkeys(weights, 0.6))
    assert late(model, ids, ids, share=0.6)[0] == terms["cross_entropy"]
    torch.testing.assert_close(late(model, ids, ids, share=0.8)[0], expected)
    half = late(model, ids, ids, share=0.7)[0] - terms["cross_entropy"]
    torch.testing.assert_close(half, (expected - terms["cross_entropy"]) / 2)


def test_learned_weights_learn():
    objective = Objective(LossConfig(coherence=1.0, weighting="uncertainty"))
    loss, _, _ = objective(byte_model("plain"), text(2, 9), text(2, 9))
    loss.backward()
    assert objective.log_variance["coherence"].grad != 0


@pytest.mark.parametrize(
    ("part", "name"), [("vq", "codebook"), ("topk", "codebook"), ("adaptive width", "width")]
)
def test_layers_bring_their_own_terms(part, name):
    model, ids = byte_model(part), text(2, 9)
    loss, terms, _ = Objective(LossConfig())(model, ids, ids)
    weight = getattr(LossConfig(), name)
    torch.testing.assert_close(loss, terms["cross_entropy"] + weight * terms[name])
    loss.backward()


def test_a_state_is_carried_by_the_objective():
    model, objective = byte_model("hybrid"), Objective(LossConfig())
    ids = text(2, 14)
    with torch.no_grad():
        whole = objective(model, ids, ids)[0]
        first, _, state = objective(model, ids[:, :7], ids[:, :7])
        second, _, _ = objective(model, ids[:, 7:], ids[:, 7:], state=state.detach())
    torch.testing.assert_close((first + second) / 2, whole, rtol=0, atol=1e-9)


def test_a_negative_weight_is_refused():
    with pytest.raises(UsageError, match="coherence: not a weight"):
        LossConfig(coherence=-1.0)
