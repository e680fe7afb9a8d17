"""Packed bytes that are read at random places, however they are stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np

from qll.bytelm.config import VOCAB
from qll.bytelm.languages import Spans


class StoredText(ABC):
    """What windows are read from: packed.PackedText and compressed.CompressedText."""

    def __init__(self, path: Path) -> None:
        self.path, self.languages = path, Spans.read(path)

    @abstractmethod
    def __len__(self) -> int:
        """Bytes of it, boundaries included."""

    @abstractmethod
    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """uint8[len(starts), length]: the bytes from each of `starts` on."""

    def ids(self, starts: np.ndarray, length: int) -> np.ndarray:
        """[len(starts), length]: the same as ids; uint16 when documents are in languages."""
        found = self.gather(starts, length)
        if self.languages is None:
            return found
        return found + VOCAB * self.languages.at(starts[:, None] + np.arange(length))

    def character_starts(self, starts: np.ndarray) -> np.ndarray:
        """Each of `starts`, moved forward to the beginning of a UTF-8 character (0 to 3 bytes)."""
        following = self.gather(starts, 4)
        return starts + ((following & 0xC0) != 0x80).argmax(axis=1)
