"""Causal softmax attention over a window, with rotary positions and a cache of keys and values."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from qll.bytelm.config import ModelConfig
from qll.bytelm.context import Context
from qll.bytelm.initial import STD
from qll.bytelm.linears import linear, through
from qll.bytelm.rotary import rotate
from qll.bytelm.state import LayerState


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d_head)) v, each position over the last `context` ones, itself included.

    With `global_tokens` every position also sees learned keys and values, the same in every text: a
    prefix, not a memory of what was read. Its state is (keys, values)[batch, n_heads, at most
    context - 1, d_head].
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.d_head = config.n_heads, config.d_head
        self.context = config.context
        self.qkv = linear(config, config.d_model, 3 * config.d_model)
        self.out = linear(config, config.d_model, config.d_model)
        self.prefix = None
        if config.memory.global_tokens:
            shape = (2, self.n_heads, config.memory.global_tokens, self.d_head)
            self.prefix = nn.Parameter(torch.randn(shape) * STD)

    def initial_state(self, like: Float[Tensor, "batch d_model"]) -> LayerState:
        """No keys, no values; `like` gives batch size, device and dtype."""
        empty = like.new_zeros(len(like), self.n_heads, 0, self.d_head)
        return (empty, empty)

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], state: LayerState, context: Context
    ) -> tuple[Float[Tensor, "batch seq d_model"], LayerState]:
        """What each position reads, and the state after the last one."""
        batch, seq, d_model = x.shape
        qkv = through(self.qkv, x, context).view(batch, seq, 3, self.n_heads, self.d_head)
        cos, sin = context.angles
        # both at once, before heads and positions change places: one pass over memory
        turned = rotate(qkv[:, :, :2], (cos[:, None, None], sin[:, None, None]))
        queries, keys = turned.permute(2, 0, 3, 1, 4)
        values = qkv[:, :, 2].transpose(1, 2)
        past = state[0].shape[2]
        if past:
            keys = torch.cat((state[0], keys.to(state[0].dtype)), dim=2)
            values = torch.cat((state[1], values.to(state[1].dtype)), dim=2)
            keys, values = keys.to(queries.dtype), values.to(queries.dtype)
        kept = max(0, keys.shape[2] - self.context + 1)
        after = (keys[:, :, kept:], values[:, :, kept:])
        if self.prefix is not None:
            prefix = self.prefix.to(keys.dtype).expand(batch, -1, -1, -1, -1).unbind(1)
            keys, values = (
                torch.cat((prefix[0], keys), dim=2),
                torch.cat((prefix[1], values), dim=2),
            )
        plain = self.prefix is None and not past and seq <= self.context
        read = functional.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=None if plain else self._mask(seq, past, x.device),
            is_causal=plain,
        )
        read = read.transpose(1, 2).reshape(batch, seq, d_model)
        return through(self.out, read, context), after

    def _mask(self, seq: int, past: int, device: torch.device) -> Bool[Tensor, "seq all"]:
        """Which keys each query sees: the learned ones, and those of its window up to itself."""
        query = torch.arange(past, past + seq, device=device)[:, None]
        key = torch.arange(past + seq, device=device)[None, :]
        window = (key <= query) & (key > query - self.context)
        learned = 0 if self.prefix is None else self.prefix.shape[2]
        return functional.pad(window, (learned, 0), value=True)
