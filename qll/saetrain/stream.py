"""Activations of a model on windows of text, a buffer at a time, at several places in one pass.

A buffer holds the ordinary tokens of some windows drawn from everywhere in the texts; training
shuffles it and uses it up before the next one is made. So memory is bounded, and a run that was
stopped between two buffers continues without any activation having been saved.

Special tokens and attention sinks are left out, at every place if they are one at any: a handful of
them would hold most of the variance.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from qll.errors import TextError
from qll.lens.hooks import capture, width_at
from qll.lens.tokens import ORDINARY, token_kinds
from qll.train.precision import autocast

# Bytes of a buffer at most, and tokens that go through the model at once
BUFFER_BYTES = 512 << 20
FORWARD_TOKENS = 2048


@dataclass(frozen=True)
class Buffer:
    """Activations of the ordinary tokens of some windows, by place, in float32."""

    number: int
    """How many buffers came before it."""
    values: dict[str, Float[Tensor, "tokens _"]]
    read: int
    """Tokens of text read until its end, special ones and sinks included."""

    def __len__(self) -> int:
        """Ordinary tokens in it."""
        return len(next(iter(self.values.values())))


@dataclass(frozen=True)
class Stream:
    """The activations of `model` at `places` on `tokens` tokens drawn from `windows`."""

    model: PreTrainedModel
    windows: Int[Tensor, "windows context"]
    places: Sequence[str]
    tokens: int
    buffer_tokens: int
    special: Collection[int] = ()
    precision: torch.dtype = torch.float32
    seed: int = 0

    @property
    def count(self) -> int:
        """Windows to read in all."""
        return max(1, self.tokens // self.windows.shape[1])

    @property
    def per_buffer(self) -> int:
        """Windows of a buffer: as asked for, or as many as memory allows."""
        width = sum(width_at(self.model, place) for place in self.places)
        most = BUFFER_BYTES // (4 * width)
        return max(1, min(self.buffer_tokens, most) // self.windows.shape[1])

    def order(self) -> Int[Tensor, " count"]:
        """Numbers of the windows in the order they are read: all of them once, then all again."""
        passes = -(-self.count // len(self.windows))
        generator = torch.Generator().manual_seed(self.seed)
        orders = [torch.randperm(len(self.windows), generator=generator) for _ in range(passes)]
        return torch.cat(orders)[: self.count]

    def buffers(self, first: int = 0) -> Iterator[Buffer]:
        """Buffers from number `first` on; raises TextError for one without an ordinary token."""
        parts, context = self.order().split(self.per_buffer), self.windows.shape[1]
        for number, part in list(enumerate(parts))[first:]:
            read = min((number + 1) * self.per_buffer, self.count) * context
            yield Buffer(number, self._filled(part), read)

    def _filled(self, numbers: Tensor) -> dict[str, Tensor]:
        """Activations of the ordinary tokens of the windows `numbers`."""
        step = max(1, FORWARD_TOKENS // self.windows.shape[1])
        filled: dict[str, Tensor] = {}
        used, most = 0, self.windows[numbers].numel()
        for part in numbers.split(step):
            found = self._ordinary(self.windows[part])
            for name, values in found.items():
                if name not in filled:
                    filled[name] = values.new_empty(most, values.shape[1])
                filled[name][used : used + len(values)] = values
            used += len(next(iter(found.values())))
        if not used:
            raise TextError(
                "no ordinary token to train an autoencoder on",
                hint="give a longer text, or fewer special tokens",
            )
        return {name: values[:used] for name, values in filled.items()}

    def _ordinary(self, ids: Tensor) -> dict[str, Tensor]:
        with autocast(self.precision, self.model.device):
            seen = capture(self.model, ids, self.places)
        seen = {name: values.float() for name, values in seen.items()}
        kept = torch.ones(ids.shape, dtype=torch.bool)
        for values in seen.values():
            for row, (window, vectors) in enumerate(zip(ids, values, strict=True)):
                kept[row] &= token_kinds(window, vectors, self.special) == ORDINARY
        return {name: values[kept.to(values.device)] for name, values in seen.items()}
