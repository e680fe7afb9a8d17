"""Packed texts that stay compressed on disk and are still read at random places.

    MAGIC, then shards of 64 KB each compressed by itself, then the offsets of the shards, and the
    length of the text, the number of shards and the place of the offsets in the last 24 bytes

A window takes one shard, at most two, out of the file; the last ones used are kept. Of many ranks
each opens the shards of its own windows alone. zlib, not lzma: on the pages of Python's manual a
shard takes 0.25 ms to open instead of 1.4, for files that are 8 % larger (0.30 of the text).
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from qll.bytelm.stored_text import StoredText
from qll.errors import IntegrityError

MAGIC = b"QLLZ\n"  # a packed text that is not compressed begins with byte 0
SHARD = 1 << 16  # bytes of text
KEPT = 64  # shards in memory
FOOTER = struct.Struct("<QQQ")


def compressed(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The compressed file of the text that `pieces` are parts of.

    >>> found = b"".join(compressed([b"ab" * 100_000]))
    >>> found[:5], len(found) < 2000
    (b'QLLZ\\n', True)
    """
    yield MAGIC
    offsets, length = [len(MAGIC)], 0
    for shard in _cut(pieces):
        packed = zlib.compress(shard, 9)
        offsets.append(offsets[-1] + len(packed))
        length += len(shard)
        yield packed
    yield np.array(offsets, dtype="<i8").tobytes()
    yield FOOTER.pack(length, len(offsets) - 1, offsets[-1])


def is_compressed(path: Path) -> bool:
    """Whether a file begins like one of these; False for one that cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


class CompressedText(StoredText):
    """The packed text in a compressed file.

    >>> import tempfile; path = Path(tempfile.mkdtemp()) / "packed"
    >>> _ = path.write_bytes(b"".join(compressed([b"some ", b"text"])))
    >>> text = CompressedText(path); len(text), text.gather(np.array([3]), 4).tobytes()
    (9, b'e te')
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            with open(path, "rb") as file:
                self.length, self.offsets = self._index(file)
        except (OSError, ValueError, struct.error) as error:
            raise self._damaged(error) from None
        self.shard = lru_cache(maxsize=KEPT)(self._shard)

    def __len__(self) -> int:
        """Bytes of it, boundaries included."""
        return self.length

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """uint8[len(starts), length]: the bytes from each of `starts` on.

        Raises IntegrityError for a damaged shard.
        """
        return np.stack([self.read(start, start + length) for start in starts.tolist()])

    def read(self, start: int, stop: int) -> np.ndarray:
        """uint8[stop - start]: those bytes of it."""
        first, last = start // SHARD, (stop - 1) // SHARD
        parts = [self.shard(number) for number in range(first, last + 1)]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return whole[start - first * SHARD : stop - first * SHARD]

    @staticmethod
    def _index(file: BinaryIO) -> tuple[int, list[int]]:
        """(bytes of the text, where its shards begin, and where the last one ends)."""
        size = file.seek(0, os.SEEK_END)
        file.seek(size - FOOTER.size)
        length, count, place = FOOTER.unpack(file.read())
        if place + 8 * (count + 1) + FOOTER.size != size or count != -(-length // SHARD):
            raise ValueError(f"{count} shards of {length} bytes in {size} bytes")
        file.seek(place)
        offsets = np.frombuffer(file.read(8 * (count + 1)), dtype="<i8").tolist()
        if offsets != sorted(offsets) or (offsets[0], offsets[-1]) != (len(MAGIC), place):
            raise ValueError("offsets that do not fit")
        return length, offsets

    def _shard(self, number: int) -> np.ndarray:
        start, stop = self.offsets[number : number + 2]
        expected = min(SHARD, self.length - number * SHARD)
        try:
            # opened for every shard: what is read of a mapped file would count as memory in use
            with open(self.path, "rb") as file:
                file.seek(start)
                packed = file.read(stop - start)
            # no more than there should be: a damaged file cannot fill the memory
            text = zlib.decompressobj().decompress(packed, expected + 1)
        except (OSError, zlib.error) as error:
            raise self._damaged(error) from None
        if len(text) != expected:
            raise self._damaged(f"{len(text)} bytes in shard {number} instead of {expected}")
        return np.frombuffer(text, dtype=np.uint8)

    def _damaged(self, found: object) -> IntegrityError:
        return IntegrityError(
            "compressed text cannot be read",
            where=self.path,
            found=found,
            hint="delete the folder data of the run and start again",
        )


def _cut(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of SHARD, but for the last."""
    rest = bytearray()
    for piece in pieces:
        rest += piece
        whole = len(rest) // SHARD * SHARD
        for start in range(0, whole, SHARD):
            yield bytes(rest[start : start + SHARD])
        del rest[:whole]
    if rest:
        yield bytes(rest)
