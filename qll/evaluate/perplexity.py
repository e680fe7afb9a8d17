"""How well a model predicts a text, and how far a converted model is from the dense one.

Windows do not overlap and the first token of each is not scored (nothing in the window predicts
it), so `windows * (context - 1)` tokens are scored and `bytes_scored` must be the UTF-8 bytes of
exactly those (`qll.load.encode` returns it). Log probabilities are taken in float32 and summed in
float64; logits exist for a few positions at a time.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from qll.errors import NonFiniteError, TextError

logger = logging.getLogger("qll.evaluate")

# Bytes of float32 logits that are held at a time, per model.
LOGIT_BYTES = 64 << 20
# Above this many nats per token, exp() is cut so that the perplexity stays a finite number.
LARGEST_NLL = 700.0


@dataclass(frozen=True)
class Score:
    """Quality of one model on one text."""

    nll: float
    """Mean negative log likelihood of a scored token, in nats."""
    tokens: int
    """Scored tokens: all but the first of each window."""
    ppl: float
    """Perplexity per token, exp(nll)."""
    bits_per_byte: float
    """nll in bits, per byte of the scored text: comparable between tokenizers."""


@torch.inference_mode()
def score(
    model: PreTrainedModel, windows: Int[Tensor, "windows context"], bytes_scored: int
) -> Score:
    """Perplexity of `model` on `windows`, each scored alone from its second token on.

    Raises TextError for windows of one token and NonFiniteError when the model gives NaN.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> model = LlamaForCausalLM(config).eval(); _ = model.lm_head.weight.data.zero_()
    >>> uniform = score(model, torch.ones(2, 5, dtype=torch.long), bytes_scored=16)
    >>> round(uniform.ppl, 4), uniform.tokens
    (10.0, 8)
    """
    total = 0.0
    for chunk in _chunks([model], windows):
        total += _nll(*chunk.log_probs, chunk.targets)
    return _score("the model", total, windows, bytes_scored)


@torch.inference_mode()
def compare(
    dense: PreTrainedModel,
    converted: PreTrainedModel,
    windows: Int[Tensor, "windows context"],
    bytes_scored: int,
) -> dict[str, Score | float]:
    """Both models on the same tokens of the same text, in one pass over it.

    Returns `dense` and `converted` (a Score each), `kl`: mean KL(dense || converted) of the
    next-token distributions in nats per scored token, and `top1_agreement`: the share of scored
    positions at which both models rank the same token first.

    Raises TextError for windows of one token and NonFiniteError when a model gives NaN.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> model = LlamaForCausalLM(config).eval()
    >>> same = compare(model, model, torch.ones(1, 5, dtype=torch.long), bytes_scored=8)
    >>> same["kl"], same["top1_agreement"]
    (0.0, 1.0)
    """
    nll = [0.0, 0.0]
    kl, agree = 0.0, 0
    for chunk in _chunks([dense, converted], windows):
        first, second = chunk.log_probs
        nll[0] += _nll(first, chunk.targets)
        nll[1] += _nll(second, chunk.targets)
        agree += int((first.argmax(-1) == second.argmax(-1)).sum())
        kl += float((first.exp() * (first - second)).sum(-1).cpu().double().sum())
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    return {
        "dense": _score("the dense model", nll[0], windows, bytes_scored),
        "converted": _score("the converted model", nll[1], windows, bytes_scored),
        "kl": kl / tokens,
        "top1_agreement": agree / tokens,
    }


@torch.inference_mode()
def leak(model: PreTrainedModel, window: Int[Tensor, " context"]) -> float:
    """How much logits before the last position change when the last token does: 0 if causal.

    The largest absolute difference, relative to the largest logit. A perplexity is not believed
    unless this is rounding (below 1e-4).
    """
    changed = window.clone()
    changed[-1] = (window[-1] + 1) % model.config.vocab_size
    both = torch.stack([window, changed]).to(model.device)
    logits = model(input_ids=both, use_cache=False).logits[:, :-1].float()
    return float((logits[0] - logits[1]).abs().max() / logits.abs().max())


@dataclass(frozen=True)
class _Chunk:
    """Log probabilities of every model for some scored positions, and the tokens that came."""

    log_probs: list[Float[Tensor, "tokens vocab"]]
    targets: Int[Tensor, " tokens"]


def _chunks(models: list[PreTrainedModel], windows: Tensor) -> Iterator[_Chunk]:
    if windows.shape[1] < 2 or windows.shape[0] < 1:
        raise TextError(
            "nothing to score: every window needs two tokens or more",
            expected="[windows, context >= 2]",
            found=list(windows.shape),
            hint="give a longer text or more tokens",
        )
    place = models[0].device
    step = max(1, LOGIT_BYTES // (4 * models[0].config.vocab_size))
    progress = tqdm(
        total=windows.numel(), desc="evaluate", unit="tok", file=sys.stderr, disable=None
    )
    with progress:
        for window in windows:
            ids = window[None].long()
            hidden = [
                model.model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state[0]
                for model in models
            ]
            for start in range(0, ids.shape[1] - 1, step):
                stop = min(start + step, ids.shape[1] - 1)
                yield _Chunk(
                    [
                        model.lm_head(states[start:stop]).to(place).float().log_softmax(-1)
                        for model, states in zip(models, hidden, strict=True)
                    ],
                    ids[0, start + 1 : stop + 1],
                )
            progress.update(ids.shape[1])


def _nll(log_probs: Tensor, targets: Tensor) -> float:
    chosen = log_probs.gather(-1, targets.to(log_probs.device)[:, None])
    return -float(chosen.cpu().double().sum())


def _score(name: str, total: float, windows: Tensor, bytes_scored: int) -> Score:
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    if not math.isfinite(total):
        raise NonFiniteError(
            f"{name} gives logits that are not finite",
            expected="finite log probabilities",
            found=total,
            hint="its weights or dtype overflow; evaluate in float32 or check with `verify`",
        )
    nll = total / tokens
    if nll > LARGEST_NLL:
        logger.warning("%s: perplexity cut at exp(%g)", name, LARGEST_NLL)
    ppl = math.exp(min(nll, LARGEST_NLL))
    return Score(nll, tokens, ppl, total / math.log(2) / bytes_scored)
