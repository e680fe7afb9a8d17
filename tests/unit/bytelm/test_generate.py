"""What is written is what the model says: state and whole sequence agree, bytes always decode."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qll.bytelm.config import MixerConfig, ModelConfig
from qll.bytelm.evaluate import BOUNDARY
from qll.bytelm.generate import candidates, encode_prompt, generate, generate_bytes
from qll.bytelm.model import ByteModel
from qll.bytelm.repetition import distinct_n, longest_repeat, rep_n
from qll.bytelm.rerank import log_probabilities, rerank
from qll.bytelm.sampling import SamplingOptions
from qll.errors import NonFiniteError, UsageError

GREEDY = SamplingOptions(temperature=0.0)


@pytest.fixture(scope="module")
def model() -> ByteModel:
    torch.manual_seed(0)
    model = ByteModel(ModelConfig(d_model=32, n_layers=2, n_heads=2, context=16)).eval()
    with torch.no_grad():
        model.head.weight.mul_(40)  # far from uniform, so that a mistake shows
    return model


def test_logits_of_generation_are_those_of_the_whole_sequence(model, monkeypatch):
    seen, plain = [], model.step

    def step(ids, state):
        logits, state = plain(ids, state)
        seen.append(logits[0, -1].clone())
        return logits, state

    monkeypatch.setattr(model, "step", step)
    written = bytes(generate_bytes(model, b"abc", 40, SamplingOptions("creative"), seed=3))
    monkeypatch.undo()
    assert len(seen) > model.config.context  # beyond the window too
    with torch.inference_mode():
        logits = model(torch.tensor([[BOUNDARY, *b"abc", *written]]))[0, 3:]
    torch.testing.assert_close(torch.stack(seen), logits[: len(seen)], rtol=0, atol=1e-4)


def test_greedy_text_is_the_argmax_under_the_mask(model):
    written = bytes(generate_bytes(model, b"x", 12, GREEDY))
    with torch.inference_mode():
        logits = model(torch.tensor([[BOUNDARY, *b"x", *written]]))[0, 1:]
    from qll.bytelm.utf8 import state_after

    for place, byte in enumerate(written):
        allowed = torch.tensor(state_after(b"x" + written[:place]).allowed(12 - place))
        assert byte == logits[place].masked_fill(~allowed, -torch.inf).argmax()


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 20), prompt=st.text(max_size=3))
def test_what_is_written_always_decodes(model, seed, size, prompt):
    hot = SamplingOptions(temperature=3.0, top_k=0, top_p=1.0)
    written = bytes(generate_bytes(model, prompt.encode(), size, hot, seed=seed, slide=True))
    assert len(written) <= size
    written.decode()
    pieces = list(generate(model, prompt, size, hot, seed=seed, slide=True))
    assert "".join(pieces).encode() == written
    assert all(pieces)


def test_the_same_seed_writes_the_same_and_neighbours_do_not_matter(model):
    hot = SamplingOptions("creative")
    alone = [bytes(generate_bytes(model, b"q", 10, hot, seed=seed)) for seed in (1, 2, 3)]
    assert alone == candidates(model, b"q", 10, hot, seeds=(1, 2, 3))
    assert len(set(alone)) > 1


def test_the_boundary_ends_what_is_written(model):
    ending = ByteModel(model.config).eval()
    ending.load_state_dict(model.state_dict())
    with torch.no_grad():
        ending.head.weight.zero_()  # all logits equal: greedy takes the first byte, the boundary
    assert list(generate(ending, "abc", 10, GREEDY)) == []
    assert candidates(ending, b"abc", 10, GREEDY, seeds=(0, 1)) == [b"", b""]


def test_a_prompt_that_does_not_fit_is_refused_or_cut(model):
    with pytest.raises(UsageError, match=r"--prompt: longer than .*at most 15 bytes, found 16"):
        list(generate(model, "a" * 16, 3))
    assert "".join(generate(model, "a" * 15, 3, GREEDY)) is not None
    long = bytes(generate_bytes(model, b"zz" + b"abcd" * 4, 5, GREEDY, slide=True))
    other = bytes(generate_bytes(model, b"yy" + b"abcd" * 4, 5, GREEDY, slide=True))
    assert long == other


def test_recurrent_parts_read_all_of_a_long_prompt(model):
    mixer = MixerConfig(pattern=("interference", "attention"))
    config = dataclasses.replace(model.config, n_layers=2, mixer=mixer)
    torch.manual_seed(0)
    recurrent = ByteModel(config).eval()
    prompt = b"zz" + b"abcd" * 7
    with torch.inference_mode():
        state = recurrent.initial_state(1)
        for byte in bytes([BOUNDARY]) + prompt:
            logits, state = recurrent.step(torch.tensor([[byte]]), state)
    seen = []
    whole = recurrent.step

    def step(ids, state):
        found = whole(ids, state)
        seen.append(found[0][0, -1])
        return found

    recurrent.step = step
    list(generate_bytes(recurrent, prompt, 1, GREEDY, slide=True))
    torch.testing.assert_close(seen[-1], logits[0, -1], rtol=1e-4, atol=1e-5)


def test_an_empty_prompt_starts_a_document_and_emoji_are_prompts(model):
    assert isinstance("".join(generate(model, "", 4)), str)
    assert isinstance("".join(generate(model, "\U0001f600", 4)), str)


def test_bad_arguments_and_broken_models_are_refused(model):
    with pytest.raises(UsageError, match="max_new_tokens"):
        list(generate(model, "a", 0))
    with pytest.raises(UsageError, match="not valid text"):
        encode_prompt("\udcff")
    broken = ByteModel(model.config).eval()
    with torch.no_grad():
        broken.head.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="NaN"):
        list(generate(broken, "a", 2))


def test_log_probabilities_are_chained(model):
    both = log_probabilities(model, b"ab", [b"cd"])[0]
    parts = log_probabilities(model, b"ab", [b"c"])[0] + log_probabilities(model, b"abc", [b"d"])[0]
    assert both == pytest.approx(parts, rel=1e-4)


def test_rerank_prefers_the_likely_and_punishes_repetition(model):
    greedy = bytes(generate_bytes(model, b"ab", 8, GREEDY))
    unlikely = b"\x7f" * len(greedy)
    ranked = rerank(model, b"ab", [unlikely, b"", greedy], coherence=0.0)
    assert [item.text for item in ranked] == [greedy, unlikely, b""]
    loop, plain = b"abcdefgh" * 4, bytes(range(40, 72))
    scores = {item.text: item for item in rerank(model, b"ab", [loop, plain], repetition=100.0)}
    assert scores[loop].repetition > 0.5 > scores[plain].repetition == 0.0
    assert scores[plain].score > scores[loop].score
    # without a prompt nothing is owed to one
    assert all(abs(item.coherence) < 1e-6 for item in rerank(model, b"", [loop, plain]))


@given(st.binary(max_size=60), st.integers(1, 5))
def test_repetition_measures(data, n):
    assert 0 <= rep_n(data, n) < 1
    assert rep_n(data, n) == pytest.approx(1 - distinct_n(data, n))
    size = longest_repeat(data)
    if size:
        assert any(data.find(data[i : i + size], i + 1) > 0 for i in range(len(data)))
    grams = [data[i : i + size + 1] for i in range(len(data) - size)]
    assert len(set(grams)) == len(grams)
