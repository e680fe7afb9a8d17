"""Texts packed into one file of bytes: a 0 byte before each document and one after the last.

The file is mapped into memory, never read whole, and pages that were read are given back now and
then: resident memory does not grow with the corpus.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from qll import store
from qll.bytelm.compressed import CompressedText, compressed, is_compressed
from qll.bytelm.documents import Document
from qll.bytelm.evaluate import BOUNDARY
from qll.bytelm.languages import Spans, with_language
from qll.bytelm.stored_text import StoredText
from qll.errors import IntegrityError, TextError

RELEASE_EVERY = 256  # gathers between two returns of pages to the system
SCAN = 16 << 20  # bytes searched for boundaries at once
MOST_SAMPLED = 16  # documents


def pack(
    documents: Iterable[Document], path: Path, limit: int | None = None, compress: bool = False
) -> Path:
    """Write the texts of `documents` to `path`, atomically, `limit` bytes at most.

    A cut by the limit may end in the middle of a document, but not of a character. Languages of
    documents are written beside it (qll/bytelm/languages.py); `compress` writes shards
    (qll/bytelm/compressed.py). Raises TextError for what is no text and DiskFullError.

    >>> import tempfile; path = Path(tempfile.mkdtemp()) / "packed"
    >>> pack([Document("a", b"one"), Document("b", b"two")], path).read_bytes()
    b'\\x00one\\x00two\\x00'
    """
    starts: list[int] = []
    numbers: list[int] = []

    def note(start: int, document: Document) -> None:
        starts.append(start)
        numbers.append(document.language)

    pieces = _packed(documents, limit, note)
    store.write_pieces(path, compressed(pieces) if compress else pieces)
    if any(numbers):
        Spans(np.array(starts, dtype=np.int64), np.array(numbers, dtype=np.uint16)).write(path)
    return path


def _packed(
    documents: Iterable[Document], limit: int | None, note: Callable[[int, Document], None]
) -> Iterator[bytes]:
    """The bytes of the packed file; `note` is told where each document begins."""
    left, written = float("inf") if limit is None else limit, 0
    for document in documents:
        if left <= 0:
            break
        note(written, document)
        written += 1
        yield bytes([BOUNDARY])
        for piece in document.pieces():
            part = piece if len(piece) <= left else piece[: int(left)]
            if len(part) < len(piece):
                part = part.decode("utf-8", "ignore").encode()
            yield part
            written += len(part)
            left -= len(piece)
            if left <= 0:
                break
    yield bytes([BOUNDARY])


class PackedText(StoredText):
    """A packed file that is mapped into memory.

    >>> import tempfile; path = Path(tempfile.mkdtemp()) / "packed"
    >>> text = PackedText(pack([Document("a", b"one"), Document("b", b"two")], path))
    >>> text.gather(np.array([0, 4]), 4).tolist()
    [[0, 111, 110, 101], [0, 116, 119, 111]]
    >>> [bytes(document) for document in text.documents()]
    [b'one', b'two']
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.gathers = 0
        try:
            with open(path, "rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise IntegrityError(
                "packed text cannot be read",
                where=path,
                found=str(error),
                hint="delete the folder data of the run and start again",
            ) from None
        if hasattr(self.map, "madvise"):
            self.map.madvise(mmap.MADV_RANDOM)
        self.bytes = np.frombuffer(self.map, dtype=np.uint8)

    def __len__(self) -> int:
        """Bytes of it, boundaries included."""
        return len(self.bytes)

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """uint8[len(starts), length]: the bytes from each of `starts` on, in one indexing."""
        found = self.bytes[starts[:, None] + np.arange(length)]
        self.gathers += 1
        if self.gathers % RELEASE_EVERY == 0:
            self.release()
        return found

    def release(self) -> None:
        """Give the pages that were read back to the system; they stay in its file cache."""
        if hasattr(self.map, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)

    def documents(self) -> list[np.ndarray]:
        """The documents without their boundaries: views, or ids where they are in languages.

        Raises TextError when there is none.
        """
        edges = self._boundaries()
        spans = [(a + 1, b) for a, b in pairwise(edges) if b > a + 1]
        if not spans:
            raise TextError("no document", where=self.path, hint="give a longer text")
        views = [self.bytes[start:stop] for start, stop in spans]
        if self.languages is None:
            return views
        numbers = self.languages.at(np.array([start for start, _ in spans])).tolist()
        return list(map(with_language, views, numbers))

    def _boundaries(self) -> list[int]:
        found: list[int] = []
        for start in range(0, len(self.bytes), SCAN):
            found += (np.flatnonzero(self.bytes[start : start + SCAN] == BOUNDARY) + start).tolist()
        self.release()
        return found


def open_text(path: Path) -> StoredText:
    """The packed text in a file, compressed or not; raises IntegrityError when it is damaged."""
    return CompressedText(path) if is_compressed(path) else PackedText(path)


def sample(documents: Sequence[np.ndarray], limit: int) -> list[np.ndarray]:
    """Beginnings of at most 16 documents, evenly spaced, of `limit` bytes together at most.

    >>> [len(part) for part in sample([np.zeros(9, np.uint8), np.zeros(99, np.uint8)], 20)]
    [9, 10]
    """
    if total_bytes(documents) <= limit:
        return list(documents)
    count = min(len(documents), MOST_SAMPLED, limit)
    chosen = [documents[i * len(documents) // count] for i in range(count)]
    return [document[: limit // count] for document in chosen]


def total_bytes(documents: Sequence[np.ndarray]) -> int:
    """Bytes of all of them."""
    return sum(map(len, documents))
