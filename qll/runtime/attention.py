"""The attention of one block: one product in, one product out, heads of any length between.

Query and key are turned as complex numbers (the two of a rotary pair are neighbours, see
`qll.runtime.reading`). Whoever calls keeps the keys and values of earlier tokens.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from qll.runtime.direct import Direct
from qll.runtime.program import Site


class Attention(Direct):
    """Projections and mixture of a block's heads."""

    def __init__(
        self,
        query_key_value: Site,
        output: Site,
        heads: tuple[int, int],
        sizes: tuple[int, int, int],
        pairs: Int[Tensor, "kv_heads pairs"] | None,
    ) -> None:
        """heads: of queries and of keys. sizes: (d_head, d_key, d_value)."""
        super().__init__()
        self.query_key_value, self.output = query_key_value, output
        self.heads, self.kv_heads = heads
        self.d_head, self.d_key, self.d_value = sizes
        self.widths = (self.heads + self.kv_heads) * self.d_key, self.kv_heads * self.d_value
        self.register_buffer("pairs", None if pairs is None else self._of_all_heads(pairs))

    def read(
        self, x: Float[Tensor, "rows d_model"], turns: Complex[Tensor, "*texts tokens pairs"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query [batch, heads, tokens, d_key], key [batch, kv_heads, tokens, d_key] and value.

        turns: rotary embedding of the tokens' positions, for all texts or for each.
        """
        tokens = turns.shape[-2]
        batch = x.shape[0] // tokens
        found = self.query_key_value.forward(x)
        turning, value = found.split_with_sizes(self.widths, 1)
        turned = self._turned(turning.reshape(batch, tokens, -1, self.d_key), turns)
        value = value.reshape(batch, tokens, self.kv_heads, self.d_value)
        query, key = (
            turned.to(x.dtype).transpose(1, 2).split_with_sizes((self.heads, self.kv_heads), 1)
        )
        return query, key, value.transpose(1, 2)

    def mix(
        self,
        query: Float[Tensor, "batch heads tokens d_key"],
        keys: Float[Tensor, "batch kv_heads window d_key"],
        values: Float[Tensor, "batch kv_heads window d_value"],
        mask: Bool[Tensor, "tokens window"] | Tensor | None,
        *,
        causal: bool,
    ) -> Float[Tensor, "rows d_model"]:
        """Softmax attention and the output matrix.

        mask: which places each token sees, for all texts, or as transformers writes it (four
        dimensions); None: all, or all before it when `causal`.
        """
        batch, _, tokens, _ = query.shape
        if tokens == 1 and (mask is None or mask.ndim == 2):
            return self.output.forward(self._one(query, keys, values, mask))
        # the fast kernels want keys and values of one length; numbers of 0 change nothing
        widest = max(self.d_key, self.d_value)
        key_gap, value_gap = (0, widest - self.d_key), (0, widest - self.d_value)
        mixed = scaled_dot_product_attention(
            pad(query, key_gap),
            pad(keys, key_gap),
            pad(values, value_gap),
            attn_mask=mask,
            is_causal=causal,
            scale=self.d_head**-0.5,
            enable_gqa=self.heads != self.kv_heads,
        )[..., : self.d_value]
        return self.output.forward(mixed.transpose(1, 2).reshape(batch * tokens, -1))

    def _one(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """One token: less work than the general kernel starts with."""
        batch, scale = query.shape[0], self.d_head**-0.5
        grouped = query.reshape(batch * self.kv_heads, -1, self.d_key)
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        scores = torch.bmm(grouped, keys.mT).mul_(scale)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return torch.bmm(scores.softmax(-1), values).reshape(batch, -1)

    def _turned(self, x: Tensor, turns: Tensor) -> Tensor:
        turns = turns[..., None, :]
        if self.pairs is not None:
            # each head has pairs of its own left
            turns = turns.index_select(-1, self.pairs).unflatten(-1, (x.shape[2], -1)).squeeze(-3)
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2)

    def _of_all_heads(self, pairs: Tensor) -> Tensor:
        """The pairs of every query head, then of every key head, in one list."""
        queries = pairs.repeat_interleave(self.heads // self.kv_heads, 0)
        return torch.cat([queries, pairs]).flatten()
