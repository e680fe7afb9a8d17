"""The corpus of the byte-model tables: the markdown files of Debian's package `anarchism`.

    apt-get download anarchism

130 documents in the order of their names; the first and every tenth after it are held out. They are
unpacked once into two folders that `lm train --data` and `--validation` read.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qll import store

HELD_OUT = 10


@dataclass(frozen=True)
class Corpus:
    """Two folders of documents, and texts of another kind to transfer to."""

    training: Path
    held_out: Path
    transfer: Path | None

    @cached_property
    def held_out_documents(self) -> list[bytes]:
        """The documents that no model trains on."""
        return [path.read_bytes() for path in sorted(self.held_out.iterdir())]

    def sample(self, size: int) -> list[bytes]:
        """The beginnings of the held-out documents, `size` bytes in all at most."""
        each = size // len(self.held_out_documents)
        return [document[:each] for document in self.held_out_documents]

    def facts(self) -> dict[str, Any]:
        """Hashes and sizes, for the result file."""
        found = {name: _facts(getattr(self, name)) for name in ("training", "held_out")}
        if self.transfer is not None:
            found["transfer"] = {"name": self.transfer.name, **_facts(self.transfer)}
        return found


def unpack(package: Path, folder: Path, transfer: Path | None = None) -> Corpus:
    """The corpus of the .deb file `package`, unpacked into `folder` unless it is there."""
    corpus = Corpus(folder / "training", folder / "held_out", transfer)
    done = folder / "unpacked"
    if not done.exists():
        with tempfile.TemporaryDirectory() as temporary:
            subprocess.run(["dpkg", "-x", str(package), temporary], check=True)
            files = sorted(Path(temporary).rglob("*.md.gz"), key=lambda path: path.name)
            for number, path in enumerate(files):
                place = corpus.training if number % HELD_OUT else corpus.held_out
                store.write_bytes(place / path.stem, gzip.decompress(path.read_bytes()))
        store.write_text(done, package.name + "\n")
    return corpus


def compressors(corpus: Corpus) -> dict[str, float]:
    """Bits per byte of the held-out documents, joined, by name of the compressor.

    `xz after training text` is what the held-out documents add to the compressed training text.
    """
    held = b"".join(corpus.held_out_documents)
    trained = b"".join(path.read_bytes() for path in sorted(corpus.training.iterdir()))
    # a dictionary as long as both texts, so that all of the prefix can be referred to
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 26}]
    both = len(lzma.compress(trained + held, filters=filters))
    sizes = {
        "bz2": len(bz2.compress(held)),
        "xz": len(lzma.compress(held, preset=9 | lzma.PRESET_EXTREME)),
        "xz after training text": both - len(lzma.compress(trained, filters=filters)),
    }
    return {name: 8 * size / len(held) for name, size in sizes.items()}


def _facts(path: Path) -> dict[str, Any]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    digest, size = hashlib.sha256(), 0
    for file in files:
        data = file.read_bytes()
        digest.update(data)
        size += len(data)
    return {"documents": len(files), "bytes": size, "sha256": digest.hexdigest()}
