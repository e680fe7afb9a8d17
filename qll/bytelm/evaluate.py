"""Bits per byte of a byte model, with document boundaries and a sliding window.

A document is predicted from its own bytes alone. Its first byte is predicted from BOUNDARY, the
byte 0 that no text contains and that training puts between documents, so that every byte of every
document is scored, as a compressor must code every byte. Later windows overlap: each byte is scored
once, and all but the first `context` bytes of a document with at least `context - stride` bytes
before it. A model that knows nothing needs 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from qll.errors import NonFiniteError, TextError, UsageError

BOUNDARY = 0
TOKENS_AT_ONCE = 1 << 14  # 16 MB of float32 logits


@dataclass(frozen=True)
class BitsPerByte:
    """How well a model predicts some documents."""

    bits_per_byte: float
    bytes: int
    """Scored bytes: all of them."""
    documents: int
    context: int
    """Bytes a window holds."""
    stride: int
    """Bytes a window scores, after the first of its document."""
    bits: tuple[float, ...]
    """Bits that each document takes, in the order given."""


@dataclass(frozen=True)
class Window:
    """Where a window starts in a document, and which of its predictions count."""

    document: int
    start: int
    first: int
    last: int


@torch.inference_mode()
def bits_per_byte(
    model: nn.Module,
    documents: Sequence[bytes | memoryview | np.ndarray],
    context: int,
    stride: int | None = None,
) -> BitsPerByte:
    """Bits that `model` needs per byte of `documents`, read in windows of `context` bytes.

    The model maps int64[batch, seq] to logits[batch, seq, 256]. `stride` is half the context unless
    given. A document may be bytes or an array of uint8 (a memory map stays on disk), or of uint16
    with a language beside every byte (qll/bytelm/languages.py). Raises
    TextError without a byte to score, UsageError for a stride outside 1 to `context`, and
    NonFiniteError when the model gives NaN.

    >>> class Uniform(nn.Module):
    ...     def forward(self, ids): return torch.zeros(*ids.shape, 256)
    >>> round(bits_per_byte(Uniform(), [b"some", b"documents"], context=4).bits_per_byte, 4)
    8.0
    """
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        raise UsageError("out of range", where="stride", expected=f"1 to {context}", found=stride)
    texts = list(map(_ids, documents))
    if not any(map(len, texts)):
        raise TextError("no byte to score", where="the documents", hint="give a longer text")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    training = model.training
    model.eval()
    bits = [0.0] * len(texts)
    plan = list(_windows(texts, context, stride))
    for at in range(0, len(plan), size := max(1, TOKENS_AT_ONCE // context)):
        windows = plan[at : at + size]
        ids, targets = _batch(texts, windows, context)
        nats = _nats(model, ids.to(device), targets.to(device))
        for window, row in zip(windows, nats, strict=True):
            scored = row[window.first - window.start : window.last - window.start]
            bits[window.document] += float(scored.sum()) / math.log(2)
    model.train(training)
    total = sum(map(len, texts))
    return BitsPerByte(sum(bits) / total, total, len(texts), context, stride, tuple(bits))


def _ids(document: bytes | memoryview | np.ndarray) -> np.ndarray:
    if isinstance(document, np.ndarray):
        return document
    return np.frombuffer(document, dtype=np.uint8)


def _windows(texts: Sequence[np.ndarray], context: int, stride: int) -> Iterator[Window]:
    """Windows that score every byte once; the last of a document is moved back to be full."""
    for index, text in enumerate(texts):
        done, start = 0, 0
        while done < len(text):
            end = min(start + context, len(text))
            start = max(0, end - context)
            yield Window(index, start, done, end)
            done, start = end, start + stride


def _batch(
    texts: Sequence[np.ndarray], windows: Sequence[Window], context: int
) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    """Inputs and targets; a document shorter than the window is padded after its end."""
    longest = max(min(context, len(texts[window.document]) - window.start) for window in windows)
    targets = np.full((len(windows), longest), BOUNDARY, dtype=np.int64)
    ids = np.full((len(windows), longest), BOUNDARY, dtype=np.int64)
    for row, window in enumerate(windows):
        text = texts[window.document]
        piece = text[window.start : window.start + context]
        targets[row, : len(piece)] = piece & 0xFF
        # the boundary is in the language of what it begins
        ids[row, 0] = text[window.start - 1] if window.start else BOUNDARY + (int(text[0]) & ~0xFF)
        ids[row, 1 : len(piece)] = piece[:-1]
    return torch.from_numpy(ids), torch.from_numpy(targets)


def _nats(
    model: nn.Module, ids: Int[Tensor, "batch seq"], targets: Int[Tensor, "batch seq"]
) -> Tensor:
    """Negative log likelihood of each target, in nats, float64 on the CPU."""
    log_probs = model(ids).float().log_softmax(dim=-1)
    nats = -log_probs.gather(-1, targets[..., None])[..., 0].cpu().double()
    if not torch.isfinite(nats).all():
        raise NonFiniteError("gives NaN or infinity", where="the model", hint="train it again")
    return nats
