"""What inputs look like before any text is seen: random tokens, drawn by their rank.

A byte-pair tokenizer numbers its tokens in the order in which they were merged, the frequent ones
first, so the id is a rank and Zipf's law a prior for how often a token comes (distill-rank,
compression.md 1c and 3). The second moments of the model's inputs on such tokens have its massive
activations and its correlated channels in the right places; a calibration of a few hundred tokens
has not seen enough to say so, and is shrunk towards them by `MomentStore`.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

# Mandelbrot's shift of the rank, the usual value for words
SHIFT = 2.7


def prior_windows(
    vocab: int, excluded: Collection[int], tokens: int, context: int, seed: int = 0
) -> Int64[Tensor, "windows context"]:
    """At least one window of random token ids below `vocab`, without the (special) `excluded` ones.

    p(id) is proportional to 1 / (rank + 2.7), the rank being the place among those allowed.

    >>> windows = prior_windows(100, {0, 1}, tokens=64, context=16)
    >>> windows.shape, int(windows.min()) >= 2, bool((windows < 30).sum() > (windows > 70).sum())
    (torch.Size([4, 16]), True, True)
    """
    special = set(excluded)
    allowed = torch.tensor([token for token in range(vocab) if token not in special])
    weights = 1 / (torch.arange(len(allowed), dtype=torch.float64) + SHIFT)
    shape = (max(1, tokens // context), context)
    draw = torch.Generator().manual_seed(seed)
    # the inverse of the distribution
    ends = weights.cumsum(0) / weights.sum()
    places = torch.searchsorted(ends, torch.rand(shape, generator=draw, dtype=torch.float64))
    return allowed[places.clamp(max=len(allowed) - 1)]


def blended(
    moment: Float64[Tensor, "n n"], tokens: int, prior: Float64[Tensor, "n n"], worth: int
) -> Float64[Tensor, "n n"]:
    """(1 - a) G + a P with P scaled to the trace of G and a = worth / (worth + tokens): the prior
    counts as `worth` tokens, so it fades as the calibration grows.

    >>> one, other = torch.eye(2).double() * 3, torch.diag(torch.tensor([4.0, 0.0])).double()
    >>> blended(one, 10, other, worth=10).diagonal().tolist()
    [4.5, 1.5]
    """
    share = worth / (worth + tokens)
    scale = moment.diagonal().sum() / prior.diagonal().sum().clamp(min=1e-300)
    return (1 - share) * moment + share * scale * prior
