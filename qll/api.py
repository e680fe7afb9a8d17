"""The verbs as functions, for notebooks and scripts: `qll.plan`, `qll.convert`, `qll.evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qll import pipeline
from qll.calibrate import MomentStore
from qll.config import MainConfig
from qll.convert import Plan, make_plan
from qll.evaluate import score
from qll.load import Source, Text, encode, read_text
from qll.options import ConvertOptions


def plan(source: Source, moments: MomentStore | None = None, **options: Any) -> Plan:
    """The plan for `source`; options are the fields of `ConvertOptions` (keep=, format=, ...).

    Without moments the metric is the plain one. Raises UsageError when the budget cannot be met.

    >>> import qll
    >>> chosen = qll.plan(qll.open(), keep=1.0)
    >>> {entry.spec for entry in chosen.entries}
    {None}
    """
    if moments is None:
        options = {"metric": "plain", **options}
    return make_plan(source, moments, ConvertOptions(**options))


def convert(config: MainConfig) -> Path:
    """Calibrate, plan and convert as `qll convert` does; returns the folder of the checkpoint."""
    return pipeline.run(config, until="convert") / "model"


def evaluate(
    model: PreTrainedModel,
    text: Text | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int = 4096,
    context: int = 1024,
) -> dict[str, Any]:
    """Perplexity and bits per byte of `model` on a text (or the path of one).

    Returns {nll, tokens, ppl, bits_per_byte}; nll in nats per scored token.
    """
    read = text if isinstance(text, Text) else read_text(Path(text))
    windows, scored_bytes = encode(read, tokenizer, tokens, context)
    result = score(model, windows, scored_bytes)
    return {
        "nll": result.nll,
        "tokens": result.tokens,
        "ppl": result.ppl,
        "bits_per_byte": result.bits_per_byte,
    }
