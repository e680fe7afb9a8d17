"""Byte models side by side: the same prompts, seeds and settings, in a paired table.

Bits per byte are those each model needs for the prompt itself, so that all are scored on the same
bytes; repetition is that of what each model wrote after it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qll.bytelm.evaluate import bits_per_byte
from qll.bytelm.generate import encode_prompt, generate
from qll.bytelm.model import ByteModel
from qll.bytelm.repetition import distinct_n, longest_repeat, rep_n
from qll.bytelm.sampling import SamplingOptions
from qll.errors import TextError

PROMPTS = (
    "The quantum computer",
    "In the year 2024",
    "Once upon a time",
    "The history of the city begins",
    "She opened the door and",
    "The most important reason is that",
    "According to the report,",
    "It was a cold morning and",
    "The first law of",
    "People who live in towns",
)
# measures of what was written
MEASURES = {
    "rep8": lambda text: rep_n(text.encode(), 8),
    "distinct2": lambda text: distinct_n(text.split(), 2),
    "longest": lambda text: float(longest_repeat(text.encode())),
}
HEADINGS = {
    "bits_per_byte": "bits per byte of the prompt",
    "rep8": "rep-8 (bytes)",
    "distinct2": "distinct-2 (words)",
    "longest": "longest repeat (bytes)",
}


@dataclass(frozen=True)
class Continuation:
    """What a model makes of a prompt."""

    text: str
    values: dict[str, float]
    """One value per key of HEADINGS."""


def read_prompts(path: Path) -> list[str]:
    """The lines of a UTF-8 file that are not empty; raises TextError for none, or another file.

    >>> import tempfile; path = Path(tempfile.mkdtemp()) / "prompts.txt"
    >>> _ = path.write_text("one\\n\\ntwo\\n"); read_prompts(path)
    ['one', 'two']
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TextError("cannot be read as UTF-8 text", where=path, found=error) from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise TextError("no prompt", where=path, hint="write one per line")
    return prompts


def continuations(
    model: ByteModel,
    prompts: Sequence[str],
    max_new_tokens: int,
    options: SamplingOptions,
    seed: int = 0,
) -> list[Continuation]:
    """One continuation per prompt, prompt n with seed + n, and its measures.

    Raises UsageError for a prompt longer than the model's window.

    >>> from qll.bytelm.config import ModelConfig
    >>> model = ByteModel(ModelConfig(d_model=32, n_layers=1, context=8)).eval()
    >>> sorted(continuations(model, ["ab"], 4, SamplingOptions())[0].values)
    ['bits_per_byte', 'distinct2', 'longest', 'rep8']
    """
    found = []
    for number, prompt in enumerate(prompts):
        text = "".join(generate(model, prompt, max_new_tokens, options, seed=seed + number))
        score = bits_per_byte(model, [encode_prompt(prompt)], model.config.context)
        values = {name: measure(text) for name, measure in MEASURES.items()}
        found.append(Continuation(text, {"bits_per_byte": score.bits_per_byte, **values}))
    return found


def table(
    names: Sequence[str], prompts: Sequence[str], rows: Sequence[Sequence[Continuation]]
) -> str:
    """One table per measure: a line per prompt, then means, then paired differences.

    `rows` has a list of continuations per model. A difference is against the first model and has
    its standard error over the prompts in brackets.

    >>> values = dict.fromkeys(HEADINGS, 1.0)
    >>> one = [Continuation("x", values)]
    >>> print(table(["a", "b"], ["hello"], [one, one]).splitlines()[1])
    hello                                 1.000          1.000
    """
    parts = []
    for measure, heading in HEADINGS.items():
        lines = [_line(heading, [_short(name, 12) for name in names])]
        values = [[item.values[measure] for item in row] for row in rows]
        for number, prompt in enumerate(prompts):
            lines.append(_line(prompt, [f"{column[number]:.3f}" for column in values]))
        lines.append(_line("mean", [f"{statistics.mean(column):.3f}" for column in values]))
        differences = [_difference(column, values[0]) for column in values[1:]]
        lines.append(_line("against the first", ["", *differences]))
        parts.append("\n".join(line.rstrip() for line in lines))
    return "\n\n".join(parts)


def _difference(column: Sequence[float], first: Sequence[float]) -> str:
    """Mean paired difference and its standard error."""
    gaps = [ours - theirs for ours, theirs in zip(column, first, strict=True)]
    if len(gaps) == 1:
        return f"{gaps[0]:+.3f}"
    error = statistics.stdev(gaps) / math.sqrt(len(gaps))
    return f"{statistics.mean(gaps):+.3f} ({error:.3f})"


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{_short(name, 28):28s}" + "".join(f"{cell:>15s}" for cell in cells)


def _short(text: str, width: int) -> str:
    """At most `width` characters in one line."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 2] + ".."
