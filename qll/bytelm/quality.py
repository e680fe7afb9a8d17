"""How much a document looks like prose: the share of eight simple rules that it obeys.

The rules and their thresholds are those of Gopher (Rae et al. 2021, appendix A.1.1 and table A1),
without those on the length of a document, which windows do not care about, and on English stop
words. They are of texts with spaces between words; source code and tables obey fewer of them.

>>> quality("The river was low that summer, and the fields were dry.\\nNobody knew why.")
1.0
>>> quality("## ## $$ %% 12 12 12 12 12 12 12") < 0.7
True
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from qll.bytelm.documents import Document

JUDGED = 1 << 20  # bytes of a document
BULLETS = ("•", "‣", "-", "*")
ELLIPSES = ("...", "…")


@dataclass(frozen=True)
class Counted:
    """What the rules look at."""

    text: str

    @cached_property
    def words(self) -> list[str]:
        """What stands between spaces."""
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not empty."""
        return [line.strip() for line in self.text.splitlines() if line.strip()]

    def share(self, holds: Callable[[str], bool]) -> float:
        """Share of the lines of which something holds."""
        return sum(map(holds, self.lines)) / len(self.lines)

    @cached_property
    def repeated(self) -> list[str]:
        """Lines that stand in it already."""
        counts = Counter(self.lines)
        return [line for line, count in counts.items() for _ in range(count - 1)]

    @cached_property
    def commonest_pair(self) -> float:
        """Share of the characters of words that the commonest two words in a row make up."""
        pairs = Counter(pairwise(self.words))
        if not pairs:
            return 0.0
        pair, count = pairs.most_common(1)[0]
        return 0.0 if count == 1 else count * len("".join(pair)) / self.letters

    @cached_property
    def letters(self) -> int:
        """Characters of all words."""
        return sum(map(len, self.words))


RULES: dict[str, Callable[[Counted], bool]] = {
    "words of 3 to 10 letters": lambda found: 3 <= found.letters / len(found.words) <= 10,
    "few symbols": lambda found: _symbols(found.text) <= 0.1 * len(found.words),
    "words with letters": lambda found: (
        sum(any(map(str.isalpha, word)) for word in found.words) >= 0.8 * len(found.words)
    ),
    "no list": lambda found: found.share(lambda line: line.startswith(BULLETS)) <= 0.9,
    "finished lines": lambda found: found.share(lambda line: line.endswith(ELLIPSES)) <= 0.3,
    "new lines": lambda found: len(found.repeated) <= 0.3 * len(found.lines),
    "new text": lambda found: len("".join(found.repeated)) <= 0.2 * len("".join(found.lines)),
    "no commonest pair of words": lambda found: found.commonest_pair <= 0.2,
}


def quality(text: str) -> float:
    """From 0 to 1, the share of RULES that a text obeys; 0 without a word."""
    found = Counted(text)
    if not found.words:
        return 0.0
    return sum(rule(found) for rule in RULES.values()) / len(RULES)


def quality_of(document: Document) -> float:
    """The quality of the beginning of a document.

    >>> quality_of(Document("a", b"Nobody knew why."))
    1.0
    """
    text = b""
    for piece in document.pieces():
        text += piece[: JUDGED - len(text)]
        if len(text) >= JUDGED:
            break
    return quality(text.decode("utf-8", "ignore"))


def _symbols(text: str) -> int:
    """Hash signs or ellipses, whichever are more."""
    return max(text.count("#"), sum(map(text.count, ELLIPSES)))
