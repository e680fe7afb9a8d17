"""Recurrent memory: a few vectors that are read and rewritten at the end of every segment.

After each segment the memory vectors pass through the blocks like bytes: every block sees them
after the segment, so they read it, and later bytes see them, so they are read. What comes out is
the memory of the next segment (Bulatov et al. 2022, Recurrent Memory Transformer, with one set of
tokens for reading and writing). What was in the first segment so reaches any later one, however
short the window.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qll.bytelm.config import ModelConfig
from qll.bytelm.initial import STD
from qll.bytelm.linears import norm


class RecurrentMemory(nn.Module):
    """The memory before the first segment, and how the blocks' output becomes the next one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tokens, self.segment = config.memory.memory_tokens, config.segment
        self.start = nn.Parameter(torch.randn(self.tokens, config.d_model) * STD)
        self.norm = norm(config, config.d_model)
        self.keep = nn.Parameter(torch.zeros(config.d_model // 2))

    def initial(
        self, like: Float[Tensor, "batch d_model"]
    ) -> Float[Tensor, "batch tokens d_model"]:
        """The memory before the first byte; `like` gives the batch."""
        return self.start.to(like).expand(len(like), -1, -1)

    def update(
        self,
        memory: Float[Tensor, "batch tokens d_model"],
        output: Float[Tensor, "batch tokens d_model"],
    ) -> Float[Tensor, "batch tokens d_model"]:
        """A mixture of the old memory and the blocks' output, pair by pair.

        A pair of channels shares its weight, so that a complex stream keeps its phases.
        """
        keep = self.keep.sigmoid().repeat_interleave(2).to(memory)
        return keep * memory + (1 - keep) * self.norm(output)

    def places_before(self, position: int) -> int:
        """Places that memory has taken in the blocks' sequence before byte `position`."""
        return self.tokens * (position // self.segment)

    def until_write(self, position: int) -> int:
        """Bytes that may be read from `position` on before the memory must be written."""
        return self.segment - position % self.segment
