"""Packed sums of outer products, and the conditioning of gradients."""

from __future__ import annotations

import pytest
import torch

from qll.calibrate.gram import PANEL, GramSum, unpack
from qll.calibrate.probe import condition
from qll.convert.metric import shrink


@pytest.mark.parametrize("size", [1, 2, 7, PANEL, PANEL + 1, 2 * PANEL + 44])
def test_sum_of_outer_products(size):
    generator = torch.Generator().manual_seed(size)
    parts = [torch.randn(tokens, size, generator=generator) for tokens in (5, 1, 9)]
    gram = GramSum(size)
    for part in parts:
        gram.add(part)
    rows = torch.cat(parts).double()
    packed = gram.packed()
    assert packed.shape == (size * (size + 1) // 2,)
    assert gram.tokens == 15
    found = unpack(packed)
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found, rows.T @ rows, rtol=1e-6, atol=1e-5)


def test_half_precision_is_multiplied_in_float32():
    rows = torch.full((4, 2), 300.0, dtype=torch.float16)  # 300^2 overflows float16
    gram = GramSum(2)
    gram.add(rows)
    assert unpack(gram.packed()).tolist() == [[360000.0] * 2] * 2


def test_many_small_windows_lose_nothing_beside_a_large_one():
    gram = GramSum(1)
    gram.add(torch.tensor([[4096.0]]))
    for _ in range(1000):
        gram.add(torch.tensor([[0.5]]))  # each 0.25 would vanish beside 2^24 in float32
    assert float(unpack(gram.packed())) == 4096.0**2 + 250


def test_condition_trims_and_clips_per_window():
    grad = torch.ones(2, 16, 3)
    grad[0, 5] = 1e6  # an outlier of window 0 must not touch window 1
    grad[1, 6] = 0.0
    rows = condition(grad).reshape(2, 12, 3)
    lengths = rows.norm(dim=-1)
    mean = (11 * 3**0.5 + 1e6 * 3**0.5) / 12
    assert lengths[0, 3].item() == pytest.approx(10 * mean)
    assert lengths[0, 0].item() == pytest.approx(0.1 * mean)
    assert lengths[1, 4].item() == 0.0
    torch.testing.assert_close(rows[1, 0], torch.ones(3))


def test_condition_bounds_a_lone_spike():
    grad = torch.full((1, 400, 1), 1.0)
    grad[0, 200] = 1e6
    rows = condition(grad)
    mean = (299 + 1e6) / 300
    assert rows.shape == (300, 1)
    assert rows.max().item() == pytest.approx(10 * mean)
    assert rows.min().item() == pytest.approx(0.1 * mean)


def test_autocast_leaves_a_sum_positive_definite_once_shrunk():
    generator = torch.Generator().manual_seed(0)
    # few tokens, many channels and one direction far above the others, as in a Llama
    rows = torch.randn(64, 512, generator=generator)
    rows += 30 * torch.randn(64, 1, generator=generator) * torch.randn(512, generator=generator)
    gram = GramSum(512)
    with torch.autocast("cpu", torch.bfloat16):
        gram.add(rows)
    found = unpack(gram.packed())
    exact = rows.double().T @ rows.double()
    assert float((found - exact).norm() / exact.norm()) < 1e-6
    assert int(torch.linalg.cholesky_ex(shrink(found, 1e-4))[1]) == 0
