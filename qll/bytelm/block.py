"""One block: x + mixer(norm(x)), then x + feed_forward(norm(x)), and what may stand before them."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from qll.bytelm.attention import Attention
from qll.bytelm.born import BornAttention
from qll.bytelm.brickwall import Brickwall
from qll.bytelm.config import ModelConfig
from qll.bytelm.context import Context
from qll.bytelm.convolution import ShortConvolution
from qll.bytelm.feedforward import FeedForward
from qll.bytelm.interference import Interference
from qll.bytelm.linears import norm
from qll.bytelm.phase import Phase
from qll.bytelm.state import LayerState

MIXERS = {
    "attention": Attention,
    "interference": Interference,
    "delta": lambda config: Interference(config, delta=True),
    "born": BornAttention,
}


class Block(nn.Module):
    """A pre-norm causal block; its state is that of its mixer, and of the convolution before it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        width = config.d_model
        self.brickwall = Brickwall(config) if config.stream.brickwall else None
        self.phase = Phase(config) if config.stream.phase != "off" else None
        self.mixer_norm = norm(config, width)
        pairs = config.stream.numbers == "complex"
        self.convolution = (
            ShortConvolution(width, config.mixer.conv, pairs) if config.mixer.conv else None
        )
        self.mixer = MIXERS[config.mixer_of(layer)](config)
        self.feed_forward_norm = norm(config, width)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def initial_state(self, like: Float[Tensor, "batch d_model"]) -> LayerState:
        """The state before the first position; `like` gives batch size, device and dtype."""
        state = self.mixer.initial_state(like)
        if self.convolution is None:
            return state
        return (*state, self.convolution.initial_state(like))

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], state: LayerState, context: Context
    ) -> tuple[Float[Tensor, "batch seq d_model"], LayerState]:
        """The stream after the block, and the block's state after the last position."""
        if self.brickwall is not None:
            x = self.brickwall(x)
        if self.phase is not None:
            x = self.phase(x, context)
        read, state = self._mixed(self.mixer_norm(x), state, context)
        x = x + self.dropout(read)
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x), context)), state

    def _mixed(self, x: Tensor, state: LayerState, context: Context) -> tuple[Tensor, LayerState]:
        if self.convolution is None:
            return self.mixer(x, state, context)
        *own, tail = state
        x, tail = self.convolution(x, tail)
        read, own = self.mixer(x, tuple(own), context)
        return read, (*own, tail)
