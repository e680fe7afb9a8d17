"""The best of several continuations: likely, about the prompt, and not repeating itself.

    score = L + coherence (L - log p(c) / n) - repetition rep-8(c),    L = log p(c | prompt) / n

over the n bytes of a continuation c; the middle term is the pointwise mutual information of prompt
and continuation (Li et al. 2016, arXiv 1510.03055). It needs no phases: the real twin has it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qll.bytelm.config import VOCAB
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
    language: int = 0,
) -> list[Ranked]:
    """`texts` from the best to the worst continuation of `prompt`; empty ones come last.

    language: the number of theirs, 0 for none.

    >>> from qll.bytelm.config import ModelConfig
    >>> model = ByteModel(ModelConfig(d_model=32, n_layers=1, context=8)).eval()
    >>> [len(ranked.text) for ranked in rerank(model, b"ab", [b"", b"abcdefgh" * 4])]
    [32, 0]
    """
    after = log_probabilities(model, prompt, texts, language)
    alone = log_probabilities(model, b"", texts, language)
    ranked = []
    for text, given, prior in zip(texts, after, alone, strict=True):
        size = max(1, len(text))
        likelihood, owed = given / size, (given - prior) / size
        repeated = rep_n(text, REPEATED_BYTES)
        score = likelihood + coherence * owed - repetition * repeated
        ranked.append(Ranked(text, score if text else float("-inf"), likelihood, owed, repeated))
    return sorted(ranked, key=lambda item: -item.score)


@torch.inference_mode()
def log_probabilities(
    model: ByteModel, prompt: bytes, texts: Sequence[bytes], language: int = 0
) -> list[float]:
    """log p(text | prompt) of each text, in nats; the prompt starts a document.

    language: the number of theirs, 0 for none.

    >>> from qll.bytelm.config import ModelConfig
    >>> model = ByteModel(ModelConfig(d_model=32, n_layers=1, context=8)).eval()
    >>> log_probabilities(model, b"ab", [b""])
    [0.0]
    """
    device = model.embedding.weight.device
    longest = max(map(len, texts), default=0)
    if longest == 0:
        return [0.0] * len(texts)
    tag = VOCAB * language
    start = torch.tensor([[BOUNDARY, *prompt]], device=device) + tag
    first, state = model.step(start, model.initial_state(1, device))
    # the prompt is read once: its state is shared by all texts
    state = state.map(lambda tensor: tensor.expand(len(texts), *tensor.shape[1:]))
    ids = torch.tensor([[*text, *[BOUNDARY] * (longest - len(text))] for text in texts])
    logits = first[:, -1:].expand(len(texts), -1, -1)
    if longest > 1:
        later, _ = model.step(ids[:, :-1].to(device) + tag, state)
        logits = torch.cat((logits, later), dim=1)
    log_probs = logits.float().log_softmax(-1).cpu().gather(-1, ids[..., None])[..., 0]
    return [
        float(row[: len(text)].double().sum()) for row, text in zip(log_probs, texts, strict=True)
    ]
