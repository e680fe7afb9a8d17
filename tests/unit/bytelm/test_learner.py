"""Learning: accumulation, checkpointed activations, averages, clipping, and where it goes wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qll.bytelm.config import LossConfig, MixerConfig, ModelConfig, StreamConfig
from qll.bytelm.learner import Learner, matrix_names
from qll.bytelm.model import ByteModel
from qll.bytelm.settings import LearningSettings
from qll.errors import NonFiniteError
from qll.train.muon import MatrixOptimiser
from qll.train.schedule import Schedule

SMALL = ModelConfig(d_model=32, n_layers=2, n_heads=2, context=16)
SETTINGS = LearningSettings(lr=0.01, batch_size=4, accumulate_steps=1)


class Given:
    """The rows of one batch, in micro-batches."""

    def __init__(self, rows: torch.Tensor, size: int) -> None:
        self.parts, self.number = rows.split(size), 0

    def next(self):
        rows = self.parts[self.number % len(self.parts)]
        self.number += 1
        return rows[:, :-1], rows[:, 1:]


def model_of(config=SMALL, seed=0):
    torch.manual_seed(seed)
    return ByteModel(config)


def rows(count=8, length=17):
    return torch.randint(1, 256, (count, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_accumulated_steps_equal_one_of_the_big_batch(optimizer):
    found = []
    for accumulate in (1, 4):
        settings = dataclasses.replace(
            SETTINGS, accumulate_steps=accumulate, optimizer=optimizer, grad_clip=0.5
        )
        learner = Learner(model_of().double(), LossConfig(), settings)
        data = Given(rows(), 8 // accumulate)
        norms = [float(learner.step(data, step, 0.0, 1.0)) for step in range(3)]
        found.append((norms, learner.take_terms(), learner.model.state_dict()))
    (norms, terms, weights), (others, other_terms, other_weights) = found
    assert norms == pytest.approx(others, rel=1e-6)
    assert terms == pytest.approx(other_terms, rel=1e-6)
    # Muon orthogonalises in bfloat16, which may round a sum of gradients otherwise
    tolerance = 1e-7 if optimizer == "adamw" else 2e-3
    for name, weight in weights.items():
        assert weight.allclose(other_weights[name], atol=tolerance), name


def test_checkpointed_activations_give_the_same_gradients():
    found = []
    for use_checkpoint in (False, True):
        settings = dataclasses.replace(SETTINGS, use_checkpoint=use_checkpoint)
        learner = Learner(model_of(), LossConfig(), settings)
        for step in range(2):
            learner.step(Given(rows(), 8), step, 0.0, 1.0)
        found.append(learner.model.state_dict())
    for name, weight in found[0].items():
        assert weight.equal(found[1][name]), name


def test_the_average_follows_the_weights_and_is_what_is_measured():
    learner = Learner(model_of(), LossConfig(), dataclasses.replace(SETTINGS, ema=0.9))
    data, name = Given(rows(), 8), "blocks.0.feed_forward.down.weight"
    learner.step(data, 0, 0.0, 1.0)
    expected = learner.model.get_parameter(name).detach().clone()
    for step in range(1, 4):
        learner.step(data, step, 0.0, 1.0)
        expected = 0.9 * expected + 0.1 * learner.model.get_parameter(name).detach()
    assert learner.measured is not learner.model
    assert learner.measured.get_parameter(name).allclose(expected, atol=1e-6)


def test_it_learns_and_muon_is_given_the_matrices_of_blocks_alone():
    learner = Learner(model_of(), LossConfig(), SETTINGS)
    data = Given(rows(4), 4)
    for step in range(60):
        learner.step(data, step, 0.0, 1.0)
        if step in (0, 59):
            learned = learner.take_terms()["cross_entropy"]
    assert learned < 2
    config = dataclasses.replace(
        SMALL, stream=StreamConfig(numbers="complex"), mixer=MixerConfig(conv=3)
    )
    names = matrix_names(model_of(config))
    assert names
    assert all(name.startswith("blocks.") and name.endswith(".weight") for name in names)


def test_a_complex_matrix_is_moved_in_place():
    weight = torch.nn.Parameter(torch.randn(4, 6, 2))
    before = weight.detach().clone()
    optimiser = MatrixOptimiser([("blocks.0.w", weight)], {"blocks.0.w"}, rate=0.1)
    weight.square().sum().backward()
    optimiser.step()
    change = (before - weight.detach()).flatten(1)
    # the step of Muon is nearly a matrix with orthonormal rows, scaled
    gram = change @ change.T
    assert gram.diagonal().min() > 2 * (gram - gram.diagonal().diag()).abs().max()


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_restored_learner_continues_bit_by_bit(optimizer):
    settings = dataclasses.replace(SETTINGS, ema=0.9, optimizer=optimizer)
    one = Learner(model_of(), LossConfig(), settings)
    data = Given(rows(), 4)
    for step in range(3):
        one.step(data, step, 0.0, 1.0)
    groups = {
        group: {name: tensor.clone() for name, tensor in tensors.items()}
        for group, tensors in one.groups().items()
    }
    two = Learner(model_of(seed=1), LossConfig(), settings)
    two.restore(groups, one.counts)
    data_of_two = Given(rows(), 4)
    data_of_two.number = data.number
    for step in range(3, 6):
        one.step(data, step, 0.0, 1.0)
        two.step(data_of_two, step, 0.0, 1.0)
    assert one.take_terms() == two.take_terms()
    for group, tensors in one.groups().items():
        for name, tensor in tensors.items():
            assert tensor.equal(two.groups()[group][name]), (group, name)


class Poisoned(torch.nn.Module):
    """Gives NaN, or gives a gradient of NaN, in place of a feed-forward layer."""

    def __init__(self, backward: bool) -> None:
        super().__init__()
        self.backward = backward
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, *rest):
        if not self.backward:
            return x * float("nan")
        # finite forwards; the derivative of a square root is infinite at 0
        return x + self.scale * (x * 0).square().sqrt()


@pytest.mark.parametrize(("backward", "where"), [(False, "layer blocks.1"), (True, "gradient of")])
def test_the_guard_says_where(backward, where):
    model = model_of()
    model.blocks[1].feed_forward = Poisoned(backward)
    learner = Learner(model, LossConfig(), SETTINGS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=f"step 7: training is not finite.*{where}"):
        learner.step(Given(rows(), 8), 7, 0.0, 1.0)
    # no step was taken
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_a_weight_that_is_not_finite_is_named():
    model = model_of()
    with torch.no_grad():
        model.head.weight[3, 4] = float("inf")
    with pytest.raises(NonFiniteError, match=r"weight head\.weight"):
        Learner(model, LossConfig(), SETTINGS).step(Given(rows(), 8), 1, 0.0, 1.0)


def test_gradients_are_clipped_to_their_norm():
    weights = []
    for clip in (0.0, 1e-9):
        model = model_of()
        settings = dataclasses.replace(
            SETTINGS, optimizer="adamw", grad_clip=clip, weight_decay=0.0
        )
        learner = Learner(model, LossConfig(), settings)
        learner.step(Given(rows(), 8), 0, 0.0, 1.0)
        weights.append(model.head.weight.detach() - model_of().head.weight.detach())
    # gradients below Adam's epsilon hardly move anything
    assert weights[1].abs().max() < 0.2 * weights[0].abs().max()


def test_a_schedule_ends_with_whichever_is_used_up_first():
    schedule = Schedule(steps=100, seconds=50.0, warm_up_steps=10)
    assert schedule.rate(4, 1.0) == pytest.approx(0.5, abs=0.02)
    assert schedule.done(99, 60.0) == 1
    assert schedule.done(100, 1.0) == 1
    rates = [Schedule(steps=200).rate(step, 0.0) for step in range(201)]
    assert max(rates) == pytest.approx(1, abs=1e-3)
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert Schedule(seconds=10.0).seconds_left(5, 2.0) == pytest.approx(8)
    assert Schedule(steps=10).seconds_left(0, 0.0) is None
