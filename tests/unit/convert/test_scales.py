"""Factors from predicted to measured losses: exact without noise, steady with it, and for depth."""

from __future__ import annotations

import numpy as np
import pytest

from qll.convert.candidates import Candidate
from qll.convert.scales import depth_weights, fit_scales, rescaled, weighted_by_depth
from qll.convert.sensitivity import Sensitivity
from qll.convert.units import Unit

KINDS = tuple(f"lowrank {name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))


def lines_of(factor, noise=0.0, seed=0) -> list[Sensitivity]:
    """Seven kinds at six depths of five blocks; measured = factor(kind number, depth) predicted."""
    draw = np.random.default_rng(seed)
    return [
        Sensitivity(kind, 5 * d, 5 * d + 4, p, p * factor(k, d) * np.exp(noise * draw.normal()))
        for k, kind in enumerate(KINDS)
        for d in range(6)
        for p in [float(draw.uniform(0.001, 0.1))]
    ]


def errors(scales, factor) -> np.ndarray:
    found = [[np.log(scales.of(kind, 5 * d) / factor(k, d)) for d in range(6)]
             for k, kind in enumerate(KINDS)]  # fmt: skip
    return np.array(found)


def test_a_common_factor_is_found_exactly():
    assert np.abs(errors(fit_scales(lines_of(lambda k, d: 1.7)), lambda k, d: 1.7)).max() < 1e-9


def test_effects_of_kind_and_depth_are_found():
    def factor(k, d):
        return 3.0 ** (k - 3) * 1.5**-d

    assert np.abs(errors(fit_scales(lines_of(factor)), factor)).max() < 0.12


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_shrunk(seed):
    def factor(k, d):
        return 1.0

    lines = lines_of(factor, noise=0.5, seed=seed)
    raw = np.array([np.log(line.measured / line.predicted) for line in lines])
    assert np.square(errors(fit_scales(lines), factor)).mean() < 0.75 * np.square(raw).mean()


def test_an_unmeasured_kind_is_corrected_by_its_depth():
    scales = fit_scales(lines_of(lambda k, d: 4.0 if d == 0 else 1.0))
    assert scales.of("joint_channels gate_proj+up_proj+down_proj", 2) > 2.5
    assert scales.of("joint_channels gate_proj+up_proj+down_proj", 20) < 1.5


def test_what_rounds_to_nothing_says_nothing():
    lines = [Sensitivity("a", 0, 0, 1e-3, 0.0), Sensitivity("b", 0, 0, 0.0, 1.0)]
    assert fit_scales(lines).of("a", 0) == 1.0 == fit_scales([]).of("a", 0)


def test_surcharges_hold_everywhere_and_discounts_up_to_what_was_measured():
    unit = Unit(("model.layers.7.mlp.up_proj",), ((2, 2),))
    items = [Candidate(unit, None, size, 4.0 - size) for size in (4, 3, 2, 1)]
    dear, cheap = (fit_scales([Sensitivity("dense up_proj", 5, 9, 1.0, f)]) for f in (2.0, 0.5))
    losses = {
        name: [item.loss for item in rescaled(items, scales, measured)]
        for name, scales, measured in (
            ("dear", dear, []), ("cheap", cheap, items[2:3]), ("never measured", cheap, []),
        )
    }  # fmt: skip
    assert losses["dear"] == pytest.approx([0.0, 2.0, 4.0, 6.0])
    assert losses["cheap"] == pytest.approx([0.0, 0.5, 1.0, 2.0])
    assert losses["never measured"] == pytest.approx([0.0, 1.0, 2.0, 3.0])
    assert [item.params for item in rescaled(items, dear, [])] == [4, 3, 2, 1]


def test_depth_weights_fall_to_one():
    unit = Unit(("model.layers.7.mlp.up_proj",), ((2, 2),))
    weights = depth_weights(30)
    assert weights == sorted(weights, reverse=True)
    assert weights[-1] >= 1
    assert weighted_by_depth([Candidate(unit, None, 2, 3.0)], 30)[0].loss == 3 * weights[7]
