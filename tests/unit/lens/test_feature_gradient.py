"""The added gradient has the second moment it should, and reaches every matrix before it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from qll.calibrate import ExtraGradients, collect
from qll.lens.feature_gradient import feature_gradient
from qll.load import open_source
from tests.unit.lens.conftest import random_sae


def test_moment_is_that_of_single_features():
    sae, hand = random_sae(d_in=12, d_sae=20, k=4), torch.Generator().manual_seed(1)
    x, g = torch.randn(2, 3, 12, generator=hand)
    add, moments = feature_gradient(sae, 2.0), []
    for window in range(800):
        g_new = g + add(window, x, g)
        moments.append(torch.einsum("ti,tj->tij", g_new, g_new))
    found = torch.stack(moments).mean(0)
    unit = normalize(sae.directions(range(20)), dim=1)
    for token in range(3):
        expected = torch.outer(g[token], g[token])
        for feature in sae.encode(x[token : token + 1]).entries()[1].tolist():
            d = unit[feature]
            expected = expected + 2.0 * (d @ g[token]) ** 2 * torch.outer(d, d)
        assert float((found[token] - expected).norm() / expected.norm()) < 0.15
    assert torch.equal(add(5, x, g), add(5, x, g))
    assert not torch.equal(add(5, x, g), add(6, x, g))


@pytest.fixture(scope="module")
def source(tiny_hf_folder):
    return open_source(tiny_hf_folder)


def test_only_matrices_before_the_place_change(source, windows, tmp_path):
    sae = random_sae(hookpoint="layers.0", k=8)
    extra = ExtraGradients({"feature_weight": 4.0}, {0: feature_gradient(sae, 4.0)})
    plain = collect(source, windows, tmp_path / "plain", gradients=True)
    steered = collect(source, windows, tmp_path / "steered", gradients=True, extra=extra)
    assert steered.summary["extra"] == {"feature_weight": 4.0}
    assert "extra" not in plain.summary
    for block in (0, 1):
        for path, before in plain.block(block).items():
            after = steered.block(block)[path]
            assert torch.equal(before.input, after.input), path
            grown = float(after.grad.trace() / before.grad.trace())
            assert grown > 1.2 if block == 0 else grown == 1.0, path
    again = collect(source, windows, tmp_path / "steered", gradients=True, extra=extra)
    assert torch.equal(again.linear("model.layers.0.mlp.down_proj").grad,
                       steered.linear("model.layers.0.mlp.down_proj").grad)  # fmt: skip
