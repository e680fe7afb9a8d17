"""Root-mean-square norms: of channels, and of complex channels by their modulus.

The mean square of complex channels is taken over pairs and every pair is scaled as one number, so
the phase of each is left alone.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

EPSILON = 1e-6


class RMSNorm(nn.Module):
    """x / rms(x) * gain (Zhang and Sennrich 2019, eq. 4).

    >>> RMSNorm(2)(torch.tensor([3.0, 3.0])).round(decimals=3).tolist()
    [1.0, 1.0]
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """`x` with mean square 1, times the gain."""
        return functional.rms_norm(x, self.gain.shape, self.gain, EPSILON)
