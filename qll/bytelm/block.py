"""One block: x + mixer(norm(x)), then x + feed_forward(norm(x))."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from qll.bytelm.attention import Attention
from qll.bytelm.config import ModelConfig
from qll.bytelm.context import Context
from qll.bytelm.feedforward import FeedForward
from qll.bytelm.linears import norm
from qll.bytelm.state import LayerState


class Block(nn.Module):
    """A pre-norm causal block; its state is that of its mixer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.mixer_norm = norm(config, config.d_model)
        self.mixer = Attention(config)
        self.feed_forward_norm = norm(config, config.d_model)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], state: LayerState, context: Context
    ) -> tuple[Float[Tensor, "batch seq d_model"], LayerState]:
        """The stream after the block, and the block's state after the last position."""
        read, state = self.mixer(self.mixer_norm(x), state, context)
        x = x + self.dropout(read)
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x))), state
