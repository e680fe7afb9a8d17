"""Named texts: data sets of the Hugging Face hub, read through the `datasets` library, and mixes.

Nothing is downloaded before it is asked for, and nothing here is needed for local files. To add a
data set, `register` a HubText under a new name.

>>> sorted(MIXES), "wikitext2" in HUB
(['large', 'multi', 'single'], True)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from qll.bytelm.documents import HELD_OUT, Document
from qll.errors import TextError, UsageError

# wikitext has a line per row; an article begins with its title between single equals signs
TITLE = re.compile(r"^ = [^=].* = \n?$")
HELD_OUT_DOCUMENTS = 512  # of a data set without a validation split


@dataclass(frozen=True)
class HubText:
    """Where a data set is, and how to read documents from it."""

    path: str
    name: str | None = None
    column: str = "text"
    validation: str | None = None
    """Its split for validation; without one every tenth of the first documents is held out."""
    lines: bool = False
    """Whether a row is a line, and documents begin with titles."""

    def rows(self, split: str, streaming: bool) -> Iterator[str]:
        """The texts of its rows in order; raises TextError without the library or the network."""
        try:
            import datasets
        except ImportError:
            raise self._unreachable("the package `datasets` is not installed") from None
        try:
            found: Any = datasets.load_dataset(
                self.path, self.name, split=split, streaming=streaming
            )
            for row in found:
                yield row[self.column]
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise self._unreachable(f"{type(error).__name__}: {error}"[:300]) from None

    def documents(self, split: str = "train", streaming: bool = True) -> Iterator[Document]:
        """Its documents; a 0 byte inside one, which would be a boundary, is left out."""
        texts = self.rows(split, streaming)
        for number, text in enumerate(articles(texts) if self.lines else texts):
            data = text.replace("\0", "").encode("utf-8", "replace")
            if data:
                yield Document(f"{self.path}/{split}/{number}", data)

    def training(self, streaming: bool = True) -> Iterator[Document]:
        """What may be trained on."""
        documents = self.documents("train", streaming)
        if self.validation:
            yield from documents
            return
        for number, document in enumerate(documents):
            if number >= HELD_OUT * HELD_OUT_DOCUMENTS or (number + 1) % HELD_OUT:
                yield document

    def held_out(self, streaming: bool = True) -> Iterator[Document]:
        """What is held out."""
        if self.validation:
            yield from self.documents(self.validation, streaming)
            return
        first = islice(self.documents("train", streaming), HELD_OUT * HELD_OUT_DOCUMENTS)
        yield from islice(first, HELD_OUT - 1, None, HELD_OUT)

    def _unreachable(self, found: str) -> TextError:
        return TextError(
            "data set cannot be read",
            where=self.path,
            found=found,
            hint="`pip install datasets` and be online, or train on local texts: "
            "--data FILE_OR_FOLDER",
        )


HUB: dict[str, HubText] = {
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "text", "validation", True),
    "tinystories": HubText("roneneldan/TinyStories", None, "text", "validation"),
    "openwebtext": HubText("Skylion007/openwebtext"),
    # the Pile itself is no longer hosted
    "pile": HubText("monology/pile-uncopyrighted", None, "text", "validation"),
    "c4": HubText("allenai/c4", "en", "text", "validation"),
    "fineweb": HubText("HuggingFaceFW/fineweb", "sample-10BT"),
}
# names of the founding documents for the same
HUB["c4_en_small"], HUB["fineweb_sample"] = HUB["c4"], HUB["fineweb"]

MIXES: dict[str, dict[str, float]] = {
    "single": {"wikitext2": 1.0},
    "multi": {"wikitext2": 0.4, "tinystories": 0.3, "openwebtext": 0.3},
    "large": {"pile": 0.5, "openwebtext": 0.3, "wikitext2": 0.2},
}


def register(name: str, text: HubText) -> None:
    """Make `text` known as --dataset `name`."""
    HUB[name] = text


def mix_of(name: str) -> dict[str, float]:
    """The data sets of a name, with their weights; raises UsageError for one we do not know.

    >>> mix_of("large")
    {'pile': 0.5, 'openwebtext': 0.3, 'wikitext2': 0.2}
    >>> mix_of("c4")
    {'c4': 1.0}
    """
    if name in MIXES:
        return MIXES[name]
    if name in HUB:
        return {name: 1.0}
    raise UsageError(
        "no such data set",
        where="--dataset",
        expected=", ".join([*HUB, *MIXES]),
        found=name,
        hint="a local text goes in --data",
    )


def articles(lines: Iterator[str]) -> Iterator[str]:
    """Lines joined to articles, each of which begins with its title.

    >>> list(articles(iter([" = One = \\n", " text\\n", " = Two = \\n", " = = part = = \\n"])))
    [' = One = \\n text\\n', ' = Two = \\n = = part = = \\n']
    """
    current: list[str] = []
    for line in lines:
        if TITLE.match(line) and current:
            yield "".join(current)
            current = []
        current.append(line)
    if current:
        yield "".join(current)
