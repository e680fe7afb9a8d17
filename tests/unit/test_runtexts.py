"""What is scored was not calibrated on, under whatever name it comes."""

from __future__ import annotations

import pytest

from qll.config import MainConfig, TextOptions
from qll.errors import UsageError
from qll.load import builtin_texts
from qll.runtexts import evaluation_texts


def config(calib, evaluation=None) -> MainConfig:
    return MainConfig(texts=TextOptions(calib_text=tuple(calib), eval_text=evaluation))


@pytest.fixture
def topics(tmp_path):
    """The default evaluation text as a file of the user's."""
    path = tmp_path / "mine.txt"
    path.write_text(builtin_texts()["python_topics_evaluation"].text)
    return path


def names(config: MainConfig) -> list[str]:
    return [text.name for text in evaluation_texts(config)]


def test_without_texts_the_half_that_was_not_calibrated_on_and_code(tmp_path):
    assert names(MainConfig()) == ["python_topics_evaluation", "python_source"]
    (tmp_path / "other.txt").write_text("something else " * 500)
    assert names(config([tmp_path / "other.txt"])) == ["python_topics_evaluation"]


def test_a_text_that_was_calibrated_on_is_refused_and_so_is_a_part_of_one(topics, tmp_path):
    with pytest.raises(UsageError, match="is the calibration text, or a part"):
        evaluation_texts(config([topics]))
    whole, part = tmp_path / "whole.txt", tmp_path / "part.txt"
    part.write_text("a sentence that is in both. " * 200)
    whole.write_text("a beginning. " * 50 + part.read_text() + "an end.")
    with pytest.raises(UsageError, match="is the calibration text, or a part"):
        evaluation_texts(config([whole], part))


def test_the_second_text_is_never_one_that_was_calibrated_on(topics, tmp_path):
    (tmp_path / "other.txt").write_text("something else " * 500)
    other = tmp_path / "other.txt"
    assert names(config([topics], other)) == ["other", "python_source"]
