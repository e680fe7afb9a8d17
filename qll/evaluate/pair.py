"""The dense and the converted model side by side, as the sections of report.json."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from qll.evaluate.cost import forward_flops
from qll.evaluate.perplexity import compare
from qll.evaluate.speed import (
    decode_tokens_per_second,
    peak_device_bytes,
    peak_rss_bytes,
    prefill_tokens_per_second,
)

PREFILL_TOKENS = 512


def quality_of_pair(
    dense: PreTrainedModel,
    converted: PreTrainedModel,
    windows: Int[Tensor, "windows context"],
    bytes_scored: int,
) -> dict[str, Any]:
    """An entry of quality.texts: scores of both models, KL in nats per token, top-1 agreement.

    Raises what `compare` raises.

    >>> import torch; from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> model = LlamaForCausalLM(config).eval()
    >>> quality_of_pair(model, model, torch.ones(1, 5, dtype=torch.long), 8)["tokens"]
    4
    """
    result = compare(dense, converted, windows, bytes_scored)
    return {
        "tokens": result["dense"].tokens,
        "dense": asdict(result["dense"]),
        "converted": asdict(result["converted"]),
        "kl": result["kl"],
        "top1_agreement": result["top1_agreement"],
    }


def cost_of_pair(dense: PreTrainedModel, converted: PreTrainedModel) -> dict[str, Any]:
    """The measured part of report.json's cost: tokens per second, FLOPs and peak memory."""
    models = {"dense": dense, "converted": converted}
    positions = dense.config.max_position_embeddings
    prompt = min(PREFILL_TOKENS, positions // 2)
    return {
        "decode_tokens_per_second": {
            name: decode_tokens_per_second(model) for name, model in models.items()
        },
        "prefill_tokens_per_second": {
            name: prefill_tokens_per_second(model, tokens=prompt) for name, model in models.items()
        },
        "prefill_tokens": prompt,
        "flops_per_token": {
            name: forward_flops(model, tokens=1, context=prompt) for name, model in models.items()
        },
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": peak_device_bytes(dense.device),
    }
