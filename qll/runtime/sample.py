"""Which token comes next: the likeliest, or a draw from what temperature and top_p leave.

The same distributions as transformers': logits over the temperature, then the smallest set of
tokens whose probability reaches top_p.

>>> greedy(torch.tensor([[0.0, 2.0, 1.0]])).tolist()
[1]
>>> Sampling(1.0, top_p=0.5).distribution(torch.tensor([[0.0, 5.0]])).tolist()
[[0.0, 1.0]]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


def greedy(logits: Float[Tensor, "batch vocab"]) -> Int[Tensor, " batch"]:
    """The likeliest token of each row."""
    return logits.argmax(-1)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is random."""
        return self.temperature == 0

    def generator(self, device: torch.device) -> torch.Generator | None:
        """A generator with the seed, where something is random."""
        return None if self.is_greedy else torch.Generator(device).manual_seed(self.seed)

    def distribution(self, logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
        """Probabilities that a token is drawn with; greedy puts all on one."""
        if self.is_greedy:
            chosen = logits.argmax(-1, keepdim=True)
            return torch.zeros_like(logits, dtype=torch.float32).scatter(-1, chosen, 1.0)
        shares = (logits.float() / self.temperature).softmax(-1)
        if self.top_p >= 1:
            return shares
        ordered, order = shares.sort(dim=-1, stable=True)
        # from the least probable on, those whose sum stays out of top_p go
        gone = ordered.cumsum(-1) <= 1 - self.top_p
        gone[..., -1] = False
        kept = ordered.masked_fill(gone, 0.0)
        return torch.zeros_like(kept).scatter(-1, order, kept / kept.sum(-1, keepdim=True))

    def choose(
        self, logits: Float[Tensor, "batch vocab"], draw: torch.Generator | None
    ) -> Int[Tensor, " batch"]:
        """A token for each row."""
        if draw is None:
            return greedy(logits)
        return torch.multinomial(self.distribution(logits), 1, generator=draw)[:, 0]
