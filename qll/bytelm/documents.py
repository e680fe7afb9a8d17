"""Documents of local files and folders, read in pieces, checked to be UTF-8 text, split in two.

A folder is read recursively, in the order of the names; hidden files and empty ones are left out.
What is held out for validation never depends on chance: every tenth document of ten or more, or the
last tenth of each when there are fewer.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qll.bytelm.evaluate import BOUNDARY
from qll.errors import TextError

PIECE = 4 << 20  # bytes read at once
HELD_OUT = 10  # of so many documents the last is held out; of a single one, the last part
CONTINUATION = range(0x80, 0xC0)  # bytes that do not begin a UTF-8 character


@dataclass(frozen=True)
class Document:
    """One text: a part of a file, or bytes at hand."""

    name: str
    source: Path | bytes
    start: int = 0
    stop: int | None = None
    """Where it ends in the source; None is at its end."""
    language: int = 0
    """Number of its language, 0 for none: qll/bytelm/languages.py."""

    def __len__(self) -> int:
        """Bytes of it."""
        whole = self.source.stat().st_size if isinstance(self.source, Path) else len(self.source)
        return (whole if self.stop is None else self.stop) - self.start

    def pieces(self) -> Iterator[bytes]:
        """Its bytes, at most PIECE of them at a time.

        Raises TextError when a byte is 0 (a binary file) or not UTF-8, naming its position, or when
        the file cannot be read.
        """
        decoder, position = codecs.getincrementaldecoder("utf-8")(), self.start
        for piece in self._raw():
            self._require_text(piece, position, decoder)
            position += len(piece)
            yield piece
        self._require_text(b"", position, decoder, final=True)

    def _raw(self) -> Iterator[bytes]:
        if isinstance(self.source, bytes):
            yield self.source[self.start : self.stop]
            return
        left = len(self)
        try:
            with open(self.source, "rb") as file:
                file.seek(self.start)
                while left and (piece := file.read(min(PIECE, left))):
                    left -= len(piece)
                    yield piece
        except OSError as error:
            raise TextError("cannot be read", where=self.name, found=error.strerror) from None

    def _require_text(
        self,
        piece: bytes,
        position: int,
        decoder: codecs.IncrementalDecoder,
        final: bool = False,
    ) -> None:
        if (zero := piece.find(BOUNDARY)) >= 0:
            raise TextError(
                "a binary file, not a text",
                where=self.name,
                found=f"byte 0 at position {position + zero}",
                hint="name only texts, for a folder with --pattern '*.txt'",
            )
        waiting = len(decoder.getstate()[0])
        try:
            decoder.decode(piece, final)
        except UnicodeDecodeError as error:
            at = position - waiting + error.start
            raise TextError(
                "not UTF-8",
                where=self.name,
                found=f"byte {error.object[error.start]:#04x} at position {at}",
                hint="convert it, for instance with iconv -f latin1 -t utf-8",
            ) from None


def find_documents(paths: Sequence[Path], pattern: str = "*") -> list[Document]:
    """The documents of files and folders; a folder gives its files whose names match `pattern`.

    Raises TextError when a path is missing or nothing in it matches.

    >>> import tempfile; folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "b.txt").write_text("two"), (folder / "a.txt").write_text("one")
    >>> [document.name for document in find_documents([folder])]
    ['a.txt', 'b.txt']
    """
    found = []
    for path in paths:
        if path.is_dir():
            inside = _files(path, pattern)
            if not inside:
                raise TextError("no text in this folder", where=path, expected=f"files {pattern}")
            found += inside
        elif path.is_file():
            found.append(Document(path.name, path))
        else:
            raise TextError(
                "no such file or folder",
                where=path,
                hint="give the path of a text; a data set of the hub goes in --dataset",
            )
    return [document for document in found if len(document)]


def split_documents(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """What is trained on and what is held out.

    >>> texts = [Document(str(number), b"text") for number in range(20)]
    >>> [document.name for document in split_documents(texts)[1]]
    ['9', '19']
    >>> [part[0].stop for part in split_documents([Document("one", b"x" * 100)])]
    [90, None]
    """
    if len(documents) >= HELD_OUT:
        trained = [document for i, document in enumerate(documents, 1) if i % HELD_OUT]
        return trained, list(documents[HELD_OUT - 1 :: HELD_OUT])
    cuts = [(document, _last_tenth(document)) for document in documents]
    return (
        [replace(document, stop=cut) for document, cut in cuts],
        [replace(document, start=cut) for document, cut in cuts],
    )


def check_documents(documents: Iterable[Document]) -> dict[str, str | int]:
    """Read everything once: its sha256 (a 0 byte before each document), bytes and documents.

    Raises TextError for the first that is no text.

    >>> check_documents([Document("a", b"xy"), Document("b", b"z")])["bytes"]
    3
    """
    digest, size, count = hashlib.sha256(), 0, 0
    for document in documents:
        digest.update(bytes([BOUNDARY]))
        count += 1
        for piece in document.pieces():
            digest.update(piece)
            size += len(piece)
    return {"sha256": digest.hexdigest(), "bytes": size, "documents": count}


def _files(folder: Path, pattern: str) -> list[Document]:
    paths = [
        (path.relative_to(folder), path)
        for path in folder.rglob(pattern)
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    return [Document(name.as_posix(), path) for name, path in sorted(paths)]


def _last_tenth(document: Document) -> int:
    """Where the last tenth of a document begins, at the beginning of a character."""
    cut = document.start + len(document) - len(document) // HELD_OUT
    if isinstance(document.source, bytes):
        following = document.source[cut : cut + 4]
    else:
        with open(document.source, "rb") as file:
            file.seek(cut)
            following = file.read(4)
    return cut + next((i for i, byte in enumerate(following) if byte not in CONTINUATION), 0)
