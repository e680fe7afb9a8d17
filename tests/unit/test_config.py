"""Settings: what --effort stands for, what is refused, and JSON there and back."""

from __future__ import annotations

from pathlib import Path

import pytest

from qll.config import (
    ConvertOptions,
    MainConfig,
    TextOptions,
    TrainOptions,
    main_config_from_json,
    to_json,
)
from qll.errors import UsageError


def test_effort_decides_unset_numbers_only():
    assert (TrainOptions("fast").passes, TrainOptions("fast").healing) == (0, 0)
    balanced, best = TrainOptions("balanced"), TrainOptions("best")
    assert balanced.passes > 0
    assert 0 == balanced.healing < best.healing
    assert TrainOptions("fast", refine_passes=7, heal_tokens=9).passes == 7
    assert TrainOptions("best", heal_tokens=0).healing == 0


def test_effort_decides_what_auto_may_make_of_one_matrix():
    offered = {
        effort: MainConfig(train=TrainOptions(effort)).resolved() for effort in ("balanced", "best")
    }
    assert {name: config.convert.singles for name, config in offered.items()} == {
        "balanced": "lowrank",
        "best": "panels",
    }
    given = MainConfig(convert=ConvertOptions(singles="dense"), train=TrainOptions("best"))
    assert given.resolved().convert.singles == "dense"


@pytest.mark.parametrize(
    "wrong",
    [
        {"refine_passes": -1},
        {"heal_tokens": -5},
        {"refine_rate": 0.0},
        {"heal_rate": float("nan")},
        {"train_context": 1},
    ],
)
def test_impossible_training_is_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        TrainOptions(**wrong)


def test_weights_are_one_per_file(tmp_path):
    texts = tuple(tmp_path / name for name in "ab")
    for text in texts:
        text.write_text("x")
    TextOptions(calib_text=texts, calib_weights=(1.0, 2.0))
    for weights in ((1.0,), (1.0, -1.0), (1.0, 2.0, 3.0)):
        with pytest.raises(UsageError, match="calib_weights"):
            TextOptions(calib_text=texts, calib_weights=weights)


def test_settings_come_back_from_json(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("x")
    config = MainConfig(
        out=Path("o"),
        texts=TextOptions(calib_text=(text, text), calib_weights=(1.0, 3.0)),
        train=TrainOptions("best", heal_tokens=100),
    )
    assert main_config_from_json(to_json(config), Path("run.json")) == config
