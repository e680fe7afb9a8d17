"""The choice of features, in blocks, against the choice from one dense product."""

from __future__ import annotations

import pytest
import torch

from qll.saetrain import select
from qll.saetrain.select import passing, strongest


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator) for shape in ((37, 8), (50, 8), (50,)))


@pytest.mark.parametrize("block", [1, 1000, 1 << 20])
def test_strongest_is_topk_whatever_the_block(case, block, monkeypatch):
    monkeypatch.setitem(select.BLOCK_BYTES, "cpu", block)
    z, weight, bias = case
    wanted = (z @ weight.T + bias).topk(5, dim=1)[1]
    assert torch.equal(strongest(z, weight, bias, 5), wanted)


@pytest.mark.parametrize("block", [1, 1000, 1 << 20])
def test_passing_is_every_feature_above_its_floor(case, block, monkeypatch):
    monkeypatch.setitem(select.BLOCK_BYTES, "cpu", block)
    z, weight, bias = case
    floor = torch.linspace(0, 6, 50)
    pattern = passing(z, weight, bias, floor)
    found = torch.zeros(37, 50, dtype=torch.bool)
    found[pattern.rows, pattern.indices] = True
    assert torch.equal(found, z @ weight.T + bias > floor)


def test_bfloat16_chooses_nearly_the_same(case):
    z, weight, bias = case
    exact = strongest(z, weight, bias, 5)
    rough = strongest(z, weight, bias, 5, torch.bfloat16)
    shared = (exact[:, :, None] == rough[:, None]).any(dim=2)
    assert shared.float().mean() > 0.95
