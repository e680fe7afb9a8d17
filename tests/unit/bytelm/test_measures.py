"""Measures of phases, interference, rank and recall have the values that mathematics gives them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qll.bytelm.codes import code_use, use_by_byte
from qll.bytelm.coherence import (
    neighbour_coherence,
    pair_coherence,
    phase_statistics,
    random_resultant,
    resultant,
    streams,
)
from qll.bytelm.config import ConceptConfig, MemoryConfig, ModelConfig
from qll.bytelm.model import ByteModel
from qll.bytelm.patterns import pattern, stream_pattern
from qll.bytelm.ranks import effective_rank, state_ranks
from qll.bytelm.recall import CHOICES, multi_fact_recall, needle_recall
from qll.bytelm.state import State
from qll.errors import UsageError

some = settings(max_examples=50, deadline=None)


@pytest.fixture(scope="module")
def model() -> ByteModel:
    torch.manual_seed(0)
    return ByteModel(ModelConfig(d_model=32, n_layers=2, n_heads=2, context=16)).eval()


@some
@given(st.integers(2, 40), st.floats(-3.0, 3.0), st.integers(0, 999))
def test_phases_are_compared_without_a_preferred_direction(n, turn, seed):
    phases = 6 * torch.rand(n, generator=torch.Generator().manual_seed(seed)).double()
    for measure in (resultant, neighbour_coherence, pair_coherence):
        whole = measure(phases + turn + 2 * math.pi)
        torch.testing.assert_close(measure(phases), whole, rtol=0, atol=1e-9)
        assert measure(torch.full((n,), turn)).item() == pytest.approx(1.0, abs=1e-4)
    differences = phases[:, None] - phases[None, :]
    brute = (differences.cos().sum() - n) / (n * (n - 1))
    torch.testing.assert_close(pair_coherence(phases), brute, rtol=0, atol=1e-9)


def test_random_phases_have_the_coherence_that_is_said():
    phases = 2 * math.pi * torch.rand(2000, 100, generator=torch.Generator().manual_seed(0))
    assert resultant(phases).mean().item() == pytest.approx(random_resultant(100), rel=0.05)
    assert pair_coherence(phases).mean().item() == pytest.approx(0.0, abs=0.01)


def test_phase_statistics_see_a_stream_that_is_all_alike(model):
    same = phase_statistics(model, torch.full((2, 16), 7), scales=(4, 64))
    mixed = phase_statistics(model, torch.arange(32).reshape(2, 16), scales=(4,))
    # one byte repeated: rotary attention over equal values gives equal streams
    assert [found.coherence for found in same] == pytest.approx([1.0, 1.0], abs=1e-4)
    assert [found.windows[4] for found in same] == pytest.approx([1.0, 1.0], abs=1e-4)
    assert set(same[0].windows) == {4}
    assert all(found.coherence < 0.7 and found.neighbours < 0.7 for found in mixed)


@some
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 999), st.booleans())
def test_energies_and_cross_terms_sum_to_the_intensity(m, d, seed, real):
    generator = torch.Generator().manual_seed(seed)
    kind = torch.float64 if real else torch.complex128
    parts = torch.randn(m, d, generator=generator, dtype=kind)
    found = pattern(parts)
    intensity = parts.sum(dim=0).abs().square().sum()
    torch.testing.assert_close(found.energies.sum() + found.cross.triu().sum(), intensity)
    torch.testing.assert_close(found.cross, found.cross.T)
    assert -1 - 1e-9 <= found.visibility <= m - 1 + 1e-9


def test_two_slits():
    phase = torch.linspace(0, 2 * math.pi, 9, dtype=torch.float64)
    for angle in phase:
        waves = torch.stack([torch.ones((), dtype=torch.complex128), torch.exp(1j * angle)])
        assert pattern(waves[:, None]).visibility == pytest.approx(math.cos(angle), abs=1e-12)


def test_the_pattern_of_a_stream_is_that_of_its_sum(model):
    ids = torch.arange(12)[None]
    found = stream_pattern(model, ids)
    last = streams(model, ids)[-1].double().square().sum()
    assert float(found.energies.sum() + found.cross.triu().sum()) == pytest.approx(float(last))


def test_effective_rank_counts_directions():
    basis = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    for rank in range(1, 9):
        assert effective_rank(basis[:rank].T @ basis[:rank]).item() == pytest.approx(rank, abs=1e-4)
    values = torch.tensor([4.0, 2.0, 1.0, 1.0])
    shares = values / values.sum()
    expected = math.exp(-(shares * shares.log()).sum())
    assert effective_rank(basis[:, :4] * values).item() == pytest.approx(expected, rel=1e-4)
    assert effective_rank(torch.zeros(3, 3)).item() == 0.0
    assert effective_rank(torch.eye(3, dtype=torch.complex64)).item() == pytest.approx(3.0)


def test_state_ranks_are_those_of_what_the_blocks_remember(model):
    ids = torch.arange(40).reshape(2, 20)
    found = state_ranks(model, ids)
    _, state = model.step(ids, model.initial_state(2))
    first = found[0]
    expected = effective_rank(state.layers[first.block][first.tensor].detach()).mean()
    assert first.effective_rank == pytest.approx(float(expected), rel=1e-5)
    assert {item.block for item in found} == {0, 1}
    assert all(1 <= item.effective_rank <= item.full_rank for item in found)
    constant = state_ranks(model, torch.full((1, 8), 3))
    values = [item for item in constant if item.tensor == 1]  # keys turn with the position
    assert all(item.effective_rank == pytest.approx(1.0, abs=1e-3) for item in values)


class Remembers(ByteModel):
    """Expects the byte that followed the longest earlier match of what was read last."""

    def step(self, ids, state):
        past = state.layers[0][0] if state.layers else ids[:, :0]
        logits = torch.zeros(*ids.shape, 256)
        for row, (before, now) in enumerate(zip(past.tolist(), ids.tolist(), strict=True)):
            for place in range(len(now)):
                byte = self.follower(bytes(before + now[: place + 1]))
                logits[row, place, byte] = 20.0
        return logits, State(0, ((torch.cat((past, ids), dim=1),),))

    def initial_state(self, batch, device=None):
        return State(0, ())

    @staticmethod
    def follower(text: bytes) -> int:
        for size in range(min(24, len(text) - 1), 0, -1):
            place = text.rfind(text[-size:], 0, len(text) - 1)
            if place >= 0:
                return text[place + size]
        return 0


def test_a_model_that_remembers_passes_the_probes_and_an_untrained_one_guesses(model):
    perfect = Remembers(ModelConfig(d_model=16, n_layers=1, n_heads=1, context=8))
    assert needle_recall(perfect, [0, 64], trials=6) == {0: 1.0, 64: 1.0}
    assert multi_fact_recall(perfect, [2, 12], distance=16, trials=6) == {2: 1.0, 12: 1.0}
    guessed = needle_recall(model, [64], trials=64)[64]
    assert guessed < 3.5 / CHOICES
    assert needle_recall(model, [64], trials=4, seed=1) == needle_recall(model, [64], 4, seed=1)


def test_more_facts_than_names_are_refused(model):
    with pytest.raises(UsageError, match="too many facts"):
        multi_fact_recall(model, [17])


@pytest.mark.parametrize("kind", ["vq", "topk"])
def test_use_of_codes_counts_what_the_layer_chose(kind):
    concept = ConceptConfig(kind=kind, codes=12, k=2, layer=0)
    memory = MemoryConfig(memory_tokens=2, segment=4)
    config = ModelConfig(
        d_model=32, n_layers=2, n_heads=2, context=16, concept=concept, memory=memory
    )
    torch.manual_seed(0)
    model, ids = ByteModel(config).eval(), torch.tensor([[97, 98, 99, 97, 97, 98, 97, 97]])
    found = code_use(model, ids)
    assert (found.codes, found.chance) == (12, 5 / 8)
    assert 1 <= found.perplexity <= found.used <= 8 * (2 if kind == "topk" else 1)
    assert found.chance <= found.purity <= 1
    even = torch.arange(12).expand(1, 12)
    counts = use_by_byte(even, torch.full((1, 12), 97), 12)
    assert counts[:, 97].tolist() == 12 * [1.0]
    with pytest.raises(UsageError, match="no concept layer"):
        code_use(ByteModel(ModelConfig(d_model=32, n_layers=1, n_heads=2)), ids)


@pytest.mark.parametrize("seq", [7, 16])
def test_streams_of_a_model_with_memory_are_those_of_its_bytes(seq):
    memory, concept = MemoryConfig(memory_tokens=3, segment=4), ConceptConfig(kind="vq", layer=1)
    config = ModelConfig(
        d_model=32, n_layers=2, n_heads=2, context=16, memory=memory, concept=concept
    )
    model, ids, notes = ByteModel(config).eval(), torch.arange(seq)[None], {}
    with torch.no_grad():
        model.step(ids, model.initial_state(1), notes)
        found = streams(model, ids)
    assert [x.shape for x in found] == 3 * [(1, seq, 32)]
    assert found[0].equal(model.embedding(ids))
    assert found[-1].equal(notes["stream"][0]), "what the concept layer wrote is in it"
    assert [item.block for item in phase_statistics(model, ids, scales=(4,))] == [0, 1]
    assert stream_pattern(model, ids).cross.shape == (3, 3)
