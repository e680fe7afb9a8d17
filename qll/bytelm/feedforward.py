"""The feed-forward layer SwiGLU: down(silu(gate x) * up x) (Shazeer 2020)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from qll.bytelm.config import ModelConfig


class FeedForward(nn.Module):
    """A gated hidden layer, position by position; gate and up are one matrix product."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.d_model, 2 * config.d_hidden, bias=False)
        self.down = nn.Linear(config.d_hidden, config.d_model, bias=False)

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        """The layer's output."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(functional.silu(gate) * up)
