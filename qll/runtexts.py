"""Which texts a run calibrates on and is scored on, and that they are not the same."""

from __future__ import annotations

from typing import Any

from qll.calibrate import MomentStore
from qll.config import MainConfig
from qll.errors import UsageError
from qll.load import Text, builtin_texts, read_text


def calibration_text(config: MainConfig) -> Text:
    """The text of --calib_text, or the calibration half of Python's topics."""
    if config.texts.calib_text is not None:
        return read_text(config.texts.calib_text)
    return builtin_texts()["python_topics_calibration"]


def evaluation_texts(config: MainConfig) -> list[Text]:
    """The text asked for (or the half of the topics that calibration did not see), and one out of
    the calibration domain. Raises UsageError when calibration and evaluation coincide.
    """
    builtin, texts = builtin_texts(), config.texts
    topics, code = builtin["python_topics_evaluation"], builtin["python_source"]
    chosen = [topics if texts.eval_text is None else read_text(texts.eval_text)]
    chosen.append(code if texts.calib_text is None else topics)
    if chosen[0].sha256 == calibration_text(config).sha256:
        raise UsageError(
            "the evaluation text is the calibration text",
            where="--eval_text",
            found=texts.eval_text,
            hint="give a text that calibration does not see",
        )
    return list({text.sha256: text for text in chosen}.values())


def calibration_facts(config: MainConfig, moments: MomentStore | None) -> dict[str, Any]:
    """What the moments were measured on, for the report: the text, or the token ids' sha256."""
    if moments is None:
        return {"name": None, "sha256": None, "tokens": 0}
    facts = {"tokens": moments.tokens, "windows_sha256": moments.summary["windows_sha256"]}
    if config.moments is not None:
        return {"name": str(config.moments), "sha256": None, **facts}
    text = calibration_text(config)
    return {"name": text.name, "sha256": text.sha256, **facts}
