"""Training recovers known features, wakes dead ones, and is restored exactly."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from qll.errors import NonFiniteError
from qll.saetrain.coder import Coder, CoderShape
from qll.saetrain.learner import Learner, Statistics
from qll.saetrain.settings import LearningOptions

D, FEATURES = 16, 24


def planted(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Sparse sums of unit directions around a centre, and the directions."""
    generator = torch.Generator().manual_seed(7)
    directions = functional.normalize(torch.randn(FEATURES, D, generator=generator), dim=1)
    generator.manual_seed(seed)
    fires = torch.rand(tokens, FEATURES, generator=generator) < 2 / FEATURES
    strength = 1 + torch.rand(tokens, FEATURES, generator=generator)
    return 4 * (fires * strength) @ directions + 3, directions


def learner_of(kind: str = "topk", latents: int = 32, dead_after: int = 10**9, **options):
    shape = CoderShape("layers.0", kind, D, D, latents, k=3, bandwidth=0.05)
    return Learner(Coder(shape, 0), LearningOptions(**options), dead_after, torch.float32)


def taught(learner: Learner, steps: int, seed: int = 0, first: int = 0) -> Learner:
    for number in range(first, first + steps):
        x, _ = planted(256, seed=seed * 1000 + number)
        if number == 0:
            learner.start(x, x)
        learner.step(x, x, number / 400)
    return learner


def test_it_finds_the_directions_that_made_the_data():
    learner = taught(learner_of(rate=1e-2), 300)
    cosines = functional.normalize(learner.coder.W_dec, dim=1) @ planted(1)[1].T
    assert (cosines.max(dim=0)[0] > 0.95).float().mean() > 0.9
    learner.statistics = Statistics()
    taught(learner, 1, seed=9, first=350)
    assert learner.report()["fvu"] < 0.15


def test_jumprelu_comes_to_fire_as_often_as_asked():
    learner = taught(learner_of("jumprelu", rate=1e-2), 300)
    learner.statistics = Statistics()
    taught(learner, 1, seed=9, first=350)
    found = learner.report()
    assert found["l0"] == pytest.approx(3, rel=0.35)
    assert found["fvu"] < 0.35


def test_decoder_rows_stay_of_length_one():
    norms = taught(learner_of(), 5).coder.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(32))


def test_dead_features_are_counted_and_revived():
    learner = learner_of(dead_after=1000)
    taught(learner, 1)
    with torch.no_grad():
        learner.coder.b_enc[[3, 5]] = -1e6
    taught(learner, 10, first=1)
    assert set((learner.silent > 1000).nonzero()[:, 0].tolist()) >= {3, 5}
    assert learner.report()["dead_share"] >= 2 / 32
    learner.revive(torch.Generator().manual_seed(0))
    assert learner.revived >= 2
    assert learner.silent[[3, 5]].tolist() == [0, 0]
    state = learner.adam.state[learner.coder.W_enc]
    assert state["exp_avg"][[3, 5]].abs().sum() == 0
    taught(learner, 1, first=12)
    assert (learner.silent[[3, 5]] == 0).all()


def test_restored_it_takes_the_same_steps():
    straight = taught(learner_of("multitopk"), 8)
    half = taught(learner_of("multitopk"), 4)
    tensors = {name: value.clone() for name, value in half.tensors().items()}
    resumed = learner_of("multitopk")
    resumed.restore(tensors)
    taught(resumed, 4, first=4)
    wanted = straight.tensors()
    for name, value in resumed.tensors().items():
        assert torch.equal(value, wanted[name]), name


def test_pooled_fvu_is_over_all_steps_at_once():
    learner = learner_of()
    taught(learner, 3)
    squares, errors, total, count = 0.0, 0.0, 0.0, 0
    learner.statistics = Statistics()
    for number in range(3):
        x, _ = planted(256, seed=50 + number)
        with torch.no_grad():
            errors += learner.coder(x, x).error.square().sum()
        y = x / learner.coder.scale_out
        squares, total, count = squares + y.square().sum(), total + y.sum(dim=0), count + 256
        learner.statistics.add(y, learner.coder(x, x))
    wanted = errors / (squares - total.square().sum() / count)
    assert learner.report()["fvu"] == pytest.approx(wanted.item(), rel=1e-4)


def test_a_loss_that_is_no_number_is_said():
    learner = taught(learner_of(), 1)
    x = torch.full((4, D), float("nan"))
    with pytest.raises(NonFiniteError, match=r"layers\.0.*--rate"):
        learner.step(x, x, 0.1)
