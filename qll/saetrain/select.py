"""Which features fire on a token: the one dense product of training, a chunk of tokens at a time.

Only the choice is made here, so it may be made in bfloat16; the values of the chosen features are
computed again in float32 by `qll.saetrain.sparse.products`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from qll.saetrain.sparse import Pattern

# Bytes of a block of pre-activations: small enough for a processor's cache, big enough for a GPU
BLOCK_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30, "mps": 256 << 20}


@torch.no_grad()
def strongest(
    z: Float[Tensor, "tokens d"],
    weight: Float[Tensor, "features d"],
    bias: Float[Tensor, " features"],
    k: int,
    precision: torch.dtype = torch.float32,
) -> Int[Tensor, "tokens k"]:
    """The k features of largest pre-activation on each token, strongest first.

    >>> strongest(torch.tensor([[1.0, 3.0]]), torch.eye(2), torch.zeros(2), 1).tolist()
    [[1]]
    """
    chunks = _pre_activations(z, weight, bias, precision)
    return torch.cat([chunk.topk(k, dim=1)[1] for chunk in chunks])


@torch.no_grad()
def passing(
    z: Float[Tensor, "tokens d"],
    weight: Float[Tensor, "features d"],
    bias: Float[Tensor, " features"],
    floor: Float[Tensor, " features"],
    precision: torch.dtype = torch.float32,
) -> Pattern:
    """The features whose pre-activation is above their `floor`, as many as there are on each token.

    >>> found = passing(torch.tensor([[1.0, 3.0]]), torch.eye(2), torch.zeros(2), torch.ones(2))
    >>> found.indices.tolist(), found.offsets.tolist()
    ([1], [0, 1])
    """
    counts, indices = [], []
    for chunk in _pre_activations(z, weight, bias, precision):
        passes = chunk > floor
        counts.append(passes.sum(dim=1))
        indices.append(passes.nonzero()[:, 1])
    offsets = functional.pad(torch.cat(counts).cumsum(0), (1, 0))
    return Pattern(torch.cat(indices), offsets, len(weight))


def _pre_activations(z: Tensor, weight: Tensor, bias: Tensor, precision: torch.dtype):
    weight, bias = weight.to(precision), bias.to(precision)
    tokens = max(1, BLOCK_BYTES[z.device.type] // (precision.itemsize * len(weight)))
    for part in z.to(precision).split(tokens):
        yield functional.linear(part, weight, bias)
