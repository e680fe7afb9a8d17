"""Bits per byte: every byte counts once, no document sees another, NaN is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from qll.bytelm.evaluate import BOUNDARY, bits_per_byte
from qll.errors import NonFiniteError, TextError, UsageError


class Bigram(nn.Module):
    """Logits that depend on the last byte alone."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(256, 256, generator=generator))

    def forward(self, ids):
        return self.table[ids]


class Remembering(nn.Module):
    """Logits that say how many bytes have been read: a window's start shows in them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, ids):
        seen = torch.arange(1, ids.shape[1] + 1).float() * self.scale
        logits = torch.zeros(*ids.shape, 256)
        logits[..., 65] = seen
        return logits


DOCUMENTS = [b"one text, longer than a window", b"x", b"", b"exactly8"]


@pytest.mark.parametrize(("context", "stride"), [(8, 8), (8, 4), (8, 1), (7, 3), (100, 50)])
def test_a_bigram_needs_the_same_bits_in_any_window(context, stride):
    model = Bigram()
    log_probs = model.table.detach().double().log_softmax(-1) / math.log(2)
    expected = [
        -sum(float(log_probs[a, b]) for a, b in zip(bytes([BOUNDARY]) + text, text, strict=False))
        for text in DOCUMENTS
    ]
    found = bits_per_byte(model, DOCUMENTS, context, stride)
    assert found.bits == pytest.approx(expected, rel=1e-5)
    assert found.bytes == sum(map(len, DOCUMENTS))
    assert found.bits_per_byte == pytest.approx(sum(expected) / found.bytes, rel=1e-5)


def test_bytes_have_the_context_that_is_promised():
    def bits(read: int) -> float:
        return math.log2(math.exp(read) + 255) - read / math.log(2)

    # first window scores positions 1 to 8, every later one its last four
    expected = sum(map(bits, range(1, 9))) + 3 * sum(map(bits, range(5, 9)))
    found = bits_per_byte(Remembering(), [b"A" * 20], context=8, stride=4)
    assert found.bits_per_byte * 20 == pytest.approx(expected, rel=1e-5)
    # the last window is moved back to be full, so that 22 bytes do not leave two with little
    longer = bits_per_byte(Remembering(), [b"A" * 22], context=8, stride=4)
    assert longer.bits_per_byte * 22 == pytest.approx(expected + bits(7) + bits(8), rel=1e-5)


def test_documents_do_not_see_each_other():
    alone = bits_per_byte(Remembering(), [b"AAAA"], context=8).bits
    together = bits_per_byte(Remembering(), [b"AAAA", b"BBBBBBBB", b"AAAA"], context=8).bits
    assert together[0] == together[2] == pytest.approx(alone[0], rel=1e-6)


def test_arrays_are_as_good_as_bytes_and_the_mode_is_left_alone():
    model = Bigram().train()
    array = np.frombuffer(b"some bytes", dtype=np.uint8)
    assert bits_per_byte(model, [array], 4).bits == bits_per_byte(model, [b"some bytes"], 4).bits
    assert model.training


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(TextError, match="no byte"):
        bits_per_byte(Bigram(), [b""], 8)
    with pytest.raises(UsageError, match="stride"):
        bits_per_byte(Bigram(), [b"x"], 8, 9)
    model = Bigram()
    model.table.data[0] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN"):
        bits_per_byte(model, [b"x"], 8)
