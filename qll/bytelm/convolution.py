"""A short causal convolution, channel by channel: what a position takes from the few before it.

Matrix-state mixers read by content alone and are poor at "the byte before"; a convolution in front
of them is what linear attention needs (Yang et al. 2024, section 3.4). Attention may have it too.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class ShortConvolution(nn.Module):
    """x_t + sum_j kernel[j] x_{t-j}, j < width; zero kernels at the start, which is the identity.

    Its state is the last width - 1 inputs. A complex stream has one kernel per pair of channels.

    >>> convolution = ShortConvolution(2, width=3)
    >>> x = torch.randn(1, 4, 2)
    >>> convolution(x, convolution.initial_state(x[:, 0]))[0].equal(x)
    True
    """

    def __init__(self, channels: int, width: int, pairs: bool = False) -> None:
        super().__init__()
        self.width, self.repeats = width, 2 if pairs else 1
        self.kernel = nn.Parameter(torch.zeros(width, channels // self.repeats))

    def initial_state(self, like: Float[Tensor, "batch channels"]) -> Tensor:
        """Zeros before the first position."""
        return like.new_zeros(len(like), self.width - 1, like.shape[1])

    def forward(
        self, x: Float[Tensor, "batch seq channels"], state: Tensor
    ) -> tuple[Float[Tensor, "batch seq channels"], Tensor]:
        """The convolved sequence, and the inputs that the next positions need."""
        kernel = self.kernel.repeat_interleave(self.repeats, dim=1)
        padded, seq = torch.cat((state.to(x.dtype), x), dim=1), x.shape[1]
        y = x
        for back in range(self.width):
            start = self.width - 1 - back
            y = y + padded[:, start : start + seq] * kernel[back]
        return y, padded[:, seq:]
