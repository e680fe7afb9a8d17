"""Can a model use what it read: one fact far back (needle), or one of many.

A fact is "The code of NAME is 1234."; after filler, the model must find the code of a name among
eight codes more likely than the seven others. Chance is 1/8. A model that was not trained on such
sentences is asked something new: compare models, not absolute numbers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from qll.bytelm.model import ByteModel
from qll.bytelm.rerank import log_probabilities
from qll.errors import UsageError

CHOICES = 8
NAMES = (
    *("Oslo", "Lima", "Cairo", "Delhi", "Quito", "Tunis", "Seoul", "Paris"),
    *("Accra", "Dakar", "Hanoi", "Minsk", "Rabat", "Sofia", "Tokyo", "Vaduz"),
)
FILLER = (
    "The river was low that summer and the fields were dry. ",
    "Nobody in the village remembered who had built the bridge. ",
    "In the evening they sat together and spoke about the weather. ",
    "A letter arrived, but it was addressed to somebody else. ",
    "The road climbed slowly towards the hills in the north. ",
)


def needle_recall(
    model: ByteModel, distances: Sequence[int], trials: int = 16, seed: int = 0
) -> dict[int, float]:
    """Share of right answers when the fact ended so many bytes before the question.

    >>> from qll.bytelm.config import ModelConfig
    >>> model = ByteModel(ModelConfig(d_model=32, n_layers=1, context=8)).eval()
    >>> sorted(needle_recall(model, [16, 64], trials=2))
    [16, 64]
    """
    generator, found = random.Random(seed), {}
    for distance in distances:
        right = 0
        for _ in range(trials):
            name, codes = generator.choice(NAMES), _codes(generator, CHOICES)
            text = _fact(name, codes[0]) + _filler(generator, distance)
            right += _answers(model, text, name, codes)
        found[distance] = right / trials
    return found


def multi_fact_recall(
    model: ByteModel, facts: Sequence[int], distance: int = 0, trials: int = 16, seed: int = 0
) -> dict[int, float]:
    """Share of right answers after so many facts; the wrong codes are those of other names.

    With fewer than eight facts the rest of the eight codes are new. Raises UsageError for more
    facts than there are names (16).

    >>> from qll.bytelm.config import ModelConfig
    >>> model = ByteModel(ModelConfig(d_model=32, n_layers=1, context=8)).eval()
    >>> sorted(multi_fact_recall(model, [2, 8], trials=2))
    [2, 8]
    """
    if max(facts) > len(NAMES):
        raise UsageError("too many facts", expected=f"at most {len(NAMES)}", found=max(facts))
    generator, found = random.Random(seed), {}
    for count in facts:
        right = 0
        for _ in range(trials):
            names = generator.sample(NAMES, count)
            codes = _codes(generator, max(count, CHOICES))
            text = "".join(map(_fact, names, codes)) + _filler(generator, distance)
            asked = generator.randrange(count)
            others = codes[:asked] + codes[asked + 1 :]
            choices = [codes[asked], *others[: CHOICES - 1]]
            right += _answers(model, text, names[asked], choices)
        found[count] = right / trials
    return found


def _answers(model: ByteModel, text: str, name: str, codes: Sequence[str]) -> bool:
    """Whether the first of `codes` is the most likely; a tie is a wrong answer."""
    prompt = text + _fact(name, "")[:-2]
    scores = log_probabilities(model, prompt.encode(), [code.encode() for code in codes])
    return scores[0] > max(scores[1:])


def _fact(name: str, code: str) -> str:
    return f"The code of {name} is {code}. "


def _filler(generator: random.Random, size: int) -> str:
    """Sentences of `size` bytes together."""
    text = ""
    while len(text) < size:
        text += generator.choice(FILLER)
    return text[len(text) - size :]


def _codes(generator: random.Random, count: int) -> list[str]:
    """Different numbers of four digits."""
    return [str(code) for code in generator.sample(range(1000, 10000), count)]
