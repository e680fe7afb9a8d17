"""Windows of texts that are too long to pack first, or come over the network, mixed by weight.

Each text is read once per epoch, its documents one after the other, cut into windows that follow
one another and begin with a character. A buffer shuffles them. The whole state (documents read, the
rest of the last one, the buffer, the random numbers) fits in a few megabytes and resumes exactly.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from qll.bytelm.corpus import Part, endless, local_parts, named_parts
from qll.bytelm.dataset import next_counts, shares
from qll.bytelm.documents import CONTINUATION
from qll.bytelm.evaluate import BOUNDARY
from qll.errors import IntegrityError


class WindowStream:
    """The windows of one part, in order, for ever: seq_length bytes and the byte after them.

    After `limit` windows it begins again, if that is given.
    """

    def __init__(self, part: Part, seq_length: int, limit: int | None = None) -> None:
        self.part, self.seq_length, self.limit = part, seq_length, limit
        self.given = 0
        self.documents_read, self.rest = 0, b""
        self.pieces: Iterator[bytes] | None = None
        self.pieces_read = 0

    def next(self) -> bytes:
        """The next window; the one after it begins where its inputs end."""
        if self.given == self.limit:
            self.begin_again()
        self.given += 1
        length = self.seq_length
        while len(self.rest) < length + 1:
            self.rest += self._piece()
        window = self.rest[: length + 1]
        # one byte more than the inputs must stay, and the next window begins with a character
        cut = length
        while self.rest[cut] in CONTINUATION and cut > length - 3:
            cut -= 1
        self.rest = self.rest[cut:]
        return window

    def state(self) -> dict[str, Any]:
        """Where it is, as JSON."""
        return {
            "given": self.given,
            "documents": self.documents_read,
            "pieces": self.pieces_read,
            "rest": base64.b64encode(self.rest).decode(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self.documents_read, self.rest = state["documents"], base64.b64decode(state["rest"])
        self.pieces_read, self.pieces = state["pieces"], None
        self.given = state["given"]

    def begin_again(self) -> None:
        """Go back to the first window."""
        self.given = self.documents_read = self.pieces_read = 0
        self.rest, self.pieces = b"", None

    def _piece(self) -> bytes:
        """More bytes: of the document at hand, or the boundary and the beginning of the next."""
        if self.pieces is None:
            self.documents = endless(self.part, self.documents_read)
            self.pieces = self._document()
            for _ in range(self.pieces_read):
                next(self.pieces)
        piece = next(self.pieces, None)
        while piece is None:
            self.documents_read, self.pieces_read = self.documents_read + 1, 0
            self.pieces = self._document()
            piece = next(self.pieces, None)
        self.pieces_read += 1
        return piece

    def _document(self) -> Iterator[bytes]:
        yield bytes([BOUNDARY])
        yield from next(self.documents).pieces()


class ScalableStreamingDataset:
    """Shuffled windows of several streams mixed by weight: inputs int64[seq_length] and targets.

    `dataset_configs` are dicts with "name" (a data set of the registry) or "path" (a local file or
    folder), and "weight". The buffer holds `buffer_size` windows, or as many as `memory_limit_gb`
    allows. Of `world` ranks each takes every `world`-th window. After `max_samples` windows it ends
    when iterated; without, it never does. A text begins again after `max_per_text` of its windows.

    >>> import tempfile; path = Path(tempfile.mkdtemp()) / "text"
    >>> _ = path.write_bytes(b"ab" * 400)
    >>> configs = [{"path": path, "weight": 1.0}]
    >>> dataset = ScalableStreamingDataset(configs, seq_length=8, max_samples=3, buffer_size=4)
    >>> [inputs.shape[0] for inputs, targets in dataset]
    [8, 8, 8]
    """

    def __init__(
        self,
        dataset_configs: Sequence[Mapping[str, Any]] | Sequence[Part],
        seq_length: int,
        max_samples: int | None = None,
        buffer_size: int = 10_000,
        memory_limit_gb: float = 8.0,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        max_per_text: int | None = None,
    ) -> None:
        parts = [part for config in dataset_configs for part in parts_of(config)]
        self.streams = [WindowStream(part, seq_length, max_per_text) for part in parts]
        self.shares = shares([part.weight for part in parts], len(parts))
        self.seq_length, self.max_samples = seq_length, max_samples
        most = int(memory_limit_gb * 2**30) // (seq_length + 1)
        self.buffer = np.empty((max(1, min(buffer_size, most)), seq_length + 1), dtype=np.uint8)
        self.rank, self.world = rank, world
        self.seed = seed
        self.reset()

    def reset(self) -> None:
        """Begin again with the first window."""
        for stream in self.streams:
            stream.begin_again()
        self.filled, self.drawn = 0, np.zeros(len(self.streams), dtype=np.int64)
        self.random = np.random.Generator(np.random.PCG64(self.seed))

    def __iter__(self) -> Iterator[tuple[Int[Tensor, " seq"], Int[Tensor, " seq"]]]:
        """Windows one by one."""
        given = 0
        while self.max_samples is None or given < self.max_samples:
            window = torch.from_numpy(self.next().astype(np.int64))
            given += 1
            yield window[:-1], window[1:]

    def next(self) -> np.ndarray:
        """uint8[seq_length + 1]: a random window of the buffer, whose place a new one takes."""
        while self.filled < len(self.buffer):
            self.buffer[self.filled] = self._mine()
            self.filled += 1
        place = int(self.random.integers(len(self.buffer)))
        window = self.buffer[place].copy()
        self.buffer[place] = self._mine()
        return window

    def state(self) -> dict[str, Any]:
        """Where it is: JSON, but for the buffer, a uint8 tensor."""
        return {
            "drawn": self.drawn.tolist(),
            "streams": [stream.state() for stream in self.streams],
            "random": self.random.bit_generator.state,
            "buffer": torch.from_numpy(self.buffer[: self.filled].copy()),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; raises IntegrityError when it is of other texts or windows."""
        rows, width = state.get("buffer", torch.empty(0, 0)), self.buffer.shape[1]
        fits = rows.shape[1:] == (width,) and len(rows) <= len(self.buffer)
        if len(state.get("streams", ())) != len(self.streams) or not fits:
            raise IntegrityError("the position in the data is of other texts", where="checkpoint")
        self.filled = len(rows)
        self.buffer[: self.filled] = rows.cpu().numpy()
        self.drawn = np.array(state["drawn"], dtype=np.int64)
        self.random.bit_generator.state = state["random"]
        for stream, item in zip(self.streams, state["streams"], strict=True):
            stream.restore(item)

    def _mine(self) -> np.ndarray:
        """The next window that is this rank's; those of the others are read and dropped."""
        while True:
            number = int(self.drawn.sum())
            source = int(next_counts(self.drawn, 1, self.shares).argmax())
            self.drawn[source] += 1
            window = self.streams[source].next()
            if number % self.world == self.rank:
                return np.frombuffer(window, dtype=np.uint8)


class StreamLoader:
    """Batches of a stream: int64[batch_size, seq_length] inputs and targets, on `device`."""

    def __init__(
        self, dataset: ScalableStreamingDataset, batch_size: int, device: torch.device | str = "cpu"
    ) -> None:
        self.dataset, self.batch_size, self.device = dataset, batch_size, torch.device(device)
        self.rows = np.empty((batch_size, dataset.seq_length + 1), dtype=np.uint8)

    def next(self) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
        """The next batch; there is always one."""
        for row in range(self.batch_size):
            self.rows[row] = self.dataset.next()
        rows = torch.from_numpy(self.rows).to(self.device, torch.long)
        return rows[:, :-1], rows[:, 1:]

    def state(self) -> dict[str, Any]:
        """Where it is: JSON, but for the buffer, a uint8 tensor."""
        return self.dataset.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; raises IntegrityError when it is of other texts or windows."""
        self.dataset.restore(state)


def parts_of(config: Mapping[str, Any] | Part) -> list[Part]:
    """The parts of one item of `dataset_configs`, with its weight.

    >>> [part.name for part in parts_of({"name": "wikitext2", "weight": 0.4})]
    ['wikitext2']
    """
    if isinstance(config, Part):
        return [config]
    weight = float(config.get("weight", 1.0))
    if "path" in config:
        return local_parts([Path(config["path"])], [weight], config.get("pattern", "*"))
    return [
        Part(part.name, part.weight * weight, part.training, part.held_out, part.facts)
        for part in named_parts(config["name"], streaming=True)
    ]
