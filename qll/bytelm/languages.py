"""Which language a document is in, by its name, and how that travels with its bytes.

A document is in the language that its file's name ends with (name.en.txt, name.en), or else in that
of the nearest folder named like one (en/name.txt). An id that a model reads is a byte, plus 256
times the number of its language: 0 for a text that is in none, 1 for the first language. Targets
are bytes.

>>> languages = ("en", "de")
>>> [language_of(Path(name), languages) for name in ("a.de.txt", "texts/en/a.txt", "end.txt")]
[2, 1, 0]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qll import store
from qll.bytelm.config import VOCAB
from qll.bytelm.documents import Document
from qll.errors import IntegrityError, TextError, UsageError

SUFFIX = ".languages"  # of the file beside a packed text


def language_of(path: Path, languages: Sequence[str]) -> int:
    """The number of the language of a file; 0 when its name says nothing."""
    ending = reversed(path.name.split(".")[1:])
    for word in (*ending, *reversed(path.parts[:-1])):
        if word in languages:
            return languages.index(word) + 1
    return 0


def number_of(language: str, languages: Sequence[str]) -> int:
    """The number of a language by its name, 0 for ""; raises UsageError for one not in the list.

    >>> number_of("de", ("en", "de"))
    2
    """
    if not language:
        return 0
    if language not in languages:
        raise UsageError(
            "no language of this model",
            where="--language",
            expected=", ".join(languages) or "none: the model was trained without --languages",
            found=language,
        )
    return languages.index(language) + 1


def tagged(documents: Sequence[Document], languages: Sequence[str]) -> list[Document]:
    """The documents, each with the number of its language.

    >>> [document.language for document in tagged([Document("a.de.txt", b"Text")], ("en", "de"))]
    [2]
    """
    return [
        replace(document, language=language_of(_path(document), languages))
        for document in documents
    ]


def require_every_language(documents: Sequence[Document], languages: Sequence[str]) -> None:
    """Raise TextError for a language that no document is in."""
    found = {document.language for document in documents}
    for number, language in enumerate(languages, 1):
        if number not in found:
            raise TextError(
                "no document in this language",
                where=f"--languages {language}",
                expected=f"files named like name.{language}.txt, or a folder {language}/",
                found=f"{len(documents)} documents",
            )


def ids_of(document: Document) -> np.ndarray:
    """The ids of a whole document: uint8, or uint16 when it is in a language.

    >>> ids_of(Document("a", b"ab", language=1)).tolist()
    [353, 354]
    """
    data = np.frombuffer(b"".join(document.pieces()), dtype=np.uint8)
    return with_language(data, document.language)


def with_language(data: np.ndarray, number: int) -> np.ndarray:
    """Bytes as ids of a language; bytes as they are for number 0."""
    return data.astype(np.uint16) + np.uint16(VOCAB * number) if number else data


@dataclass(frozen=True)
class Spans:
    """Where in a packed text documents of a language begin, and the numbers of those languages.

    >>> Spans(np.array([0, 4]), np.array([1, 2], dtype=np.uint16)).at(np.array([0, 3, 4])).tolist()
    [1, 1, 2]
    """

    starts: np.ndarray
    """int64, ascending from 0: the boundary before each document."""
    numbers: np.ndarray
    """uint16: its language."""

    def at(self, places: np.ndarray) -> np.ndarray:
        """The language of the document at each of `places`; a boundary is in that after it."""
        return self.numbers[np.searchsorted(self.starts, places, side="right") - 1]

    def write(self, path: Path) -> None:
        """Write them beside the packed text `path`."""
        value = {"starts": self.starts.tolist(), "numbers": self.numbers.tolist()}
        store.write_json(_beside(path), value)

    @classmethod
    def read(cls, path: Path) -> Spans | None:
        """Those beside the packed text `path`; None for a text without languages.

        Raises IntegrityError for a file that is damaged.
        """
        if not _beside(path).is_file():
            return None
        value = store.read_json(_beside(path))
        try:
            starts = np.array(value["starts"], dtype=np.int64)
            numbers = np.array(value["numbers"], dtype=np.uint16)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise _damaged(path, str(error)) from None
        if starts.shape != numbers.shape or not len(starts) or starts[0]:
            raise _damaged(path, f"{starts.shape} starts, {numbers.shape} numbers")
        return cls(starts, numbers)


def _beside(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)


def _path(document: Document) -> Path:
    return document.source if isinstance(document.source, Path) else Path(document.name)


def _damaged(path: Path, found: str) -> IntegrityError:
    return IntegrityError(
        "not the languages of a packed text",
        where=_beside(path),
        found=found,
        hint="delete the folder data of the run and start again",
    )
