"""Positions: rotary, learned or none; what they promise inside a window and beyond it."""

from __future__ import annotations

import pytest
import torch

from qll.bytelm.config import LossConfig, MemoryConfig
from qll.bytelm.generate import generate_bytes
from qll.bytelm.growth import grow
from qll.bytelm.losses import Objective
from qll.bytelm.sampling import SamplingOptions
from qll.errors import UsageError
from tests.unit.bytelm.byte_models import byte_model, settings, text

WINDOW = 8  # bytes, the context of the models here


@torch.no_grad()
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_order_before_a_byte_counts_with_positions_and_not_without(positions):
    """Attention of one block over a set of earlier bytes; only positions know their order."""
    ids = torch.tensor([[97, 98, 99, 100]])
    swapped = ids[:, [1, 0, 2, 3]]
    for kind, same in ((positions, False), ("none", True)):
        model = byte_model("plain", n_layers=1, positions=kind)
        last, other = model(ids)[:, -1], model(swapped)[:, -1]
        assert torch.allclose(last, other, rtol=0, atol=1e-12) == same


def test_a_window_uses_every_learned_position_once_whatever_memories_there_are():
    memory = MemoryConfig(global_tokens=3, memory_tokens=2, segment=4)
    model = byte_model("learned positions", memory=memory)
    assert len(model.positions.weight) == WINDOW
    Objective(LossConfig())(model, text(1, WINDOW), text(1, WINDOW, seed=1))[0].backward()
    assert (model.positions.weight.grad.abs().amax(dim=1) > 0).all()
    # a byte's vector is that of its place in the text: memory vectors do not move it
    ids = text(1, WINDOW)
    start = model.initial_state(1)
    expected = model.embedding(ids) + model.positions.weight
    notes: dict = {}
    for block in model.blocks:
        block.forward = lambda x, state, context: (x, state)
    with torch.no_grad():
        model.step(ids, start, notes)
    torch.testing.assert_close(notes["stream"][0], expected)


@torch.no_grad()
def test_bytes_of_a_window_never_share_a_learned_position():
    positions = byte_model("learned positions").positions
    for start in range(2 * WINDOW):
        vectors = positions(start, WINDOW)
        assert torch.cdist(vectors, vectors).fill_diagonal_(1).min() > 0
        assert torch.equal(vectors, positions(start + WINDOW, WINDOW))


@torch.no_grad()
def test_learned_positions_begin_anywhere_in_training_and_at_the_first_otherwise():
    model, ids = byte_model("learned positions"), text(1, 5)
    assert model.initial_state(1).shift == 0
    model.train()
    torch.manual_seed(0)
    shifts = [model.initial_state(1).shift for _ in range(60)]
    assert set(shifts) == set(range(WINDOW))
    torch.manual_seed(0)
    assert [model.initial_state(1).shift for _ in range(60)] == shifts  # resumes with the seed
    state = next(state for state in iter(lambda: model.initial_state(1), None) if state.shift == 3)
    moved = model.step(ids, state)[0]
    rolled = byte_model("learned positions")
    rolled.positions.weight.copy_(model.positions.weight.roll(-3, dims=0))
    torch.testing.assert_close(moved, rolled(ids), rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("part", ["plain", "learned positions", "no positions"])
def test_writing_goes_on_beyond_the_window_with_the_logits_of_the_whole_text(part):
    model, greedy = byte_model(part).float(), SamplingOptions(temperature=0.0)
    written = bytes(generate_bytes(model, b"abc", 3 * WINDOW, greedy))
    with pytest.raises(UsageError, match="longer than the model's window"):
        list(generate_bytes(model, b"a" * WINDOW, 1, greedy))
    assert len(list(generate_bytes(model, b"a" * WINDOW, 4, greedy, slide=True))) <= 4
    ids = torch.tensor([[0, *b"abc", *written]])
    state, pieces = model.initial_state(1), []
    for byte in ids.T:
        logits, state = model.step(byte[None], state)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), rtol=0, atol=1e-4)


@torch.no_grad()
def test_learned_positions_grow_with_the_model():
    model, ids = byte_model("learned positions"), text(2, 15)
    grown = grow(model, 32, d_ff=48)
    torch.testing.assert_close(grown(ids), model(ids), rtol=0, atol=1e-12)


def test_an_unknown_kind_of_position_is_refused():
    with pytest.raises(UsageError, match="one of rotary, learned, none"):
        type(settings("plain")).from_dict({"positions": "sinus"})
