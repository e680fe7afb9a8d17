"""One block of a Llama on flat lists of tokens, with as few operations as it takes.

The numbers are those of transformers' block.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor
from torch.nn.functional import silu

from qll.runtime.attention import Attention
from qll.runtime.direct import Direct
from qll.runtime.norm import RMSNorm
from qll.runtime.program import Site


@dataclass(frozen=True)
class Step:
    """What every block needs to know about the tokens at hand."""

    positions: Int[Tensor, " tokens"]
    """Where they stand, the same in every text of the batch."""
    turns: Complex[Tensor, "tokens pairs"]
    """Rotary embedding of these positions."""
    window: int
    """Places of the cache that attention looks at."""
    mask: Bool[Tensor, "tokens window"] | None
    """Which of them each token sees; None: all, or all before it when `causal`."""
    causal: bool


class MLP(Direct):
    """down(silu(gate x) * up x), gate and up in one product."""

    def __init__(self, gate_up: Site, down: Site) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The MLP's output."""
        pieces = self.gate_up.pieces(x.reshape(-1, x.shape[-1]))
        gate, up = pieces if len(pieces) == 2 else pieces[0].chunk(2, 1)
        return self.down.forward(silu(gate) * up).reshape(x.shape)


class Block(Direct):
    """Attention and MLP of one block."""

    def __init__(self, norms: tuple[RMSNorm, RMSNorm], attention: Attention, mlp: MLP) -> None:
        """norms: before attention and before the MLP."""
        super().__init__()
        self.first_norm, self.second_norm = norms
        self.attention, self.mlp = attention, mlp

    @property
    def sites(self) -> dict[str, Site]:
        """Its products by name."""
        attention, mlp = self.attention, self.mlp
        return {
            "query_key_value": attention.query_key_value,
            "output": attention.output,
            "gate_up": mlp.gate_up,
            "down": mlp.down,
        }

    @property
    def cache_sizes(self) -> tuple[int, int, int]:
        """(kv_heads, d_key, d_value): what this block stores of a token."""
        attention = self.attention
        return attention.kv_heads, attention.d_key, attention.d_value

    def forward(
        self, x: Float[Tensor, "rows d_model"], keys: Tensor, values: Tensor, step: Step
    ) -> Float[Tensor, "rows d_model"]:
        """The block's output; keys and values of these tokens are written into the cache."""
        query, key, value = self.attention.read(self.first_norm.forward(x), step.turns)
        keys.index_copy_(2, step.positions, key)
        values.index_copy_(2, step.positions, value)
        # a slice in brackets costs three times as much
        seen = keys.narrow(2, 0, step.window), values.narrow(2, 0, step.window)
        x = x + self.attention.mix(query, *seen, step.mask, causal=step.causal)
        return x + self.mlp.forward(self.second_norm.forward(x))
