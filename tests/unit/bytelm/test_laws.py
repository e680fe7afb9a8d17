"""Laws that every byte model obeys, whichever parts it has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qll.bytelm.config import LossConfig
from qll.bytelm.losses import Objective
from tests.unit.bytelm.byte_models import PARTS, byte_model, settings, text

SEQ = 19  # longer than the window, the chunk and the segment, and a multiple of none


@pytest.fixture(scope="module", params=PARTS)
def part(request):
    return request.param


@pytest.fixture(scope="module")
def model(part):
    return byte_model(part)


@torch.no_grad()
def test_a_byte_changes_no_logits_before_it(model):
    ids = text(2, SEQ)
    logits = model(ids)
    for place in (0, 5, 12, SEQ - 1):
        changed = ids.clone()
        changed[:, place] = 200
        other = model(changed)
        assert torch.equal(other[:, :place], logits[:, :place])
        assert not torch.equal(other[:, place], logits[:, place])


@torch.no_grad()
def test_texts_of_a_batch_do_not_influence_each_other(model):
    ids, others = text(3, SEQ), text(3, SEQ, seed=1)
    others[1] = ids[1]
    assert torch.equal(model(ids)[1], model(others)[1])
    torch.testing.assert_close(model(ids[1:2])[0], model(ids)[1], rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(1,) * SEQ, (6, 1, 12)])
def test_steps_give_the_logits_of_the_whole_text(model, lengths):
    ids, state, pieces = text(2, SEQ), model.initial_state(2), []
    for piece in ids.split(lengths, dim=1):
        logits, state = model.step(piece, state)
        pieces.append(logits)
    assert state.position == SEQ
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), rtol=0, atol=1e-9)


@torch.no_grad()
def test_the_length_of_a_chunk_changes_nothing(model, part):
    ids = text(2, SEQ)
    for chunk in (1, 64):
        config = replace(model.config, mixer=replace(model.config.mixer, chunk=chunk))
        other = type(model)(config).double().eval()
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(other(ids), model(ids), rtol=0, atol=1e-9)


def test_every_parameter_learns(model, part):
    model.zero_grad()
    # bytes take turns in the languages that the model knows, if any
    languages = torch.arange(SEQ) % (1 + len(model.config.stream.languages))
    ids = text(2, SEQ) + 256 * languages
    loss, _, _ = Objective(LossConfig())(model, ids, text(2, SEQ, seed=1))
    loss.backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []
    model.zero_grad()


def test_gradients_are_those_of_finite_differences(part):
    model = byte_model(part, d_model=8, n_layers=1, d_ff=12, context=5)
    ids, directions = text(1, 9), torch.Generator().manual_seed(1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    steps = [torch.randn(p.shape, generator=directions, dtype=p.dtype) for p in parameters]
    weights = torch.randn(1, 9, 256, generator=directions, dtype=torch.float64)

    def along(t: torch.Tensor) -> torch.Tensor:
        moved = {n: p + t * s for (n, p), s in zip(model.named_parameters(), steps, strict=True)}
        if model.config.tie:
            moved["head.weight"] = moved["embedding.weight"]
        return (torch.func.functional_call(model, moved, (ids,)) * weights).sum()

    start = torch.zeros((), dtype=torch.float64, requires_grad=True)
    if model.config.concept.kind == "vq":
        pytest.skip("the gradient through the nearest code is straight through by design")
    assert torch.autograd.gradcheck(along, (start,), eps=1e-7, rtol=1e-4, atol=1e-5)


def test_autocast_gives_finite_logits_close_to_the_exact_ones(part):
    model = byte_model(part).float()
    ids = text(2, SEQ)
    with torch.no_grad():
        exact = model(ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(ids).float()
    assert torch.isfinite(rough).all()
    if model.config.concept.kind == "off":  # which codes are strongest may change
        assert (rough - exact).norm() < 0.2 * exact.norm()


def test_parts_and_twins_have_as_many_parameters():
    for part, twin in (
        ("interference", "interference real"),
        ("delta", "delta real"),
        ("born", "born real"),
        ("rotation", "scaling"),
        ("brickwall", "brickwall free"),
        ("topk", "dense concepts"),
    ):
        assert byte_model(part).num_params() == byte_model(twin).num_params(), part


def test_settings_survive_json(part):
    config = settings(part)
    assert type(config).from_dict(config.to_dict()) == config
