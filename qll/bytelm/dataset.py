"""Windows of packed texts in a shuffled order that is known without being stored, and batches.

An epoch reads every window once. Windows follow one another from a random first byte, another one
in every epoch (of as many as a window has bytes), and begin with a character. Any number of texts
are mixed by weight: after n windows each has given its share of n, to within one. Where a run is,
is a few counts, so it resumes exactly; every rank of many takes its own part of every batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from qll.bytelm.config import VOCAB
from qll.bytelm.packed import open_text
from qll.bytelm.permutation import mixed, permuted
from qll.errors import IntegrityError, TextError, UsageError

ALIGNMENT = 3  # bytes a window may move to begin with a character


class MemoryEfficientByteDataset:
    """Windows of one packed text: inputs int64[seq_length] and their next bytes.

    Raises TextError for a text of less than two windows.

    >>> import tempfile; from qll.bytelm.packed import Document, pack
    >>> path = pack([Document("a", b"abcdefghijkl")], Path(tempfile.mkdtemp()) / "packed")
    >>> windows = MemoryEfficientByteDataset(path, seq_length=2)
    >>> inputs, targets = windows[0]
    >>> len(windows), inputs.shape, (targets[0] == inputs[1]).item()
    (4, torch.Size([2]), True)
    """

    def __init__(self, path: Path, seq_length: int, seed: int = 0) -> None:
        self.text, self.seq_length, self.seed = open_text(path), seq_length, seed
        self.count = require_windows(path.name, len(self.text), seq_length)

    def __len__(self) -> int:
        """Windows of an epoch."""
        return self.count

    def __getitem__(self, draw: int) -> tuple[Int[Tensor, " seq"], Int[Tensor, " seq"]]:
        """Window number `draw` of the shuffled order; from len(self) on, of the next epochs."""
        if draw < 0:
            raise IndexError(draw)
        window = torch.from_numpy(self.gather(np.array([draw]))[0].astype(np.int64))
        return window[:-1], window[1:] % VOCAB

    def starts(self, draws: np.ndarray) -> np.ndarray:
        """First byte of each window of `draws` (int64)."""
        epochs, places = np.divmod(draws, self.count)
        found = np.empty_like(draws)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            turn = np.array([epoch % self.seq_length])
            first = permuted(turn, self.seq_length, mixed(self.seed))[0]
            order = permuted(places[chosen], self.count, mixed(self.seed, int(epoch)))
            found[chosen] = first + order * self.seq_length
        return self.text.character_starts(found)

    def gather(self, draws: np.ndarray) -> np.ndarray:
        """[len(draws), seq_length + 1]: the ids of the windows and of the byte after each.

        uint8, or uint16 when documents are in languages.
        """
        return self.text.ids(self.starts(draws), self.seq_length + 1)


class BatchLoader:
    """Batches mixed from several texts by weight; `rank` of `world` gets its rows of each.

    `next()` gives int64[batch_size, seq_length] ids and targets, on `device`; the batch of all
    ranks together has world * batch_size rows.

    >>> import tempfile; from qll.bytelm.packed import Document, pack
    >>> path = pack([Document("a", b"abcdefghijkl")], Path(tempfile.mkdtemp()) / "packed")
    >>> loader = BatchLoader([MemoryEfficientByteDataset(path, 2)], batch_size=3)
    >>> inputs, targets = loader.next()
    >>> inputs.shape, bool((inputs[:, 1:] == targets[:, :-1]).all()), loader.state()
    (torch.Size([3, 2]), True, {'drawn': [3]})
    """

    def __init__(
        self,
        datasets: Sequence[MemoryEfficientByteDataset],
        batch_size: int,
        weights: Sequence[float] | None = None,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.datasets, self.batch_size = list(datasets), batch_size
        self.rank, self.world, self.device = rank, world, torch.device(device)
        sizes = [float(len(dataset)) for dataset in datasets]
        self.shares = shares(sizes if weights is None else weights, len(datasets))
        self.drawn = np.zeros(len(datasets), dtype=np.int64)
        # what had been drawn when the shares were set, less what was then owed
        self.base = np.zeros(len(datasets))
        self.weighed = False
        self.tagged = any(dataset.text.languages is not None for dataset in datasets)
        kind = np.int32 if self.tagged else np.uint8
        self.rows = np.empty((batch_size, datasets[0].seq_length + 1), dtype=kind)

    def next(self) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
        """The next batch; there is always one, in ever new epochs."""
        before, total = self.drawn.copy(), self.world * self.batch_size
        self.drawn += next_counts(before - self.base, total, self.shares)
        mine = range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        done = first = 0
        for dataset, start, stop in zip(self.datasets, before, self.drawn, strict=True):
            low, high = max(first, mine.start), min(first + stop - start, mine.stop)
            if low < high:
                draws = np.arange(start + low - first, start + high - first)
                self.rows[done : done + len(draws)] = dataset.gather(draws)
                done += len(draws)
            first += stop - start
        rows = torch.from_numpy(self.rows).to(self.device, torch.long)
        targets = rows[:, 1:] % VOCAB if self.tagged else rows[:, 1:]
        return rows[:, :-1], targets

    def weigh(self, weights: Sequence[float]) -> None:
        """Draw by other weights from now on; what texts are owed by the old ones they still get."""
        since = self.drawn - self.base
        self.base = self.drawn + since.sum() * self.shares - since
        self.shares, self.weighed = shares(weights, len(self.datasets)), True

    def state(self) -> dict[str, Any]:
        """Where it is, as JSON."""
        found = {"drawn": self.drawn.tolist()}
        if self.weighed:
            found |= {"shares": self.shares.tolist(), "base": self.base.tolist()}
        return found

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`; raises IntegrityError when it is of other texts."""
        drawn = state.get("drawn")
        if not isinstance(drawn, list) or len(drawn) != len(self.datasets):
            raise IntegrityError(
                "the position in the data is of other texts",
                where="the checkpoint",
                expected=f"{len(self.datasets)} counts",
                found=str(drawn),
            )
        self.drawn = np.array(drawn, dtype=np.int64)
        if "shares" in state:
            self.shares, self.base = np.array(state["shares"]), np.array(state["base"])
            self.weighed = True


def require_windows(name: str, size: int, seq_length: int) -> int:
    """Windows of an epoch of `size` packed bytes; raises TextError when there is none.

    Whatever byte an epoch starts with, and however its windows move, all of them fit.

    >>> require_windows("text", 1000, 100)
    8
    """
    count = (size - 1 - ALIGNMENT) // seq_length - 1
    if count < 1:
        raise TextError(
            "too short to train on",
            where=name,
            expected=f"at least {2 * seq_length + 1 + ALIGNMENT} bytes",
            found=size,
            hint="give a longer text, or a shorter --seq_length",
        )
    return count


def shares(weights: Sequence[float], count: int) -> np.ndarray:
    """`weights` divided by their sum; raises UsageError unless they are `count` positive numbers.

    >>> shares([1.0, 3.0], 2).tolist()
    [0.25, 0.75]
    """
    if len(weights) != count or not all(0 < weight < float("inf") for weight in weights):
        raise UsageError(
            "not one weight per text",
            where="--data_weights",
            expected=f"{count} positive numbers",
            found=" ".join(map(str, weights)),
        )
    return np.array(weights, dtype=np.float64) / sum(weights)


def next_counts(drawn: np.ndarray, total: int, shares: np.ndarray) -> np.ndarray:
    """How many of the next `total` windows each text gives, so that none is off its share by 1.

    The whole parts of what it owes, then one each of those that owe most.

    >>> next_counts(np.array([0, 0]), 3, np.array([0.5, 0.5])).tolist()
    [2, 1]
    """
    owed = (drawn.sum() + total) * shares - drawn
    due = np.maximum(np.floor(owed), 0).astype(np.int64)
    while (missing := total - due.sum()) > 0:
        due[np.argsort(due - owed, kind="stable")[:missing]] += 1
    while due.sum() > total:
        due[np.argmax(np.where(due > 0, due - owed, -np.inf))] -= 1
    return due
