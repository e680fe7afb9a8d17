"""Streams of text: those of transformers, greedy and sampled; speculation changes no text."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from qll.errors import UsageError
from qll.model import generate
from qll.runtime import Acceptance, Runtime, Sampling, best_length, speculate, stream_text, tokens
from qll.runtime.speculate import settle
from qll.runtime.text import decode_pieces, end_tokens
from tests.conftest import make_tiny_llama
from tests.unit.model.conftest import make_tokenizer
from tests.unit.runtime.conftest import flat, make_model


@pytest.fixture(scope="module")
def model():
    return make_tiny_llama(seed=4, vocab_size=259)


@pytest.fixture(scope="module")
def runtime(model):
    return Runtime.from_model(model, flat())


def text(runtime, prompt="tensor network", **settings):
    return "".join(stream_text(runtime, make_tokenizer(), prompt, 20, **settings))


@pytest.mark.parametrize("temperature", [0.0, 0.8, 1.5])
def test_text_is_that_of_transformers(model, runtime, temperature):
    settings = {"temperature": temperature, "top_p": 0.9, "seed": 3}
    expected = "".join(generate(model, make_tokenizer(), "tensor network", 20, **settings))
    assert text(runtime, ends=end_tokens(model), **settings) == expected


def test_the_end_token_ends_the_text(model, runtime):
    assert end_tokens(model) == (2,)
    whole = text(runtime)
    ids = [int(piece) for piece in tokens(runtime, encoded("tensor network"), 20)]
    cut = next(i for i in range(5, 20) if ids[i] not in ids[:i])
    assert text(runtime, ends={ids[cut]}) == "".join(
        decode_pieces(iter(ids[:cut]), make_tokenizer())
    )
    assert len(whole) > cut


def encoded(prompt):
    return make_tokenizer()(prompt, return_tensors="pt")["input_ids"]


def test_no_half_characters_and_no_lost_ones():
    tokenizer = make_tokenizer()
    expected = "naïve — 量子\nnew line 🙂"
    ids = tokenizer(expected)["input_ids"]
    pieces = list(decode_pieces(iter(ids), tokenizer))
    assert "".join(pieces) == expected
    assert len(pieces) > 10
    assert not any("\ufffd" in piece for piece in pieces)
    # bytes that never become a character are shown at the end, as transformers shows them
    assert "".join(decode_pieces(iter(ids[:3]), tokenizer)) == tokenizer.decode(ids[:3])


@pytest.mark.parametrize(
    ("settings", "where"),
    [({"temperature": -1.0}, "temperature"), ({"prompt": ""}, "empty"), ({"chat": True}, "chat")],
)
def test_bad_arguments(runtime, settings, where):
    with pytest.raises(UsageError, match=where):
        text(runtime, **settings)


@pytest.mark.parametrize("name", ["dense", "mixed", "inner"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 4])
def test_speculation_gives_the_text_of_the_model(name, batch, length):
    model = Runtime.from_model(make_model("dense"), flat())
    draft = Runtime.from_model(make_model(name), flat())
    ids = torch.randint(0, 512, (batch, 7), generator=torch.Generator().manual_seed(1))
    expected = torch.cat(list(tokens(model, ids, 21)), 1)
    counts = Acceptance()
    found = torch.cat(list(speculate(model, draft, ids, 21, length=length, counts=counts)), 1)
    assert torch.equal(found, expected)
    assert 0 <= counts.accepted <= counts.proposed
    if name == "dense":  # its own draft is always right
        assert counts.rate == 1.0
        assert counts.rounds == -(-20 // (length + 1))


def test_speculative_text_streams(runtime, model):
    draft = Runtime.from_model(make_tiny_llama(seed=5, vocab_size=259), flat())
    assert text(runtime, draft=draft) == text(runtime)
    other = Runtime.from_model(make_tiny_llama(seed=5), flat())
    with pytest.raises(UsageError, match="different vocabularies"):
        text(runtime, draft=other)


def test_accepted_and_redrawn_tokens_have_the_distribution_of_the_model():
    draw = torch.Generator().manual_seed(0)
    p, q = torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    count, draws = 2, 5000
    truth = p.expand(1, count + 1, 4)
    first = torch.zeros(4)
    second = torch.zeros(4)
    for _ in range(draws):
        drafted = torch.multinomial(q, count, replacement=True, generator=draw)[None]
        settled, _ = settle(drafted, q.expand(1, count, 4), truth, draw)
        first[settled[0, 0]] += 1
        if settled.shape[1] > 1:
            second[settled[0, 1]] += 1
    for seen in (first, second):
        share = seen / seen.sum()
        error = (p * (1 - p) / seen.sum()).sqrt()
        assert ((share - p).abs() < 4 * error).all(), (share, p)


def test_distribution_is_cut_at_top_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert_close(Sampling(1.0).distribution(logits), torch.tensor([0.5, 0.3, 0.15, 0.05]))
    cut = Sampling(1.0, top_p=0.7).distribution(logits)
    assert_close(cut, torch.tensor([0.625, 0.375, 0.0, 0.0]))
    assert_close(Sampling(1.0, top_p=1e-6).distribution(logits), torch.tensor([1.0, 0, 0, 0]))


def test_speculation_pays_only_with_a_cheap_draft():
    length, speed = best_length(0.9, 0.2, [1.0] * 8)
    assert length >= 4
    assert speed > 2
    assert best_length(0.6, 0.85, [1.1] * 8) == (0, 1.0)
    assert best_length(1.0, 0.5, [1.0])[0] == 1
