"""Which tokens are ordinary: special ones and attention sinks are measured apart.

A sink is a token whose vector is far longer than those around it (the first token of a text, often
also a line break): a few of them hold most of the squared norm, so they would decide every sum
over tokens alone.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from jaxtyping import Float, Int
from torch import Tensor

ORDINARY, SPECIAL, SINK = 0, 1, 2
KINDS = ("ordinary", "special", "sink")
# a sink is so many times longer than the median token of its window
SINK_FACTOR = 10.0


def token_kinds(
    ids: Int[Tensor, " tokens"], x: Float[Tensor, "tokens d"], special: Collection[int] = ()
) -> Int[Tensor, " tokens"]:
    """ORDINARY, SPECIAL (its id is in `special`) or SINK for each token of one window, on the CPU.

    >>> x = torch.ones(4, 2); x[0] = 1000
    >>> token_kinds(torch.tensor([7, 1, 8, 9]), x, special=[1]).tolist()
    [2, 1, 0, 0]
    """
    norms = x.detach().float().norm(dim=1).cpu()
    kinds = torch.where(norms > SINK_FACTOR * norms.median(), SINK, ORDINARY)
    known = torch.tensor(sorted(special), dtype=ids.dtype)
    return kinds.masked_fill(torch.isin(ids.cpu(), known), SPECIAL)
