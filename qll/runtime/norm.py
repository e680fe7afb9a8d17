"""RMS norm in few operations.

torch's own has one kernel on a GPU; on a CPU it is made of ten: 0.80 ms for 512 tokens of 576
numbers on two cores, where these five took 0.07.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qll.runtime.direct import Direct


class RMSNorm(Direct):
    """x / sqrt(mean(x^2) + eps) * gain, over the last dimension.

    >>> RMSNorm(torch.full((4,), 3.0), 0.0)(torch.tensor([[2.0, 0.0, 0.0, 0.0]])).tolist()
    [[6.0, 0.0, 0.0, 0.0]]
    """

    def __init__(self, gain: Float[Tensor, " d_model"], eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("gain", gain)
        self.register_buffer("floor", gain.new_full((1, 1), eps))

    def forward(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """The normed rows."""
        if x.device.type != "cpu":
            return nn.functional.rms_norm(x, self.gain.shape, self.gain, self.eps)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(self.floor, length, length, value=1 / x.shape[-1]).rsqrt_()
        return (x * scale).mul_(self.gain)
