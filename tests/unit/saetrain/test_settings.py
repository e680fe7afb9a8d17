"""Settings that cannot be meant are refused before torch is there."""

from __future__ import annotations

import pytest

from qll.errors import UsageError
from qll.saetrain.settings import LearningOptions, SAETrainConfig


@pytest.mark.parametrize(
    "options", [{"rate": 0.0}, {"rate": float("nan")}, {"auxk": -1.0}, {"batch_tokens": 0}]
)
def test_learning_out_of_range(options):
    with pytest.raises(UsageError, match=f"--{next(iter(options))}"):
        LearningOptions(**options)


@pytest.mark.parametrize("options", [{"k": 0}, {"expansion": 0}, {"tokens": 5}])
def test_config_out_of_range(options):
    with pytest.raises(UsageError, match=f"--{next(iter(options))}"):
        SAETrainConfig(**options)


def test_a_place_named_twice():
    with pytest.raises(UsageError, match="twice"):
        SAETrainConfig(hookpoints=("layers.1", "layers.1"))


def test_dead_follows_the_length_of_the_run():
    assert SAETrainConfig(tokens=8000).dead_after == 1000
    assert SAETrainConfig(tokens=10**12).dead_after == 10_000_000
    assert SAETrainConfig(learning=LearningOptions(dead_after=5)).dead_after == 5
