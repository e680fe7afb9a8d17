"""How much of a layer each position opens: a share of its channels or bonds, the first ones first.

    share = sigmoid(v . x + b + 3)
    weight of place j = clamp(groups share - group of j, 0, 1)

What is open is nested: a larger share opens everything that a smaller one does, and more. The
choice is made from the position's own vector, so it looks neither ahead nor at other texts; what is
closed is exactly 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qll.bytelm.complex_numbers import modulus
from qll.bytelm.config import ModelConfig

OPEN_AT_START = 3.0  # sigmoid(3) = 95 %


class Opening(nn.Module):
    """Chooses a share for each position; a complex stream shows it its moduli only.

    >>> opening = Opening(ModelConfig(), 8)
    >>> opening.share(torch.zeros(2, 5, 8)).shape
    torch.Size([2, 5, 1])
    """

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.complex_stream = config.stream.numbers == "complex"
        self.choose = nn.Linear(width // 2 if self.complex_stream else width, 1)

    def share(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch 1"]:
        """The open share at each position, in (0, 1)."""
        seen = modulus(x).to(x.dtype) if self.complex_stream else x
        return (self.choose(seen) + OPEN_AT_START).sigmoid()


def nested(
    share: Float[Tensor, "*batch 1"], places: int, groups: int
) -> Float[Tensor, "*batch places"]:
    """Weights of `places` in `groups` that open one after the other, the last of them partly.

    >>> nested(torch.tensor([0.625]), places=8, groups=4).tolist()
    [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.0, 0.0]
    """
    group = torch.arange(places, device=share.device) * groups // places
    return (share * groups - group).clamp(0, 1)
