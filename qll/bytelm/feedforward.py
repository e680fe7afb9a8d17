"""The feed-forward layer: down(silu(gate x) * up x) (SwiGLU, Shazeer 2020), of adaptive width.

With `width_groups` each position opens a share of its hidden channels (qll/bytelm/opening.py).
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from qll.bytelm.config import ModelConfig
from qll.bytelm.context import Context
from qll.bytelm.linears import gate, linear, through
from qll.bytelm.opening import Opening, nested


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
        gates, up = through(self.gate_up, x, context).chunk(2, dim=-1)
        hidden = self.activation(gates, up)
        if self.width is not None:
            hidden = self.width(x, hidden, context)
        return through(self.down, hidden, context)


class Width(Opening):
    """Closes the hidden channels that a position does not open."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, config.d_model)
        self.groups = config.weights.width_groups

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        hidden: Float[Tensor, "batch seq d_hidden"],
        context: Context,
    ) -> Float[Tensor, "batch seq d_hidden"]:
        """`hidden` with its closed channels 0; the open share is noted for the losses."""
        share = self.share(x)
        context.note("width", share.float().mean())
        return hidden * nested(share, hidden.shape[-1], self.groups)
