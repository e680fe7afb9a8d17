"""Seconds and memory, measured: decode and prefill rates, peak memory of process and device.

Rates are medians of several runs after one that warms up, on the machine and with the threads at
hand; they are numbers for reports, never for tests.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from qll.model.dense import CACHE_ARGUMENT


@torch.inference_mode()
def decode_tokens_per_second(
    model: PreTrainedModel, *, prompt_tokens: int = 64, new_tokens: int = 32, repeats: int = 3
) -> float:
    """Tokens per second of greedy decoding with a key/value cache, batch 1, median of `repeats`.

    Only the steps after the prompt are timed; generation does not stop at an end-of-text token.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> decode_tokens_per_second(LlamaForCausalLM(config).eval(), new_tokens=2, repeats=1) > 0
    True
    """
    prompt = _some_ids(model, prompt_tokens)
    return _median_rate(lambda: greedy(model, prompt, new_tokens)[1], new_tokens, repeats)


@torch.inference_mode()
def prefill_tokens_per_second(
    model: PreTrainedModel, tokens: int = 512, *, repeats: int = 3
) -> float:
    """Tokens per second of reading a prompt of `tokens`, batch 1, median of `repeats`.

    Only the last position's logits are computed, as when a generation begins.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> prefill_tokens_per_second(LlamaForCausalLM(config).eval(), 16, repeats=1) > 0
    True
    """
    prompt = _some_ids(model, tokens)

    def prefill() -> float:
        start = _now(model.device)
        model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        return _now(model.device) - start

    return _median_rate(prefill, tokens, repeats)


@torch.inference_mode()
def greedy(
    model: PreTrainedModel, prompt: Int[Tensor, "1 seq"], new_tokens: int
) -> tuple[Int[Tensor, "1 new"], float]:
    """The likeliest token after `prompt`, then `new_tokens` more, each behind all before it.

    Returns those 1 + new_tokens ids and the seconds that the cached steps took, prompt excluded.
    """
    result = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    ids = [result.logits[:, -1:].argmax(-1)]
    start = _now(model.device)
    for _ in range(new_tokens):
        result = model(
            input_ids=ids[-1],
            use_cache=True,
            logits_to_keep=1,
            **{CACHE_ARGUMENT: result.past_key_values},
        )
        ids.append(result.logits[:, -1:].argmax(-1))
    return torch.cat(ids, dim=1), _now(model.device) - start


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far.

    >>> peak_rss_bytes() > 10_000_000
    True
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def peak_device_bytes(device: str | torch.device) -> int:
    """Largest memory of tensors on `device` so far: 0 on the CPU, the present value on MPS, which
    keeps no maximum.

    >>> peak_device_bytes("cpu")
    0
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if kind == "mps":
        return torch.mps.driver_allocated_memory()
    return 0


def _some_ids(model: PreTrainedModel, count: int) -> Tensor:
    """A prompt of `count` different ids; which ones does not change how long a pass takes."""
    return (torch.arange(count, device=model.device) % model.config.vocab_size)[None]


def _median_rate(run: Callable[[], float], tokens: int, repeats: int) -> float:
    run()
    return tokens / statistics.median(run() for _ in range(repeats))


def _now(device: torch.device) -> float:
    """Seconds, once all work given to `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
