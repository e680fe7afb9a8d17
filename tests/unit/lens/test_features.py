"""The cache of codes, examples from it, and what a feature writes, against direct computation."""

from __future__ import annotations

import pytest
import torch

from qll.errors import IntegrityError, MissingTensorError, UsageError
from qll.lens import CodeCache, direct_attribution, logit_lens, top_examples, write_cache
from qll.lens.features import logit_weights
from qll.lens.hooks import capture, hooked
from tests.conftest import make_tiny_llama
from tests.unit.lens.conftest import random_sae
from tests.unit.model.conftest import make_tokenizer


@pytest.fixture(scope="module")
def model():
    return make_tiny_llama(seed=4, vocab_size=259)


@pytest.fixture(scope="module")
def texts():
    return torch.randint(3, 259, (5, 20), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def saes():
    places = ("layers.0", "layers.1")
    return {place: random_sae(hookpoint=place, seed=n) for n, place in enumerate(places)}


@pytest.fixture(scope="module")
def cache(model, saes, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("codes") / "cache"
    return write_cache(model, saes, texts, folder, special=[9], shard_tokens=45)


def test_the_cache_holds_the_codes(model, saes, texts, cache):
    assert cache.hookpoints == ["layers.0", "layers.1"]
    assert torch.equal(CodeCache(cache.folder).windows, texts)
    assert len(list((cache.folder / "layers.0").iterdir())) == 3, "two windows a shard"
    for place, sae in saes.items():
        seen = list(cache.codes(place))
        assert [number for number, _ in seen] == [0, 1, 2, 3, 4]
        for number, codes in seen:
            x = capture(model, texts[number][None], [place])[place][0]
            expected = sae.encode(x)
            assert torch.equal(codes.indices, expected.indices)
            torch.testing.assert_close(codes.values, expected.values, rtol=5e-3, atol=0)
    assert torch.equal(cache.kinds("layers.0") == 1, texts == 9)


def test_cache_errors(model, saes, texts, cache, tmp_path):
    with pytest.raises(UsageError, match="finished cache"):
        write_cache(model, saes, texts, cache.folder)
    with pytest.raises(MissingTensorError, match=r"layers\.0, layers\.1"):
        next(cache.codes("embed_tokens"))
    with pytest.raises(IntegrityError, match="never finished"):
        _ = CodeCache(tmp_path).facts


def test_examples_are_the_strongest_windows(cache, texts):
    peaks = torch.stack([codes.dense(96).amax(0) for _, codes in cache.codes("layers.1")])
    feature = int(peaks.amin(0).argmax())
    never = int((peaks.amax(0) == 0).nonzero()[0])
    found = top_examples(
        cache.codes("layers.1"), cache.windows, [feature, never], make_tokenizer(), count=3
    )
    assert found[never] == []
    order = peaks[:, feature].argsort(descending=True)[:3].tolist()
    assert [example.window for example in found[feature]] == order
    best = found[feature][0]
    assert best.activation == max(best.activations) == float(peaks[order[0], feature])
    assert len(best.tokens) == len(best.activations)
    position = best.activations.index(best.activation)
    token = texts[best.window, best.position]
    assert best.tokens[position] == make_tokenizer().decode([int(token)])


def test_logit_lens_is_the_head_on_the_direction(model, saes):
    sae = saes["layers.1"]
    direction = sae.directions([7])[0]
    expected = model.lm_head.weight @ (model.model.norm.weight * direction)
    weights = logit_weights(model, sae, 7)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)
    found = logit_lens(model, sae, 7, make_tokenizer(), count=4)
    assert found["promoted"][0]["weight"] == pytest.approx(float((weights - weights.mean()).max()))
    assert found["suppressed"][0]["weight"] < 0 < found["promoted"][3]["weight"]


@torch.no_grad()
def test_attribution_is_the_difference_at_the_last_block(model, saes, texts):
    """At the last place the direct path is the only one: take the feature away, scale held."""
    sae, window = saes["layers.1"], texts[0]
    x = capture(model, window[None], ["layers.1"])["layers.1"][0]
    codes = sae.encode(x)
    feature = int(codes.indices.flatten().mode().values)
    scale = torch.rsqrt(x.square().mean(1, keepdim=True) + model.config.rms_norm_eps)
    written = codes.of(feature)[:, None] * sae.directions([feature])
    logits = [model.lm_head(model.model.norm.weight * v * scale) for v in (x, x - written)]
    steps = torch.arange(len(window) - 1)
    expected = (logits[0] - logits[1])[steps, window[1:]]
    found = direct_attribution(model, sae, feature, window)
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_hooks_are_gone_after_an_error(model):
    def fails(value):
        raise ValueError("in the hook")

    with pytest.raises(ValueError, match="in the hook"), hooked(model, [("layers.0", fails)]):
        model(torch.tensor([[4, 5]]))
    model(torch.tensor([[4, 5]]))
