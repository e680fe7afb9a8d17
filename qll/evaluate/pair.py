"""The dense and the converted model side by side, as the sections of report.json."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from qll.errors import UsageError
from qll.evaluate.cost import bytes_by_dtype, forward_flops
from qll.evaluate.perplexity import compare, leak
from qll.evaluate.roofline import measure_rates
from qll.evaluate.speed import (
    decode_tokens_per_second,
    peak_device_bytes,
    peak_rss_bytes,
    prefill_tokens_per_second,
)
from qll.runtime import Runtime
from qll.train import free_bytes

logger = logging.getLogger("qll.evaluate")

PREFILL_TOKENS, NEW_TOKENS = 512, 16
ROUNDS = 3
# Tokens of the window that is checked for a leak of later tokens, and what rounding may change.
LEAK_TOKENS, LEAK_ROUNDING = 64, 1e-4


def quality_of_pair(
    dense: PreTrainedModel,
    converted: PreTrainedModel,
    windows: Int[Tensor, "windows context"],
    bytes_scored: int,
) -> dict[str, Any]:
    """An entry of quality.texts: scores of both models, KL in nats per token, top-1 agreement.

    `leak` is what each model's logits know of later tokens (`qll.evaluate.leak`): rounding, or the
    scores are not to be believed and a warning says so. Raises what `compare` raises.

    >>> import torch; from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> model = LlamaForCausalLM(config).eval()
    >>> quality_of_pair(model, model, torch.ones(1, 5, dtype=torch.long), 8)["tokens"]
    4
    """
    result = compare(dense, converted, windows, bytes_scored)
    leaks = {"dense": leak(dense, windows[0, :LEAK_TOKENS])}
    leaks["converted"] = leak(converted, windows[0, :LEAK_TOKENS])
    for name, found in leaks.items():
        if found > LEAK_ROUNDING:
            logger.warning(
                "the %s model sees later tokens (a change of the last one moved earlier logits by "
                "%.1e of the largest): its perplexity is not to be believed",
                *(name, found),
            )
    return {
        "tokens": result["dense"].tokens,
        "dense": asdict(result["dense"]),
        "converted": asdict(result["converted"]),
        "kl": result["kl"],
        "top1_agreement": result["top1_agreement"],
        "leak": leaks,
    }


def cost_of_pair(dense: PreTrainedModel, converted: PreTrainedModel) -> dict[str, Any]:
    """The measured part of report.json's cost: tokens per second, FLOPs and peak memory.

    Rates are those of the models in transformers and, under `runtime`, of `qll.runtime`, which
    `generate` uses; that key is missing, with a warning, where the runtime cannot be had.
    """
    models = {"dense": dense, "converted": converted}
    positions = dense.config.max_position_embeddings
    prompt = min(PREFILL_TOKENS, positions // 2)
    rates = _runtime_rates(models, prompt)
    return {
        **({} if rates is None else {"runtime": rates}),
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


def _runtime_rates(models: Mapping[str, PreTrainedModel], prompt: int) -> dict[str, Any] | None:
    """Tokens per second of each phase and model, the models taking turns."""
    first = next(iter(models.values()))
    # a runtime holds the weights once more, in the order its kernels read them
    needed = sum(sum(bytes_by_dtype(model).values()) for model in models.values())
    if needed > free_bytes(first.device):
        logger.warning(
            "speed of `generate` was not measured: it needs %.1f GB more memory", needed / 1e9
        )
        return None
    try:
        runtimes = {name: Runtime.from_model(model) for name, model in models.items()}
    except UsageError as error:
        logger.warning("speed of `generate` was not measured: %s", error)
        return None
    new = min(NEW_TOKENS, first.config.max_position_embeddings - prompt)
    found = measure_rates(runtimes, prompt_tokens=prompt, new_tokens=new, rounds=ROUNDS)
    return {
        f"{phase}_tokens_per_second": {
            name: row["tokens_per_second"] for name, row in found[phase]["rows"].items()
        }
        for phase in ("decode", "prefill")
    }
