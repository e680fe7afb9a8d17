"""Shapes of real Llamas: what their config.json and params.json say, and what they are made of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transformers import LlamaConfig

VOCAB, BOS, EOS = 128256, 128000, 128001
HF_SHARD_BYTES = 5_000_000_000  # the originals are cut at 5 GB: 4 files for 8B, 30 for 70B


@dataclass(frozen=True)
class Shape:
    """A Llama 3 by its numbers, in Meta's words where both formats have one."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    multiple_of: int
    ffn_dim_multiplier: float | None
    meta_shards: int

    @property
    def d_ff(self) -> int:
        """Width of the feed-forward layer, by the rule of Meta's code.

        >>> SHAPES["llama3-8b"].d_ff, SHAPES["llama3-70b"].d_ff
        (14336, 28672)
        """
        width = int(int(8 * self.dim / 3) * (self.ffn_dim_multiplier or 1.0))
        return -(-width // self.multiple_of) * self.multiple_of

    def with_blocks(self, blocks: int | None) -> Shape:
        """The same width with another number of blocks; None leaves it."""
        return self if blocks is None else replace(self, n_layers=blocks)

    def config(self) -> LlamaConfig:
        """The config of the Hugging Face form."""
        return LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=self.dim,
            intermediate_size=self.d_ff,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            num_key_value_heads=self.n_kv_heads,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            bos_token_id=BOS,
            eos_token_id=EOS,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            architectures=["LlamaForCausalLM"],
            dtype="bfloat16",
        )

    def params(self) -> dict[str, Any]:
        """The params.json of Meta's form."""
        found = {
            "dim": self.dim,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_kv_heads,
            "vocab_size": VOCAB,
            "multiple_of": self.multiple_of,
            "ffn_dim_multiplier": self.ffn_dim_multiplier,
            "norm_eps": 1e-5,
            "rope_theta": 500000.0,
        }
        return {key: value for key, value in found.items() if value is not None}


SHAPES = {
    "llama3-8b": Shape(4096, 32, 32, 8, 1024, 1.3, meta_shards=1),
    "llama3-70b": Shape(8192, 80, 64, 8, 4096, 1.3, meta_shards=8),
    "tiny": Shape(64, 2, 4, 2, 32, None, meta_shards=1),
}
