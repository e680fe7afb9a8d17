"""The best of several continuations: likely, about the prompt, and not repeating itself.

    score = L + coherence (L - log p(c) / n) - repetition rep-8(c),    L = log p(c | prompt) / n

over the n bytes of a continuation c; the middle term is the pointwise mutual information of prompt
and continuation (Li et al. 2016, arXiv 1510.03055). It needs no phases: the real twin has it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qll.bytelm.evaluate import BOUNDARY
from qll.bytelm.model import ByteModel
from qll.bytelm.repetition import rep_n

COHERENCE = 0.5
REPETITION = 1.0  # nats per byte, for a text that is nothing but repetition
REPEATED_BYTES = 8


@dataclass(frozen=True)
class Ranked:
    """A continuation and why it stands where it does."""

    text: bytes
    score: float
    likelihood: float
    """Mean log probability of its bytes after the prompt, in nats."""
    coherence: float
    """How much of that it owes to the prompt, in nats per byte."""
    repetition: float
    """Share of its 8-grams that stand in it already."""


def rerank(
    model: ByteModel,
    prompt: bytes,
    texts: Sequence[bytes],
    coherence: float = COHERENCE,
    repetition: float = REPETITION,
) -> list[Ranked]:
    """`texts` from the best to the worst continuation of `prompt`; empty ones come last.

    >>> from qll.bytelm.config import ModelConfig
    >>> model = ByteModel(ModelConfig(d_model=32, n_layers=1, context=8)).eval()
    >>> [len(ranked.text) for ranked in rerank(model, b"ab", [b"", b"abcdefgh" * 4])]
    [32, 0]
    """
    after = log_probabilities(model, prompt, texts)
    alone = log_probabilities(model, b"", texts)
    ranked = []
    for text, given, prior in zip(texts, after, alone, strict=True):
        size = max(1, len(text))
        likelihood, owed = given / size, (given - prior) / size
        repeated = rep_n(text, REPEATED_BYTES)
        score = likelihood + coherence * owed - repetition * repeated
        ranked.append(Ranked(text, score if text else float("-inf"), likelihood, owed, repeated))
    return sorted(ranked, key=lambda item: -item.score)


@torch.inference_mode()
def log_probabilities(model: ByteModel, prompt: bytes, texts: Sequence[bytes]) -> list[float]:
    """log p(text | prompt) of each text, in nats; the prompt starts a document.

    >>> from qll.bytelm.config import ModelConfig
    >>> model = ByteModel(ModelConfig(d_model=32, n_layers=1, context=8)).eval()
    >>> log_probabilities(model, b"ab", [b""])
    [0.0]
    """
    rows = [[BOUNDARY, *prompt, *text] for text in texts]
    longest = max(map(len, rows))
    padded = torch.tensor([row + [BOUNDARY] * (longest - len(row)) for row in rows])
    logits = model(padded.to(model.embedding.weight.device)).float().cpu()
    log_probs = _of_next(logits, padded)
    start = len(prompt)
    return [
        float(row[start : start + len(text)].double().sum())
        for row, text in zip(log_probs, texts, strict=True)
    ]


def _of_next(logits: Float[Tensor, "batch seq 256"], ids: Tensor) -> Float[Tensor, "batch next"]:
    """Log probability of each byte but the first."""
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
