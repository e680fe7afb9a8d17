"""A Llama in plain torch, written from the papers, not from any library: the judge of last resort.

RMSNorm (Zhang and Sennrich 2019), rotary positions (Su et al. 2021), grouped-query attention
(Ainslie et al. 2023), SwiGLU (Shazeer 2020). Weights by HF name, rows of q and k half split. Loops
over heads on purpose: slow, and hard to get wrong in the same way as a batched version.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def reference_logits(weights: Mapping[str, Tensor], config, ids: list[int]) -> Tensor:
    """Logits [len(ids), vocab] in float64."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    table = weights["model.embed_tokens.weight"]
    stream = table[torch.tensor(ids)]
    for layer in range(config.num_hidden_layers):
        part = f"model.layers.{layer}."
        block = {n.removeprefix(part): w for n, w in weights.items() if n.startswith(part)}
        normed = rms_norm(stream, block["input_layernorm.weight"], config.rms_norm_eps)
        stream = stream + attention(normed, block, config)
        normed = rms_norm(stream, block["post_attention_layernorm.weight"], config.rms_norm_eps)
        gate, up = normed @ block["mlp.gate_proj.weight"].T, normed @ block["mlp.up_proj.weight"].T
        stream = stream + (gate * torch.sigmoid(gate) * up) @ block["mlp.down_proj.weight"].T
    final = rms_norm(stream, weights["model.norm.weight"], config.rms_norm_eps)
    return final @ weights.get("lm_head.weight", table).T


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * gain


def attention(x: Tensor, block: Mapping[str, Tensor], config) -> Tensor:
    size, shared = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(diagonal=1)
    outputs = []
    for head in range(config.num_attention_heads):
        own = slice(head * size, (head + 1) * size)
        group = slice(head // shared * size, (head // shared + 1) * size)
        query = rotate(x @ block["self_attn.q_proj.weight"][own].T, config)
        key = rotate(x @ block["self_attn.k_proj.weight"][group].T, config)
        value = x @ block["self_attn.v_proj.weight"][group].T
        scores = (query @ key.T / math.sqrt(size)).masked_fill(future, -math.inf)
        outputs.append(scores.exp() / scores.exp().sum(dim=-1, keepdim=True) @ value)
    return torch.cat(outputs, dim=-1) @ block["self_attn.o_proj.weight"].T


def rotate(x: Tensor, config) -> Tensor:
    """Turns each pair (j, j + size/2) of the vector at position p by p * frequency_j."""
    half = x.shape[-1] // 2
    frequencies = torch.tensor([frequency(j / half, config.rope_parameters) for j in range(half)])
    angles = torch.arange(len(x)).double()[:, None] * frequencies.double()
    first, second = x[:, :half], x[:, half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def frequency(place: float, rope: Mapping[str, float]) -> float:
    """theta^-place; Llama 3.1 slows the low frequencies, with a linear ramp in between."""
    value = rope["rope_theta"] ** -place
    if rope["rope_type"] == "default":
        return value
    turns = rope["original_max_position_embeddings"] * value / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = min(1.0, max(0.0, (turns - low) / (high - low)))
    return kept * value + (1 - kept) * value / rope["factor"]
