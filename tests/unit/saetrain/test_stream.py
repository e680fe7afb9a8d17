"""Activations in buffers: the same as the model's own, bounded, without sinks, resumable."""

from __future__ import annotations

import pytest
import torch

from qll.errors import TextError
from qll.lens.hooks import capture
from qll.saetrain import stream as module
from qll.saetrain.stream import Stream

WINDOWS = torch.randint(3, 512, (6, 16), generator=torch.Generator().manual_seed(0))
PLACES = ["layers.0", "layers.1.mlp.input", "layers.1.mlp"]


def stream_of(model, tokens: int = 96, buffer_tokens: int = 32, **more) -> Stream:
    return Stream(model, WINDOWS, PLACES, tokens, buffer_tokens, **more)


def test_a_buffer_holds_the_models_own_activations(tiny_llama):
    stream = stream_of(tiny_llama)
    buffers = list(stream.buffers())
    assert [buffer.read for buffer in buffers] == [32, 64, 96]
    wanted = capture(tiny_llama, WINDOWS[stream.order()[:2]], PLACES)
    for place in PLACES:
        torch.testing.assert_close(buffers[0].values[place], wanted[place].flatten(0, 1))


def test_windows_are_all_read_before_any_is_read_again(tiny_llama):
    order = stream_of(tiny_llama, tokens=16 * 15).order()
    assert sorted(order[:6].tolist()) == sorted(order[6:12].tolist()) == list(range(6))
    assert order[:6].tolist() != order[6:12].tolist()


def test_a_stream_continued_is_the_rest_of_the_stream(tiny_llama):
    whole, rest = (list(stream_of(tiny_llama, seed=5).buffers(first)) for first in (0, 1))
    assert [buffer.number for buffer in rest] == [1, 2]
    for left, right in zip(whole[1:], rest, strict=True):
        assert left.read == right.read
        assert all(torch.equal(left.values[place], right.values[place]) for place in PLACES)


def test_memory_bounds_a_buffer(tiny_llama, monkeypatch):
    monkeypatch.setattr(module, "BUFFER_BYTES", 4 * 3 * 64 * 20)
    assert stream_of(tiny_llama, buffer_tokens=10**9).per_buffer == 1


def test_special_tokens_and_sinks_are_left_out_everywhere(tiny_llama, monkeypatch):
    special = WINDOWS[0, 3].item()
    count = sum(len(buffer) for buffer in stream_of(tiny_llama, special=[special]).buffers())
    assert count == (special != WINDOWS).sum()

    def second_is_a_sink(ids, x, special):
        found = torch.zeros(len(ids), dtype=torch.int64)
        found[1] = 2 if x.norm() > 0 else 0
        return found

    monkeypatch.setattr(module, "token_kinds", second_is_a_sink)
    assert sum(len(buffer) for buffer in stream_of(tiny_llama).buffers()) == 6 * 15


def test_nothing_ordinary_is_said(tiny_llama):
    with pytest.raises(TextError, match="no ordinary token"):
        next(stream_of(tiny_llama, special=range(512)).buffers())
