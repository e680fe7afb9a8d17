"""A converted model of transformers with its matrices in the forms that run fastest here.

For whoever wants transformers' own `generate`: the model and its cache stay what they are and the
numbers stay the same, but a block costs the products of our own runtime and no Python around them.
For inference: the stored networks and the single projections, with any hooks on them, are gone
afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn
from transformers import Cache, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qll.model.layers import TNLinear, TNTiedHead
from qll.runtime.attention import Attention
from qll.runtime.costs import DeviceCosts, device_costs
from qll.runtime.direct import Direct
from qll.runtime.llama import Choice, make_site, read_modules
from qll.runtime.norm import RMSNorm
from qll.runtime.program import Site, choose
from qll.runtime.reading import read_matrix

NORMS = ("input_layernorm", "post_attention_layernorm")


class FastHead(Direct):
    """The output head on vectors of any batch shape."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        """W x for every vector x."""
        return self.site.forward(x.reshape(-1, x.shape[-1])).unflatten(0, x.shape[:-1])


class Turns:
    """Rotary embeddings as complex numbers, made once a pass for the attention of all blocks."""

    def __init__(self) -> None:
        self._last: tuple[Any, Tensor | None] = (None, None)

    def of(self, cosine_sine: tuple[Tensor, Tensor]) -> Complex[Tensor, "batch tokens pairs"]:
        """Of what transformers hands to every block: the same object within a pass."""
        known, turns = self._last
        if known is not cosine_sine:
            cosine, sine = (part[..., : part.shape[-1] // 2].float() for part in cosine_sine)
            turns = torch.complex(cosine, sine)
            self._last = (cosine_sine, turns)
        return turns


class FastAttention(Direct):
    """Attention in place of transformers' own: its arguments, its cache, no weights given back."""

    def __init__(self, attention: Attention, layer_idx: int, turns: Turns) -> None:
        super().__init__()
        self.attention, self.layer_idx, self.turns = attention, layer_idx, turns

    def forward(
        self,
        hidden_states: Float[Tensor, "batch tokens d_model"],
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **_: Any,
    ) -> tuple[Float[Tensor, "batch tokens d_model"], None]:
        """The block's attention; `past_key_values` is what older versions call the cache."""
        turns = self.turns.of(position_embeddings)
        query, key, value = self.attention.read(hidden_states.flatten(0, 1), turns)
        cache = past_key_values if cache is None else cache
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        tokens = query.shape[2]
        causal = attention_mask is None and tokens > 1
        if causal:  # a cache of fixed length has places behind the tokens
            key, value = key[:, :, :tokens], value[:, :, :tokens]
        mixed = self.attention.mix(query, key, value, attention_mask, causal=causal)
        return mixed.reshape(hidden_states.shape), None


@torch.no_grad()
def accelerate(
    model: LlamaForCausalLM, costs: DeviceCosts | None = None, *, choice: Choice = choose
) -> LlamaForCausalLM:
    """`model` with fast modules in place of its networks; changed in place and returned.

    costs: of the device; None measures them once and remembers them. Raises UsageError for a
    linear with a bias.
    """
    weight = model.model.norm.weight
    costs = device_costs(weight.device, weight.dtype) if costs is None else costs
    turns = Turns()
    for index, layer in enumerate(model.model.layers):
        attention, layer.mlp = read_modules(layer, costs, choice)
        layer.self_attn = FastAttention(attention, index, turns)
        for name in NORMS:
            setattr(layer, name, _fast_norm(getattr(layer, name)))
    model.model.norm = _fast_norm(model.model.norm)
    if isinstance(model.lm_head, TNLinear | TNTiedHead):
        model.lm_head = FastHead(make_site([read_matrix(model.lm_head)], costs, choice))
    return model


def _fast_norm(norm: LlamaRMSNorm) -> nn.Module:
    # transformers computes lower precisions in float32, which ours does not
    if norm.weight.dtype != torch.float32 or norm.weight.device.type != "cpu":
        return norm
    return RMSNorm(norm.weight.detach(), norm.variance_epsilon)
