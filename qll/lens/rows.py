"""Products with the rows of a matrix that each token names: directions of features that fire.

The matrix stays as it is stored and is never copied whole; rows pass through a small buffer in
float32, taken once: taking new memory for them would cost more than the products.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

# rows in float32: small enough for a processor's cache, big enough for a GPU
BUFFER_BYTES = {"cpu": 4 << 20, "cuda": 1 << 28, "mps": 1 << 26}


def products(
    z: Float[Tensor, "tokens d"],
    weight: Float[Tensor, "features d"],
    indices: Int[Tensor, "tokens k"],
) -> Float[Tensor, "tokens k"]:
    """<z_t, row of weight> in float32 for the rows that each token names.

    >>> products(torch.tensor([[1.0, 3.0]]), torch.eye(2), torch.tensor([[1]])).tolist()
    [[3.0]]
    """
    return products_with([z], weight, indices)[0]


def products_with(
    several: list[Float[Tensor, "tokens d"]],
    weight: Float[Tensor, "features d"],
    indices: Int[Tensor, "tokens k"],
) -> list[Float[Tensor, "tokens k"]]:
    """`products` for several z, each row fetched once for all.

    >>> z = torch.tensor([[1.0, 3.0]])
    >>> [f.tolist() for f in products_with([z, 2 * z], torch.eye(2), torch.tensor([[1]]))]
    [[[3.0]], [[6.0]]]
    """
    found = [z.new_empty(indices.shape) for z in several]
    for part, rows in _rows(weight, indices):
        for z, made in zip(several, found, strict=True):
            if len(rows) == 1:  # faster than a batch of one
                torch.mv(rows[0], z[part.start], out=made[part.start])
            else:
                torch.bmm(rows, z[part, :, None], out=made[part, :, None])
    return found


def combine(
    values: Float[Tensor, "tokens k"],
    weight: Float[Tensor, "features d"],
    indices: Int[Tensor, "tokens k"],
) -> Float[Tensor, "tokens d"]:
    """Sums of the rows that each token names, weighted by its values, in float32.

    >>> combine(torch.tensor([[2.0]]), torch.eye(2), torch.tensor([[1]])).tolist()
    [[0.0, 2.0]]
    """
    found = values.new_zeros(len(values), weight.shape[1])
    places = torch.arange(indices.numel(), device=indices.device).view(indices.shape)
    for part, rows in _rows(weight, indices):
        # all rows in their order: a third of the time of a product with one row on the left
        found[part] = functional.embedding_bag(
            places[: len(rows)],
            rows.flatten(0, 1),
            per_sample_weights=values[part],
            mode="sum",
        )
    return found


def _rows(weight: Tensor, indices: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(tokens, the rows they name [tokens, k, d] in float32), each time in the same buffer."""
    if not indices.numel():
        return
    width, size = indices.shape[1], weight.shape[1]
    fitting = BUFFER_BYTES[weight.device.type] // (4 * width * size)
    step = max(1, min(len(indices), fitting))
    wide = torch.empty(step * width, size, dtype=torch.float32, device=weight.device)
    narrow = wide if weight.dtype == wide.dtype else weight.new_empty(wide.shape)
    for start in range(0, len(indices), step):
        wanted = indices[start : start + step]
        count = wanted.numel()
        torch.index_select(weight, 0, wanted.flatten(), out=narrow[:count])
        if narrow is not wide:
            wide[:count].copy_(narrow[:count])
        yield slice(start, start + step), wide[:count].view(*wanted.shape, size)
