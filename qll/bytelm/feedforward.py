"""The feed-forward layer: down(silu(gate x) * up x) (SwiGLU, Shazeer 2020), of adaptive width.

With `width_groups` each position opens a number of its hidden channels: w = groups * sigmoid(v . x)
groups, the last of them partly. The choice is made from the position's own vector, so it looks
neither ahead nor at other texts; closed channels are exactly 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qll.bytelm.complex_numbers import modulus
from qll.bytelm.config import ModelConfig
from qll.bytelm.context import Context
from qll.bytelm.linears import gate, linear

OPEN_AT_START = 3.0  # sigmoid(3) = 95 % of the channels


class FeedForward(nn.Module):
    """A gated hidden layer, position by position; gate and up are one matrix product."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = linear(config, config.d_model, 2 * config.d_hidden)
        self.activation = gate(config, config.d_hidden)
        self.down = linear(config, config.d_hidden, config.d_model)
        self.width = Width(config) if config.weights.width_groups else None

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], context: Context
    ) -> Float[Tensor, "batch seq d_model"]:
        """The layer's output."""
        gates, up = self.gate_up(x).chunk(2, dim=-1)
        hidden = self.activation(gates, up)
        if self.width is not None:
            hidden = self.width(x, hidden, context)
        return self.down(hidden)


class Width(nn.Module):
    """Closes the hidden channels that a position does not open."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.groups = config.weights.width_groups
        self.complex_stream = config.stream.numbers == "complex"
        seen = config.d_model // 2 if self.complex_stream else config.d_model
        self.choose = nn.Linear(seen, 1)

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        hidden: Float[Tensor, "batch seq d_hidden"],
        context: Context,
    ) -> Float[Tensor, "batch seq d_hidden"]:
        """`hidden` with its closed channels 0; the open share is noted for the losses."""
        seen = modulus(x).to(x.dtype) if self.complex_stream else x
        open_share = (self.choose(seen) + OPEN_AT_START).sigmoid()
        context.note("width", open_share.float().mean())
        group = torch.arange(self.groups, device=x.device)
        mask = (open_share * self.groups - group).clamp(0, 1)
        return (hidden.unflatten(-1, (self.groups, -1)) * mask[..., None]).flatten(-2)
