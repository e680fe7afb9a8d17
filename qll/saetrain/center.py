"""Where activations are centred and how far they spread: what an autoencoder starts from."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from qll.errors import NonFiniteError

MOST_ROUNDS = 100
TOLERANCE = 1e-5  # of the spread


def geometric_median(x: Float[Tensor, "tokens d"]) -> Float[Tensor, " d"]:
    """The point with the least sum of distances to the rows of `x`, by Weiszfeld's iteration.

    Unlike the mean it does not follow a few very long rows (Bricken et al. 2023, "Towards
    Monosemanticity", start b_dec there).

    >>> import torch
    >>> geometric_median(torch.tensor([[0.0], [0.0], [0.0], [100.0]])).abs() < 1e-3
    tensor([True])
    """
    x = x.double()
    center = x.mean(dim=0)
    scale = (x - center).norm(dim=1).mean()
    for _ in range(MOST_ROUNDS):
        # a row at the centre itself would have infinite weight
        weights = 1 / (x - center).norm(dim=1).clamp(min=1e-9 * scale + 1e-300)
        before, center = center, (weights @ x) / weights.sum()
        if (center - before).norm() <= TOLERANCE * scale:
            break
    return center.float()


def spread(x: Float[Tensor, "tokens d"], where: str) -> float:
    """Root mean square distance of the rows of `x` from their mean.

    Raises NonFiniteError when there is none: NaN, infinity, or every row the same.

    >>> import torch
    >>> spread(torch.tensor([[3.0, 0.0], [-3.0, 0.0]]), "layers.0")
    3.0
    """
    found = (x.double() - x.double().mean(dim=0)).square().sum(dim=1).mean().sqrt().item()
    if not 0 < found < float("inf"):
        raise NonFiniteError(
            "activations are not finite, or do not differ between tokens",
            where=where,
            found=found,
            hint="check the checkpoint, or name another hookpoint",
        )
    return found
