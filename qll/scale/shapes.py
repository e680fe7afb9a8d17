"""Shapes of Llama models, without their weights: what a prediction needs to know of a model.

Of Llama 3: Meta, The Llama 3 Herd of Models, 2024, table 3 (https://arxiv.org/abs/2407.21783). The
shape of a trillion parameters is our own: the same proportions, wider and deeper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaConfig


@dataclass(frozen=True)
class Shape:
    """Dimensions of a Llama."""

    name: str
    d_model: int
    d_ff: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_vocab: int
    tied: bool = False

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each linear of a block.

        >>> SHAPES["llama3-8b"].linears["k_proj"]
        (1024, 4096)
        """
        queries, keys = self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        return {
            "q_proj": (queries, self.d_model),
            "k_proj": (keys, self.d_model),
            "v_proj": (keys, self.d_model),
            "o_proj": (self.d_model, queries),
            "gate_proj": (self.d_ff, self.d_model),
            "up_proj": (self.d_ff, self.d_model),
            "down_proj": (self.d_model, self.d_ff),
        }

    @property
    def block_params(self) -> int:
        """Parameters of the linears of one block."""
        return sum(out * into for out, into in self.linears.values())

    @property
    def vocabulary_params(self) -> int:
        """Parameters of embedding and head, once when they are tied."""
        return self.d_vocab * self.d_model * (1 if self.tied else 2)

    @property
    def params(self) -> int:
        """All parameters, norms included.

        >>> SHAPES["llama3-8b"].params
        8030261248
        """
        norms = (2 * self.n_layers + 1) * self.d_model
        return self.n_layers * self.block_params + self.vocabulary_params + norms


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 64, 128, 2, 4, 2, 16, 512),
        Shape("smollm2-135m", 576, 1536, 30, 9, 3, 64, 49152, tied=True),
        Shape("llama3-8b", 4096, 14336, 32, 32, 8, 128, 128256),
        Shape("llama3-70b", 8192, 28672, 80, 64, 8, 128, 128256),
        Shape("llama3-405b", 16384, 53248, 126, 128, 8, 128, 128256),
        Shape("1t", 20480, 71680, 190, 160, 8, 128, 128256),
    )
}


def shape_of(config: LlamaConfig, name: str = "model") -> Shape:
    """The shape of a model's config."""
    return Shape(
        name,
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.vocab_size,
        bool(config.tie_word_embeddings),
    )
