"""The feed-forward layer SwiGLU: down(silu(gate x) * up x) (Shazeer 2020)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from qll.bytelm.config import ModelConfig
from qll.bytelm.linears import gate, linear


class FeedForward(nn.Module):
    """A gated hidden layer, position by position; gate and up are one matrix product."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = linear(config, config.d_model, 2 * config.d_hidden)
        self.down = linear(config, config.d_hidden, config.d_model)
        self.activation = gate(config, config.d_hidden)

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        """The layer's output."""
        gates, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.activation(gates, up))
