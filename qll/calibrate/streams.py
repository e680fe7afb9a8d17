"""The residual stream between blocks: in memory when small, memory-mapped files when large.

A stream is one tensor [windows, context, d_model], float32 in memory and in files float32 or, for
a model that computes in it, bfloat16 (half the disk). Files survive a kill: a stream that was
committed is listed in `streams/journal.jsonl` and read back instead of being computed again.
Streams in memory are simply computed again, with the same result.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qll import store

logger = logging.getLogger("qll.calibrate")

# All streams of a run together stay in memory up to this many bytes.
MEMORY_LIMIT = 2 << 30
STREAMS_NAME = "streams"
JOURNAL_NAME = "journal.jsonl"


class Streams:
    """Named tensors of one `shape`; at most `count` of them exist at a time; files in `dtype`.

    >>> import tempfile; streams = Streams(Path(tempfile.mkdtemp()), (1, 2, 3), count=2)
    >>> streams.create("hidden.0").fill_(1).sum().item(), streams.find("hidden.0") is None
    (6.0, True)
    >>> streams.commit("hidden.0"); streams.find("hidden.0").shape
    torch.Size([1, 2, 3])
    """

    def __init__(
        self,
        folder: Path,
        shape: tuple[int, int, int],
        count: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.folder, self.shape = folder / STREAMS_NAME, shape
        self.on_disk, self.nbytes = stored_bytes(shape, count, dtype)
        self._dtype = dtype if self.on_disk else torch.float32
        self._open: dict[str, Tensor] = {}
        self._files: dict[str, np.memmap] = {}
        self._committed: set[str] = set()
        if self.on_disk:
            self._reopen()
        place = f"memory-mapped files in {self.folder}" if self.on_disk else "memory"
        logger.info("activations between blocks: %.2f GB in %s", self.nbytes / 1e9, place)

    def create(self, name: str) -> Float[Tensor, "windows context d_model"]:
        """A new tensor to be filled and then committed."""
        if not self.on_disk:
            self._open[name] = torch.empty(self.shape)
        else:
            self._open[name] = self._map(name, "w+")
        return self._open[name]

    def commit(self, name: str) -> None:
        """Declare `name` complete; a file is on disk when this returns."""
        if self.on_disk:
            self._files[name].flush()
            store.append_line(self.folder / JOURNAL_NAME, {"committed": name})
        self._committed.add(name)

    def find(self, name: str) -> Float[Tensor, "windows context d_model"] | None:
        """The committed stream `name`, or None."""
        if name not in self._committed:
            return None
        if name not in self._open:
            self._open[name] = self._map(name, "r+")
        return self._open[name]

    def drop(self, name: str) -> None:
        """Free the memory or the file of `name`; absent is fine."""
        if self.on_disk and name in self._committed:
            store.append_line(self.folder / JOURNAL_NAME, {"dropped": name})
            store.remove(self._path(name))
        self._committed.discard(name)
        self._open.pop(name, None)
        self._files.pop(name, None)

    def clear(self) -> None:
        """Free every stream, so that all are computed again."""
        for name in [*self._committed]:
            self.drop(name)

    def close(self) -> None:
        """Free everything and remove the folder."""
        self.clear()
        self._open.clear()
        self._files.clear()
        store.remove(self.folder)

    def _reopen(self) -> None:
        store.make_folder(self.folder)
        for line in store.read_lines(self.folder / JOURNAL_NAME):
            self._committed.discard(line.get("dropped", ""))
            if "committed" in line:
                self._committed.add(line["committed"])
        size = self._dtype.itemsize * math.prod(self.shape)
        self._committed = {
            name
            for name in self._committed
            if self._path(name).is_file() and self._path(name).stat().st_size == size
        }
        store.require_space(self.folder, self.nbytes - size * len(self._committed))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.{str(self._dtype).removeprefix('torch.')}"

    def _map(self, name: str, mode: str) -> Tensor:
        # numpy has no bfloat16: its bits are mapped as integers
        kind = np.float32 if self._dtype == torch.float32 else np.int16
        self._files[name] = np.memmap(self._path(name), kind, mode, shape=self.shape)
        return torch.from_numpy(self._files[name]).view(self._dtype)


def stored_bytes(
    shape: tuple[int, int, int], count: int, dtype: torch.dtype = torch.float32
) -> tuple[bool, int]:
    """(whether `count` streams lie in files, the bytes they take there or in memory).

    >>> stored_bytes((1, 2, 3), 2)
    (False, 48)
    """
    numbers = math.prod(shape) * count
    on_disk = 4 * numbers > MEMORY_LIMIT
    return on_disk, numbers * (dtype.itemsize if on_disk else 4)
