"""Weights of a stand-in: every tensor follows from its name, so any of them can be made again.

A matrix is a random bulk, a few dozen directions whose singular values fall as a power law from
well above the bulk, and, in some down projections, single super-weights. What writes to the
residual stream is scaled by 1 / sqrt(2 n_layers), so that activations stay of order one in depth.
Rows are made in pieces with a seed each, at the speed of the random numbers and in little memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import BFloat16, Float32
from torch import Tensor

ROWS = 2048  # of a piece; whole attention heads
SPIKES = 64
SPIKE_TOP = 6.0  # largest singular value over the edge of the bulk
SPIKE_DECAY = 0.5  # exponent of the power law
SUPER_WEIGHTS = 3
SUPER_SIZE = 60.0  # of a super-weight, in standard deviations of the bulk
EMBEDDING_STD = 0.02
WORKERS = 2


class Weights:
    """The tensors of a stand-in with `n_layers` blocks.

    >>> weights = Weights(n_layers=2)
    >>> one = weights.tensor("model.layers.0.mlp.up_proj.weight", (8, 4))
    >>> one.dtype, torch.equal(one, weights.tensor("model.layers.0.mlp.up_proj.weight", (8, 4)))
    (torch.bfloat16, True)
    """

    def __init__(self, n_layers: int, seed: int = 0) -> None:
        self.n_layers, self.seed = n_layers, seed

    def tensor(self, name: str, shape: tuple[int, ...]) -> BFloat16[Tensor, "..."]:
        """The whole tensor `name`, by its Hugging Face name and in its row order."""
        if len(shape) == 1:
            draw = self._generator(name, "gain")
            return (0.5 + 0.1 * torch.randn(shape, generator=draw)).bfloat16()
        whole = torch.empty(shape, dtype=torch.bfloat16)
        for start, piece in self.pieces(name, shape):
            whole[start : start + len(piece)] = piece
        return whole

    def pieces(
        self, name: str, shape: tuple[int, int]
    ) -> Iterator[tuple[int, BFloat16[Tensor, "rows columns"]]]:
        """(first row, rows) of the matrix `name` from top to bottom, two made at a time."""
        spikes, supers = self._spikes(name, shape), self._supers(name, shape)
        starts = range(0, shape[0], ROWS)

        def make(start: int) -> Tensor:
            piece = self._piece(name, shape, start, spikes)
            for row, column, value in supers:
                if start <= row < start + len(piece):
                    piece[row - start, column] = value
            return piece.bfloat16()

        with ThreadPoolExecutor(WORKERS) as pool:
            waiting = [pool.submit(make, start) for start in starts[:WORKERS]]
            for number, start in enumerate(starts):
                yield start, waiting.pop(0).result()
                if number + WORKERS < len(starts):
                    waiting.append(pool.submit(make, starts[number + WORKERS]))

    def scale(self, name: str, shape: tuple[int, int]) -> float:
        """Standard deviation of the bulk of a matrix."""
        if "embed_tokens" in name:
            return EMBEDDING_STD
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        return 1 / math.sqrt(shape[1] * (2 * self.n_layers if writes else 1))

    def _piece(
        self, name: str, shape: tuple[int, int], start: int, spikes: Tensor | None
    ) -> Float32[Tensor, "rows columns"]:
        draw = self._generator(name, start)
        rows = min(ROWS, shape[0] - start)
        piece = torch.randn(rows, shape[1], generator=draw).mul_(self.scale(name, shape))
        if spikes is None:
            return piece
        left = torch.randn(rows, len(spikes), generator=draw) / math.sqrt(shape[0])
        return piece.addmm_(left, spikes)

    def _spikes(
        self, name: str, shape: tuple[int, int]
    ) -> Float32[Tensor, "spikes columns"] | None:
        """Right singular directions times their values; None for tables of the vocabulary."""
        if not name.startswith("model.layers."):
            return None
        edge = self.scale(name, shape) * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
        count = min(SPIKES, min(shape) // 4)
        places = torch.arange(1, count + 1, dtype=torch.float32)
        values = SPIKE_TOP * edge * places**-SPIKE_DECAY
        draw = self._generator(name, "spikes")
        right = torch.randn(count, shape[1], generator=draw) / math.sqrt(shape[1])
        return values[:, None] * right

    def _supers(self, name: str, shape: tuple[int, int]) -> list[tuple[int, int, float]]:
        """(row, column, value) of the super-weights: in the down projections of early blocks."""
        first = min(1, self.n_layers - 1)
        if not name.startswith(f"model.layers.{first}.") or "down_proj" not in name:
            return []
        draw = self._generator(name, "super")
        rows = torch.randint(shape[0], (SUPER_WEIGHTS,), generator=draw).tolist()
        columns = torch.randint(shape[1], (SUPER_WEIGHTS,), generator=draw).tolist()
        value = SUPER_SIZE * self.scale(name, shape)
        return [(row, column, value) for row, column in zip(rows, columns, strict=True)]

    def _generator(self, name: str, part: object) -> torch.Generator:
        key = f"{self.seed}:{self.n_layers}:{name}:{part}".encode()
        return torch.Generator().manual_seed(int(hashlib.sha256(key).hexdigest()[:15], 16))
