"""Bootstrap intervals over documents: tokens of one text are not independent, texts are.

Source: Efron and Tibshirani 1993, percentile intervals; resampling whole documents.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

DRAWS = 1000
LEVEL = 0.95


def bootstrap(
    statistic: Callable[[Tensor], Tensor], documents: int, *, seed: int = 0, draws: int = DRAWS
) -> list[float] | None:
    """[low, high] of a statistic that holds for LEVEL of resampled sets of documents.

    statistic: from weights [draws, documents] (how often each document was drawn) to [draws].
    None for fewer than two documents.

    >>> values = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    >>> low, high = bootstrap(lambda weights: weights @ values / weights.sum(1), 4)
    >>> 1 <= low < 2.5 < high <= 4
    True
    """
    if documents < 2:
        return None
    found = statistic(weights(documents, draws, seed))
    edges = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    return torch.quantile(found[torch.isfinite(found)].double(), edges).tolist()


def weights(documents: int, draws: int, seed: int) -> Float[Tensor, "draws documents"]:
    """How often each document is in each draw of as many documents, with replacement; float64."""
    hand = torch.Generator().manual_seed(seed)
    picked = torch.randint(documents, (draws, documents), generator=hand)
    counts = torch.zeros(draws, documents, dtype=torch.float64)
    return counts.scatter_add_(1, picked, torch.ones_like(counts))
