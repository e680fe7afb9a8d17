"""Parts found at once are the parts that torch knows: moved, exchanged and copied with them."""

from __future__ import annotations

import copy

import torch
from torch import nn

from qll.runtime.direct import Direct


class Scaled(Direct):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("nothing", None)

    def forward(self, x):
        return self.inner(x) * self.scale


def test_a_move_reaches_buffers_and_submodules():
    module = Scaled().to(torch.float64)
    assert module.scale.dtype == torch.float64
    assert module.scale is module.get_buffer("scale")
    assert module.inner.weight.dtype == torch.float64
    assert module(torch.ones(1, 2, dtype=torch.float64)).dtype == torch.float64
    assert set(module.state_dict()) == {"inner.weight", "inner.bias", "scale"}
    assert len(list(module.parameters())) == 2


def test_an_exchanged_part_is_the_one_that_is_used():
    module = Scaled()
    module.inner = nn.Identity()
    assert module(torch.full((1, 2), 3.0)).tolist() == [[3.0, 3.0]]
    assert [name for name, _ in module.named_children()] == ["inner"]
    module.scale = torch.full((2,), 2.0)
    assert module(torch.full((1, 2), 3.0)).tolist() == [[6.0, 6.0]]
    assert set(module.state_dict()) == {"scale"}


def test_a_part_that_is_taken_away_is_gone():
    module = Scaled()
    module.inner = None
    assert module.inner is None
    assert not list(module.children())
    del module.scale
    assert not hasattr(module, "scale")
    assert "scale" not in module.state_dict()


def test_a_parameter_that_is_moved_is_the_one_that_trains():
    module = Direct()
    module.weight = nn.Parameter(torch.ones(2))
    module.to(torch.float64)
    assert module.weight is module.get_parameter("weight")
    assert module.weight.dtype == torch.float64


def test_a_copy_has_parts_of_its_own():
    module = Scaled()
    other = copy.deepcopy(module)
    assert other.inner is not module.inner
    assert other.inner is other.get_submodule("inner")
    assert other.scale is other.get_buffer("scale")
    assert other.scale is not module.scale
