"""Schedule and exact continuation of the optimiser."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qll.errors import NonFiniteError
from qll.train import Optimiser
from qll.train.optimise import LAST_SHARE, share_of_rate


def walk(optimiser: Optimiser, weight: nn.Parameter, steps: range) -> None:
    for step in steps:
        loss = ((weight - torch.tensor([1.0, -2.0])) ** 2 * (1 + step % 3)).sum()
        loss.backward()
        optimiser.step(loss.item())


def test_schedule_rises_then_falls_to_a_tenth():
    shares = [share_of_rate(step, 200) for step in range(200)]
    top = shares.index(max(shares))
    assert max(shares) == 1.0
    assert shares[: top + 1] == sorted(shares[: top + 1])
    assert shares[top:] == sorted(shares[top:], reverse=True)
    assert shares[-1] == pytest.approx(LAST_SHARE, abs=1e-3)


@pytest.mark.parametrize("stop", [1, 4, 19])
def test_restored_in_the_middle_it_walks_on_exactly(stop):
    whole = nn.Parameter(torch.zeros(2))
    walk(Optimiser([whole], 0.1, 20), whole, range(20))
    first = nn.Parameter(torch.zeros(2))
    before = Optimiser([first], 0.1, 20)
    walk(before, first, range(stop))
    saved = {name: tensor.clone() for name, tensor in before.tensors().items()}
    second = nn.Parameter(first.detach().clone())
    after = Optimiser([second], 0.1, 20)
    after.restore(saved, stop)
    walk(after, second, range(stop, 20))
    assert torch.equal(second, whole)


def test_a_loss_that_is_not_a_number_is_refused():
    weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(NonFiniteError, match="training loss"):
        Optimiser([weight], 0.1, 5).step(float("nan"))
