"""Streaming generation, and the sandbox around chat templates."""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest
import torch

from qll.errors import UnsafeCheckpointError, UsageError
from qll.model import generate
from qll.model.generate import end_idle_threads
from tests.conftest import make_tiny_llama
from tests.unit.model.conftest import make_tokenizer


@pytest.fixture(scope="module")
def model():
    return make_tiny_llama(seed=4, vocab_size=259)


def text(model, tokenizer, prompt="tensor network", **settings):
    return "".join(generate(model, tokenizer, prompt, **({"max_new_tokens": 12} | settings)))


def test_greedy_equals_transformers(model):
    tokenizer = make_tokenizer()
    ids = tokenizer("tensor network", return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert text(model, tokenizer) == expected
    assert len(expected) > 3


def test_pieces_come_one_by_one_and_closing_stops_the_model(model):
    before = threading.active_count()
    pieces = generate(model, make_tokenizer(), "a b c d", max_new_tokens=200, temperature=1.0)
    assert next(pieces)
    pieces.close()
    assert threading.active_count() == before


def test_sampling_is_seeded_and_leaves_the_global_generator_alone(model):
    tokenizer = make_tokenizer()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    one = text(model, tokenizer, temperature=1.5, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert one == text(model, tokenizer, temperature=1.5, seed=1)
    assert one != text(model, tokenizer, temperature=1.5, seed=2)
    nucleus = text(model, tokenizer, temperature=1.5, seed=1, top_p=1e-6)
    assert nucleus == text(model, tokenizer)


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"max_new_tokens": 10**6}, "context"),
        ({"prompt": ""}, "empty"),
        ({"chat": True}, "no chat template"),
    ],
)
def test_bad_arguments(model, settings, where):
    with pytest.raises(UsageError, match=where):
        text(model, make_tokenizer(), **settings)


def test_errors_in_the_thread_reach_the_reader(model, monkeypatch):
    def broken(**_):
        raise RuntimeError("in the thread")

    monkeypatch.setattr(model, "generate", broken)
    with pytest.raises(RuntimeError, match="in the thread"):
        text(model, make_tokenizer())


ATTACKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch PWNED') }}",
    "{% set x = messages.append({}) %}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{% for m in messages %}",
    "{{ range(10 ** 9) | list }}",
    "{{ 1 / 0 }}",
    "{{ messages + 1 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
]


@pytest.mark.parametrize("template", ATTACKS)
def test_template_that_attacks(model, template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UnsafeCheckpointError, match="chat template"):
        text(model, tokenizer, chat=True)
    assert not list(tmp_path.iterdir())
    assert text(model, tokenizer), "without chat the template is never rendered"


def test_template_is_used_on_request(model, monkeypatch):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "<s>{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    seen = {}

    def record(**settings):
        seen["ids"] = settings["input_ids"]
        settings["streamer"].end()

    monkeypatch.setattr(model, "generate", record)
    text(model, tokenizer, prompt="hi", chat=True)
    assert tokenizer.decode(seen["ids"][0]) == "<s>[user] hi"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_idle_threads_of_the_caller_end_and_come_back():
    def computed() -> set[str]:
        """The threads that are there after a product of matrices and were not before."""
        before = set(os.listdir("/proc/self/task"))
        assert (torch.ones(512, 512) @ torch.ones(512, 512) == 512).all()
        return set(os.listdir("/proc/self/task")) - before

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        end_idle_threads()
        made = computed()
        assert made
        assert not computed()
        end_idle_threads()
        deadline = time.monotonic() + 10
        while made & set(os.listdir("/proc/self/task")):
            assert time.monotonic() < deadline, "still there"
            time.sleep(0.01)
        assert computed()
    finally:
        torch.set_num_threads(threads)
