"""One block of a Llama on flat lists of tokens, with as few operations as it takes.

The numbers are those of transformers' block. Query and key are turned as complex numbers (the two
of a rotary pair are neighbours, see `qll.runtime.reading`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention, silu

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


class Block(nn.Module):
    """Attention and MLP of one block."""

    def __init__(
        self,
        norms: tuple[RMSNorm, RMSNorm],
        sites: dict[str, Site],
        heads: tuple[int, int],
        sizes: tuple[int, int, int],
        pairs: Int[Tensor, "kv_heads pairs"] | None,
    ) -> None:
        """norms: before attention and before the MLP. sizes: (d_head, d_key, d_value)."""
        super().__init__()
        self.first_norm, self.second_norm = norms
        self.sites = nn.ModuleDict(sites)
        self.heads, self.kv_heads = heads
        self.d_head, self.d_key, self.d_value = sizes
        self.register_buffer("nothing", norms[0].gain.new_zeros(1, 1, 1))
        self.register_buffer("pairs", None if pairs is None else self._of_all_heads(pairs))

    @property
    def cache_sizes(self) -> tuple[int, int, int]:
        """(kv_heads, d_key, d_value): what this block stores of a token."""
        return self.kv_heads, self.d_key, self.d_value

    def forward(
        self, x: Float[Tensor, "rows d_model"], keys: Tensor, values: Tensor, step: Step
    ) -> Float[Tensor, "rows d_model"]:
        """The block's output; keys and values of these tokens are written into the cache."""
        x = x + self._attention(self.first_norm(x), keys, values, step)
        return x + self._mlp(self.second_norm(x))

    def _mlp(self, x: Tensor) -> Tensor:
        pieces = self.sites["gate_up"].pieces(x)
        gate, up = pieces if len(pieces) == 2 else pieces[0].chunk(2, 1)
        return self.sites["down"](silu(gate) * up)

    def _attention(self, x: Tensor, keys: Tensor, values: Tensor, step: Step) -> Tensor:
        tokens = step.positions.shape[0]
        batch = x.shape[0] // tokens
        turning = (self.heads + self.kv_heads) * self.d_key
        found = self.sites["query_key_value"](x)
        turned = self._turned(found[:, :turning].reshape(batch, tokens, -1, self.d_key), step)
        query, key = turned.to(x.dtype).split((self.heads, self.kv_heads), 2)
        value = found[:, turning:].reshape(batch, tokens, self.kv_heads, self.d_value)
        keys.index_copy_(2, step.positions, key.transpose(1, 2))
        values.index_copy_(2, step.positions, value.transpose(1, 2))
        seen = keys[:, :, : step.window], values[:, :, : step.window]
        return self.sites["output"](self._mixed(query, *seen, step))

    def _turned(self, x: Tensor, step: Step) -> Tensor:
        turns = step.turns[:, None]
        if self.pairs is not None:
            # each head has pairs of its own left
            turns = step.turns.index_select(1, self.pairs).unflatten(1, (x.shape[2], -1))
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2)

    def _mixed(self, query: Tensor, keys: Tensor, values: Tensor, step: Step) -> Tensor:
        """Softmax attention; query [batch, tokens, heads, d_key] -> [rows, heads * d_value]."""
        batch, tokens = query.shape[:2]
        scale = self.d_head**-0.5
        if tokens == 1:  # less work than the general kernel starts with
            grouped = query.reshape(batch * self.kv_heads, -1, self.d_key)
            keys, values = keys.flatten(0, 1), values.flatten(0, 1)
            scores = torch.baddbmm(self.nothing, grouped, keys.mT, beta=0, alpha=scale)
            if step.mask is not None:
                scores = scores.masked_fill(~step.mask, float("-inf"))
            return torch.bmm(scores.softmax(-1), values).reshape(batch, -1)
        # the fast kernels want keys and values of one length; numbers of 0 change nothing
        widest = max(self.d_key, self.d_value)
        key_gap, value_gap = (0, widest - self.d_key), (0, widest - self.d_value)
        mixed = scaled_dot_product_attention(
            pad(query.transpose(1, 2), key_gap),
            pad(keys, key_gap),
            pad(values, value_gap),
            attn_mask=step.mask,
            is_causal=step.causal,
            scale=scale,
            enable_gqa=self.heads != self.kv_heads,
        )[..., : self.d_value]
        return mixed.transpose(1, 2).reshape(batch * tokens, -1)

    def _of_all_heads(self, pairs: Tensor) -> Tensor:
        """The pairs of every query head, then of every key head, in one list."""
        queries = pairs.repeat_interleave(self.heads // self.kv_heads, 0)
        return torch.cat([queries, pairs]).flatten()
