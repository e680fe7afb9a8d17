"""How much a text repeats itself: shares of its n-grams, of bytes or of words.

rep-n = 1 - distinct n-grams / n-grams (Welleck et al. 2020, arXiv 1908.04319), distinct-n = 1 -
rep-n (Li et al. 2016). They fall with the length of a text: compare texts of one length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def distinct_n(items: Sequence[Any], n: int) -> float:
    """Share of distinct n-grams among all of `items` (bytes or words); 1 when there is none.

    >>> distinct_n("the cat the cat".split(), 1), distinct_n(b"abcd", 2)
    (0.5, 1.0)
    """
    grams = [tuple(items[start : start + n]) for start in range(len(items) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def rep_n(items: Sequence[Any], n: int) -> float:
    """Share of n-grams that are a repetition of an earlier one.

    >>> rep_n("the cat the cat".split(), 1)
    0.5
    """
    return 1.0 - distinct_n(items, n)


def longest_repeat(text: bytes) -> int:
    """Bytes of the longest piece that stands in `text` twice (overlap allowed).

    >>> longest_repeat(b"one two one two")
    7
    """
    low, high = 0, max(0, len(text) - 1)
    while low < high:
        size = (low + high + 1) // 2
        starts = range(len(text) - size + 1)
        if len({text[start : start + size] for start in starts}) < len(starts):
            low = size
        else:
            high = size - 1
    return low
