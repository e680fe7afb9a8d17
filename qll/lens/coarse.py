"""The k strongest features of a token, looked for in bfloat16 and computed in float32.

The one dense product of encoding only has to say which features can be among the strongest, so it
may be coarse: k of them and some to spare are computed again exactly, and the k largest of these
are the answer. It is checked: what the coarse look gave the last candidate, plus twice the largest
error seen on a candidate, must stay below the k-th exact value; tokens where it does not are
returned as doubtful. `rounded` is the coarse look alone,
which is what other packages compute with weights in bfloat16.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qll.lens.rows import products
from qll.load.sae_file import StoredSAE
from qll.train.precision import choose_precision

LATENTS = 131072  # features per block of coarse pre-activations
BLOCK_BYTES = 64 << 20
LEAST_SPARE = 32


def allows(stored: StoredSAE) -> bool:
    """Whether these weights can be multiplied in bfloat16: topk, a row per feature, in memory."""
    weight = stored.encoder.data
    return (
        stored.spec.activation == "topk"
        and isinstance(weight, Tensor)
        and weight.dtype == torch.bfloat16
        and not stored.encoder.transposed
        and not stored.decoder.transposed
        and "scale_enc" not in stored.vectors
    )


def is_fast(stored: StoredSAE, device: torch.device) -> bool:
    """Whether a coarse look is possible with these weights and fast on `device`."""
    return allows(stored) and choose_precision("auto", device) == torch.bfloat16


def strongest(
    z: Float[Tensor, "tokens d"],
    weight: Float[Tensor, "features d"],
    bias: Float[Tensor, " features"],
    k: int,
    signed: bool = False,
) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"], Bool[Tensor, " tokens"]]:
    """(pre-activations, features, doubtful) of the k largest on each token, strongest first.

    signed: largest by absolute value. `doubtful` tokens may have other features.

    >>> weight = torch.eye(3).bfloat16()
    >>> values, features, doubtful = strongest(torch.tensor([[1.0, 3.0, 2.0]]), weight,
    ...                                        torch.zeros(3), 2)
    >>> values.tolist(), features.tolist(), doubtful.tolist()
    ([[3.0, 2.0]], [[1, 2]], [False])
    """
    count = min(len(weight), k + max(LEAST_SPARE, k // 4))
    block = _block(z, weight)
    parts = [
        _strongest(part, weight, bias, k, count, signed, block) for part in z.split(len(block))
    ]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def rounded(
    z: Float[Tensor, "tokens d"],
    weight: Float[Tensor, "features d"],
    bias: Float[Tensor, " features"],
    k: int,
    signed: bool = False,
) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
    """(pre-activations, features) of the k largest by the coarse look alone, in any order.

    >>> rounded(torch.tensor([[1.0, 3.0]]), torch.eye(2).bfloat16(), torch.zeros(2), 1)
    (tensor([[3.]]), tensor([[1]]))
    """
    block = _block(z, weight)
    parts = [_candidates(part, weight, bias, k, signed, block) for part in z.split(len(block))]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def _block(z: Tensor, weight: Tensor) -> Tensor:
    """Room for the coarse pre-activations of some tokens and features, used again for the others:
    taking new memory would cost a tenth of the product."""
    latents = min(LATENTS, len(weight))
    fitting = BLOCK_BYTES // (weight.element_size() * max(1, latents))
    return weight.new_empty(max(1, min(len(z), fitting)), latents)


def _strongest(
    z: Tensor, weight: Tensor, bias: Tensor, k: int, count: int, signed: bool, block: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    coarse, features = _candidates(z, weight, bias, count, signed, block)
    exact = products(z, weight, features) + bias[features]
    coarse, sizes = (coarse.abs(), exact.abs()) if signed else (coarse, exact)
    best, places = sizes.topk(min(k, count), dim=1)
    doubtful = torch.zeros(len(z), dtype=torch.bool, device=z.device)
    if count < len(weight):
        error = (sizes - coarse).abs().amax(1)
        doubtful = best[:, -1] < coarse.amin(1) + 2 * error
    return exact.gather(1, places), features.gather(1, places), doubtful


def _candidates(
    z: Tensor, weight: Tensor, bias: Tensor, count: int, signed: bool, block: Tensor
) -> tuple[Tensor, Tensor]:
    """The coarse values and the features of the `count` largest on each token, in any order."""
    z, bias = z.to(weight.dtype), bias.to(weight.dtype)
    values, features = None, None
    for start in range(0, len(weight), block.shape[1]):
        rows = weight[start : start + block.shape[1]]
        part = torch.mm(z, rows.T, out=block[: len(z), : len(rows)])
        part += bias[start : start + len(rows)]
        found, places = _largest(part, count, signed)
        places += start
        if values is not None:
            values, chosen = _largest(torch.cat([values, found], dim=1), count, signed)
            features = torch.cat([features, places], dim=1).gather(1, chosen)
        else:
            values, features = found, places
    return values.float(), features


def _largest(values: Tensor, count: int, signed: bool) -> tuple[Tensor, Tensor]:
    sizes = values.abs() if signed else values
    found, places = sizes.topk(min(count, values.shape[1]), dim=1, sorted=False)
    return (values.gather(1, places) if signed else found), places
