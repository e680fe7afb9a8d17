"""Which texts a run calibrates on and is scored on, and that they are not the same."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from jaxtyping import Int
from torch import Tensor

from qll.calibrate import MomentStore
from qll.config import MainConfig
from qll.errors import UsageError
from qll.load import Text, builtin_texts, mixed_windows, read_text
from qll.runfolder import Run

logger = logging.getLogger("qll.runtexts")

# characters at the beginning of a text by which it is known inside another
LOOKED_FOR = 2000


def calibration_texts(config: MainConfig) -> list[Text]:
    """The texts of --calib_text, or the calibration half of Python's topics."""
    if config.texts.calib_text:
        return [read_text(path) for path in config.texts.calib_text]
    return [builtin_texts()["python_topics_calibration"]]


def calibration_names(config: MainConfig) -> str:
    """The names of the calibration texts, for people."""
    return " + ".join(text.name for text in calibration_texts(config))


def calibration_windows(
    state: Run, tokens: int, context: int, skip: int = 0
) -> Int[Tensor, "windows context"]:
    """Windows drawn from the calibration texts by weight and seed, after the first `skip` tokens of
    the draw."""
    texts = calibration_texts(state.config)
    weights = state.config.texts.calib_weights or (1.0,) * len(texts)
    return mixed_windows(texts, weights, state.tokenizer, tokens, context, state.config.seed, skip)


def trial_windows(state: Run, tokens: int, context: int) -> Int[Tensor, "windows context"]:
    """Starts of windows of the calibration texts that the moments were not measured on; of those
    they were, with a warning, where the texts have no others."""
    texts = state.config.texts
    wanted = -(-tokens // min(context, texts.context)) * texts.context
    found = calibration_windows(state, wanted, texts.context, skip=texts.calib_tokens)
    if not len(found):
        logger.warning("no calibration text is left to measure losses on: the moments' is used")
        found = calibration_windows(state, wanted, texts.context)
    return found[:, :context].contiguous()


def evaluation_texts(config: MainConfig) -> list[Text]:
    """The text asked for (or the half of the topics that calibration did not see), and one out of
    the calibration domain. Raises UsageError when the first is calibrated on.
    """
    builtin, texts = builtin_texts(), config.texts
    topics, code = builtin["python_topics_evaluation"], builtin["python_source"]
    first = topics if texts.eval_text is None else read_text(texts.eval_text)
    seen = calibration_texts(config)
    if is_part_of(first, seen):
        raise UsageError(
            "the evaluation text is the calibration text, or a part of it",
            where="--eval_text",
            found=texts.eval_text or first.name,
            hint="give a text that calibration does not see",
        )
    other = topics if texts.calib_text and not is_part_of(topics, seen) else code
    return [first] if other.sha256 == first.sha256 or is_part_of(other, seen) else [first, other]


def is_part_of(text: Text, seen: Iterable[Text]) -> bool:
    """Whether the beginning of `text`, or all of a short one, is in any of the texts `seen`.

    >>> whole = Text("whole", "one two three")
    >>> is_part_of(Text("part", "two"), [whole]), is_part_of(Text("new", "four"), [whole])
    (True, False)
    """
    return any(text.text[:LOOKED_FOR] in other.text for other in seen)


def calibration_facts(config: MainConfig, moments: MomentStore | None) -> dict[str, Any]:
    """What the moments were measured on, for the report: the texts, or the token ids' sha256."""
    if moments is None:
        return {"name": None, "sha256": None, "tokens": 0}
    facts = {"tokens": moments.tokens, "windows_sha256": moments.summary["windows_sha256"]}
    if config.moments is not None:
        return {"name": str(config.moments), "sha256": None, **facts}
    texts = calibration_texts(config)
    names, hashes = (" + ".join(getattr(text, key) for text in texts) for key in ("name", "sha256"))
    return {"name": names, "sha256": hashes, **facts}
