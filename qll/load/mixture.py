"""Windows for calibration and training, drawn from everywhere in one or several texts.

The first tokens of a file are one article; a conversion that saw only those is worse everywhere
else. So windows are drawn without replacement from the whole of each text, by a seeded generator,
and the texts take turns: any prefix of the windows is a mixture too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from qll.errors import TextError
from qll.load.text import Text, encode

logger = logging.getLogger("qll.load")

# Characters of a text that are cut into windows at most: a few seconds of tokenizer time.
MOST_CHARACTERS = 32 << 20


def mixed_windows(
    texts: Sequence[Text],
    weights: Sequence[float | int],
    tokenizer: PreTrainedTokenizerFast,
    tokens: int,
    context: int,
    seed: int = 0,
    skip: int = 0,
) -> Int[Tensor, "windows context"]:
    """`tokens // context` windows, text i giving a share `weights[i] / sum(weights)` of them.

    None of them is among those that the same call with `skip` in place of `tokens` gives. Returns
    int64 ids. A text too short for its share gives all it has, with a warning. Raises
    TextError when a text, or `tokens`, does not fill one window.

    >>> from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    >>> backend = Tokenizer(models.BPE({c: i for i, c in enumerate("abcdef")}, []))
    >>> backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    >>> backend.decoder = decoders.ByteLevel()
    >>> letters = PreTrainedTokenizerFast(tokenizer_object=backend)
    >>> texts = [Text("a", "ab" * 9), Text("b", "cd" * 9)]
    >>> mixed_windows(texts, [1, 1], letters, tokens=8, context=2).tolist()
    [[0, 1], [2, 3], [0, 1], [2, 3]]
    """
    wanted = tokens // context
    if wanted < 1:
        raise TextError(
            "too few tokens for one window", expected=f"at least {context}", found=tokens
        )
    drawn, places = [], []
    left_out = shares(weights, skip // context)
    for number, (text, count) in enumerate(zip(texts, shares(weights, wanted), strict=True)):
        first = left_out[number]
        windows, _ = encode(_bounded(text), tokenizer, None, context)
        if len(windows) < first + count:
            logger.warning(
                "%s: has %d windows of %d tokens, fewer than its share of %d",
                *(text.name, len(windows), context, first + count),
            )
        count = min(count, max(0, len(windows) - first))
        order = torch.Generator().manual_seed(seed * 1000 + number)
        drawn.append(windows[torch.randperm(len(windows), generator=order)[first : first + count]])
        places.append((torch.arange(count) + 0.5) / max(count, 1))
    turns = torch.cat(places).argsort(stable=True)
    return torch.cat(drawn)[turns]


def shares(weights: Sequence[float | int], total: int) -> list[int]:
    """Whole numbers in the ratio of `weights` that sum to `total` (largest remainders first).

    >>> shares([1, 1, 2], 7)
    [2, 2, 3]
    """
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(value) for value in exact]
    by_rest = sorted(range(len(exact)), key=lambda k: counts[k] - exact[k])
    for k in by_rest[: total - sum(counts)]:
        counts[k] += 1
    return counts


def _bounded(text: Text) -> Text:
    if len(text.text) <= MOST_CHARACTERS:
        return text
    logger.warning("%s: only its first %d characters are drawn from", text.name, MOST_CHARACTERS)
    return Text(text.name, text.text[:MOST_CHARACTERS])
