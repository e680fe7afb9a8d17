"""Perplexity, KL and agreement against identities, transformers' loss and a plain float64 sum."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from qll.errors import NonFiniteError, TextError
from qll.evaluate import compare, leak, perplexity, quality_of_pair, score

WINDOWS, CONTEXT = 3, 20


@pytest.fixture(scope="module")
def windows():
    return torch.randint(0, 512, (WINDOWS, CONTEXT), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def other(tiny_llama):
    """The tiny Llama with noise on every weight."""
    model = copy.deepcopy(tiny_llama)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return model


def log_probs(model, windows):
    """float64 log probabilities of every scored position, from the whole logits."""
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(windows).logits[:, :-1]
    return logits.log_softmax(-1)


@pytest.fixture(params=[1, 7 * 512 * 4, 1 << 26], ids=["one position", "seven", "all"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(perplexity, "LOGIT_BYTES", request.param)


def test_score_equals_transformers_loss(tiny_llama, windows, chunks):
    with torch.no_grad():
        losses = [tiny_llama(row[None], labels=row[None]).loss.item() for row in windows]
    found = score(tiny_llama, windows, bytes_scored=100)
    assert found.nll == pytest.approx(sum(losses) / WINDOWS, rel=1e-6)
    assert found.ppl == pytest.approx(math.exp(found.nll))
    assert found.tokens == WINDOWS * (CONTEXT - 1)
    assert found.bits_per_byte == pytest.approx(found.nll * found.tokens / math.log(2) / 100)


def test_uniform_model_has_the_perplexity_of_its_vocabulary(tiny_llama, windows):
    model = copy.deepcopy(tiny_llama)
    torch.nn.init.zeros_(model.lm_head.weight)
    found = score(model, windows, bytes_scored=WINDOWS * (CONTEXT - 1))
    assert found.ppl == pytest.approx(512, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(9, rel=1e-6)  # one byte a token, 2^9 tokens


def test_a_model_beside_itself(tiny_llama, windows, chunks):
    found = compare(tiny_llama, tiny_llama, windows, 100)
    assert found["kl"] == 0.0
    assert found["top1_agreement"] == 1.0
    assert found["dense"] == found["converted"] == score(tiny_llama, windows, 100)


def test_compare_equals_a_plain_float64_sum(tiny_llama, other, windows, chunks):
    found = compare(tiny_llama, other, windows, 100)
    dense, converted = log_probs(tiny_llama, windows), log_probs(other, windows)
    kl = (dense.exp() * (dense - converted)).sum(-1).mean().item()
    agreement = (dense.argmax(-1) == converted.argmax(-1)).double().mean().item()
    assert found["kl"] == pytest.approx(kl, rel=1e-5)
    assert 0 < found["top1_agreement"] < 1
    assert found["top1_agreement"] == pytest.approx(agreement)
    chosen = converted.gather(-1, windows[:, 1:, None])
    assert found["converted"].nll == pytest.approx(-chosen.mean().item(), rel=1e-6)
    assert found["converted"] == score(other, windows, 100)


def test_kl_is_from_dense_to_converted(tiny_llama, other, windows):
    forward = compare(tiny_llama, other, windows, 100)
    backward = compare(other, tiny_llama, windows, 100)
    assert forward["kl"] > 0
    assert forward["kl"] != pytest.approx(backward["kl"], rel=1e-3)
    assert forward["dense"] == backward["converted"]


def test_windows_are_scored_alone_and_first_tokens_not(tiny_llama, windows):
    together = score(tiny_llama, windows, 100)
    alone = [score(tiny_llama, row[None], 100).nll for row in windows]
    assert together.nll == pytest.approx(sum(alone) / WINDOWS, rel=1e-12)


def test_windows_without_a_scored_token_are_refused(tiny_llama, windows):
    with pytest.raises(TextError, match="nothing to score"):
        score(tiny_llama, windows[:, :1], 1)
    with pytest.raises(TextError, match="nothing to score"):
        score(tiny_llama, windows[:0], 1)


def test_nan_logits_are_refused_and_named(tiny_llama, windows):
    broken = copy.deepcopy(tiny_llama)
    broken.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="the converted model"):
        compare(tiny_llama, broken, windows, 100)
    with pytest.raises(NonFiniteError, match="the model"):
        score(broken, windows, 100)


def test_a_huge_loss_is_cut_with_a_warning(tiny_llama, windows, caplog):
    model = copy.deepcopy(tiny_llama)
    model.lm_head.weight.data *= 1e5
    found = score(model, windows, 100)
    assert found.nll > 700
    assert found.ppl == math.exp(700)
    assert "perplexity cut" in caplog.text


def test_causality_check_passes_a_llama_and_catches_a_leak(tiny_llama, windows, caplog):
    assert leak(tiny_llama, windows[0]) < 1e-5
    leaking = copy.deepcopy(tiny_llama)
    lookup = leaking.model.embed_tokens.register_forward_hook(
        lambda module, arguments, output: output + 0.1 * output.roll(-1, dims=1)
    )
    assert leak(leaking, windows[0]) > 1e-3
    found = quality_of_pair(tiny_llama, leaking, windows, 100)["leak"]
    assert found["dense"] < 1e-5
    assert found["converted"] > 1e-3
    assert "the converted model sees later tokens" in caplog.text
    lookup.remove()
    assert leak(leaking, windows[0]) < 1e-5


def test_progress_goes_to_stderr_only(tiny_llama, windows, capsys):
    score(tiny_llama, windows, 100)
    assert capsys.readouterr().out == ""
