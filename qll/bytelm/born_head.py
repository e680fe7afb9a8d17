"""An output head of two numbers per byte: a complex amplitude psi, or two logits.

    born   p(byte) = |psi|^2 / sum |psi|^2, so the logits are log |psi|^2
    sum    the logits are the sum of the two numbers: its twin, with the same parameters

What comes out are logits either way, whose softmax is p: losses, bits per byte and samplers are
those of any other head.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qll.bytelm.config import VOCAB, ModelConfig

LEAST = 1e-8  # added to |psi|^2: no byte is impossible, and its logarithm has a gradient


class AmplitudeHead(nn.Linear):
    """Logits of 256 bytes from two numbers each.

    >>> head = AmplitudeHead(ModelConfig(d_model=32, head="born"))
    >>> psi = torch.view_as_complex(torch.nn.functional.linear(torch.ones(32), head.weight)
    ...                             .unflatten(0, (256, 2)))
    >>> p = head(torch.ones(32)).softmax(-1)
    >>> p.allclose(psi.abs() ** 2 / (psi.abs() ** 2).sum(), atol=1e-6)
    True
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.d_model, 2 * VOCAB, bias=False)
        self.kind = config.head

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 256"]:
        """The logits, in float32 or better."""
        pairs = super().forward(x).unflatten(-1, (VOCAB, 2))
        pairs = pairs.to(torch.promote_types(pairs.dtype, torch.float32))
        if self.kind == "sum":
            return pairs.sum(-1)
        return (pairs.square().sum(-1) + LEAST).log()
