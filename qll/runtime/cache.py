"""Keys and values of all blocks, in memory of fixed size: nothing is copied as a text grows.

>>> cache = Cache.empty([(2, 4, 3)], batch=1, length=8, dtype=torch.float32, device="cpu")
>>> cache.keys[0].shape, cache.values[0].shape, cache.filled
(torch.Size([1, 2, 8, 4]), torch.Size([1, 2, 8, 3]), 0)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qll.errors import UsageError


@dataclass
class Cache:
    """Per block keys [batch, kv_heads, length, d_key] and values [.., d_value]; `filled` places
    are in use, the same number in every row of the batch."""

    keys: list[Tensor]
    values: list[Tensor]
    filled: int = 0

    @classmethod
    def empty(
        cls,
        sizes: Sequence[tuple[int, int, int]],
        batch: int,
        length: int,
        dtype: torch.dtype,
        device: str | torch.device,
    ) -> Cache:
        """A cache of zeros; sizes: (kv_heads, d_key, d_value) of every block."""
        shared = {"dtype": dtype, "device": device}
        return cls(
            [torch.zeros(batch, heads, length, d_key, **shared) for heads, d_key, _ in sizes],
            [torch.zeros(batch, heads, length, d_value, **shared) for heads, _, d_value in sizes],
        )

    @property
    def length(self) -> int:
        """Places there are."""
        return self.keys[0].shape[2]

    @property
    def batch(self) -> int:
        """Texts that grow together."""
        return self.keys[0].shape[0]

    def require_room(self, tokens: int) -> None:
        """Raise UsageError unless so many more tokens fit."""
        if self.filled + tokens > self.length:
            raise UsageError(
                "the key/value cache is full",
                expected=f"at most {self.length} tokens",
                found=self.filled + tokens,
                hint="make it longer, or shorten the text",
            )
