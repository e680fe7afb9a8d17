"""Samplers hold their promises on any logits; hypothesis looks for a counterexample."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qll.bytelm import samplers
from qll.bytelm.sampling import PRESETS, SamplingOptions
from qll.errors import UsageError

finite = st.floats(-30, 30, width=32)
logits_of = st.lists(finite, min_size=2, max_size=24).map(torch.tensor)
shares = st.floats(0.01, 1.0)
some = settings(max_examples=100, deadline=None)


def kept(logits):
    return logits > -math.inf


@some
@given(logits_of)
def test_temperature_zero_is_argmax(logits):
    left = samplers.temperature(logits, 0.0)
    assert kept(left).sum() == 1
    assert left.argmax() == logits.argmax()
    drawn = samplers.draw(left, torch.Generator().manual_seed(1))
    assert logits[drawn] == logits.max()


@some
@given(logits_of, st.floats(2e-38, 100.0))
def test_any_positive_temperature_keeps_the_order(logits, value):
    left = samplers.temperature(logits, value)
    assert not left.isnan().any()
    assert not left.isposinf().any()
    assert left[logits.argmax()] == left.max()
    order = logits.argsort(stable=True)
    assert (left[order].diff().nan_to_num(0.0) >= 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
def test_a_temperature_that_is_none_is_refused(value):
    with pytest.raises(UsageError, match="temperature"):
        samplers.temperature(torch.zeros(2), value)
    with pytest.raises(UsageError, match="--temperature"):
        SamplingOptions(temperature=value)


@some
@given(logits_of, st.integers(0, 30))
def test_top_k_keeps_exactly_the_k_largest(logits, k):
    left = samplers.top_k(logits, k)
    wanted = min(k, len(logits)) if k else len(logits)
    assert kept(left).sum() == wanted
    if wanted < len(logits):
        assert logits[kept(left)].min() >= logits[~kept(left)].max()
    assert (left[kept(left)] == logits[kept(left)]).all()


@some
@given(logits_of, shares)
def test_top_p_keeps_the_smallest_set_with_the_mass(logits, p):
    left = samplers.top_p(logits, p)
    probabilities = logits.double().softmax(-1)
    mass = probabilities[kept(left)].sum()
    assert mass >= p - 1e-9
    # without its least likely member the set would be too light
    assert mass - probabilities[kept(left)].min() < p + 1e-9
    if not kept(left).all():
        assert probabilities[kept(left)].min() >= probabilities[~kept(left)].max()


@pytest.mark.parametrize("p", [0.0, -0.1, 1.1, math.nan, math.inf])
def test_a_top_p_outside_its_range_is_refused(p):
    with pytest.raises(UsageError, match="top_p"):
        samplers.top_p(torch.zeros(2), p)
    with pytest.raises(UsageError, match="--top_p"):
        SamplingOptions(top_p=p)


@some
@given(logits_of, st.floats(0.0, 1.0))
def test_min_p_keeps_what_is_near_the_most_likely(logits, share):
    left = samplers.min_p(logits, share)
    assert kept(left)[logits.argmax()]
    probabilities = logits.double().softmax(-1)
    least = share * probabilities.max()
    assert (probabilities[kept(left)] >= least * (1 - 1e-5)).all()
    assert (probabilities[~kept(left)] <= least * (1 + 1e-5)).all()


@some
@given(logits_of, st.lists(st.integers(0, 1), max_size=9), st.floats(1.0, 5.0))
def test_the_repetition_penalty_never_raises_and_counts_once(logits, history, penalty):
    left = samplers.repetition_penalty(logits, history, penalty)
    assert (left <= logits).all()
    assert torch.equal(left, samplers.repetition_penalty(logits, history * 3, penalty))
    seen = torch.zeros_like(logits, dtype=torch.bool)
    seen[torch.tensor(sorted(set(history)), dtype=torch.long)] = True
    assert torch.equal(left[~seen], logits[~seen])
    expected = torch.where(logits > 0, logits / penalty, logits * penalty)
    assert torch.equal(left[seen], expected[seen])


@some
@given(st.binary(max_size=30), st.integers(1, 4))
def test_no_ngram_is_written_twice(history, n):
    left = samplers.no_repeat_ngram(torch.zeros(256), history, n)
    grams = {history[i : i + n] for i in range(len(history) - n + 1)}
    last = history[len(history) - n + 1 :]
    if len(history) >= n:
        for byte in range(256):
            assert bool(kept(left)[byte]) != (last + bytes([byte]) in grams)
    else:
        assert kept(left).all()


def test_an_ngram_ban_that_leaves_nothing_is_lifted():
    logits = torch.full((256,), -math.inf)
    logits[7] = 1.0
    assert torch.equal(samplers.no_repeat_ngram(logits, bytes([7, 7]), 1), logits)


@some
@given(st.binary(max_size=40), st.integers(1, 5))
def test_dry_finds_the_longest_match(history, length):
    left = samplers.dry_penalty(torch.zeros(256), history, 2.0, length)
    for byte in range(256):
        longest = 0
        for end in range(1, len(history)):
            if history[end] == byte:
                match = 0
                while match < end and history[end - 1 - match] == history[-1 - match]:
                    match += 1
                longest = max(longest, match)
        expected = -2.0 * 1.75 ** (longest - length) if longest >= length else 0.0
        assert left[byte] == pytest.approx(expected, rel=1e-5)


def test_dry_stays_finite_and_fast_on_the_worst_history():
    left = samplers.dry_penalty(torch.zeros(256), b"a" * 5000, 1.0, 4)
    assert left[ord("a")] < -1e6
    assert torch.isfinite(left).all()


@some
@given(logits_of, st.floats(0.1, 2.0), st.floats(0.0, 2.0))
def test_entropy_cooling_only_cools(logits, value, cooling):
    found = float(samplers.entropy_temperature(logits, value, cooling))
    assert 0 <= found <= value * (1 + 1e-6)
    flatter = float(samplers.entropy_temperature(logits / 2, value, cooling))
    assert flatter >= found - 1e-6
    assert float(samplers.entropy_temperature(logits, value, 0.0)) == pytest.approx(value)


options_of = st.builds(
    SamplingOptions,
    preset=st.sampled_from(sorted(PRESETS)),
    temperature=st.none() | st.floats(0.0, 3.0),
    top_k=st.none() | st.integers(0, 300),
    top_p=st.none() | shares,
    min_p=st.floats(0.0, 1.0),
    repetition_penalty=st.floats(1.0, 3.0),
    no_repeat_ngram=st.integers(0, 4),
    dry=st.floats(0.0, 2.0),
    dry_length=st.integers(1, 5),
    entropy_cooling=st.floats(0.0, 2.0),
)


@some
@given(options_of, st.binary(max_size=40), st.integers(0, 1000))
def test_all_samplers_together_leave_a_byte_to_draw(options, history, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 20 * torch.randn(256, generator=generator)
    left = samplers.shape_logits(logits, history, options.resolved())
    assert not left.isnan().any()
    assert kept(left).any()
    assert kept(left)[samplers.draw(left, generator)]


def test_draws_have_the_probabilities_of_the_logits():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.6, 0.3, 0.1]).log()
    drawn = torch.tensor([samplers.draw(logits, generator) for _ in range(4000)])
    shares = torch.bincount(drawn, minlength=3) / 4000
    assert shares.tolist() == pytest.approx([0.6, 0.3, 0.1], abs=0.03)


def test_presets_are_those_of_the_seed_and_flags_go_before_them():
    assert SamplingOptions("conservative").resolved().top_k == 30
    assert SamplingOptions().resolved().temperature == 0.7
    assert SamplingOptions("creative", temperature=0.0).resolved().temperature == 0.0
    with pytest.raises(UsageError, match="--min_p"):
        SamplingOptions(min_p=1.5)
    with pytest.raises(UsageError, match="--repetition_penalty"):
        SamplingOptions(repetition_penalty=0.5)
