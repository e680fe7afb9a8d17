"""The centre that autoencoders start from."""

from __future__ import annotations

import pytest
import torch

from qll.errors import NonFiniteError
from qll.saetrain.center import geometric_median, spread


def test_it_minimises_the_sum_of_distances():
    torch.manual_seed(0)
    x = torch.randn(200, 5).double().float() ** 3
    center = geometric_median(x).double()

    def total(point: torch.Tensor) -> float:
        return (x.double() - point).norm(dim=1).sum().item()

    for _ in range(20):
        assert total(center) <= total(center + 0.02 * torch.randn(5)) + 1e-9
    assert total(center) < total(x.double().mean(dim=0))


def test_a_few_long_rows_do_not_move_it():
    x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    before = geometric_median(x)
    x[:5] += 10_000
    assert (geometric_median(x) - before).norm() < 0.05
    assert (x.mean(dim=0) - before).norm() > 10


def test_rows_at_the_centre_itself_are_no_division_by_zero():
    assert geometric_median(torch.zeros(3, 2)).tolist() == [0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_what_cannot_be_scaled_is_refused(bad):
    with pytest.raises(NonFiniteError, match=r"layers\.3"):
        spread(torch.full((4, 2), bad), "layers.3")
