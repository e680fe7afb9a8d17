"""Streaming metrics against the definitions, with tokens of every kind; prices; the place check."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from qll.errors import TextError
from qll.lens import SAEMetrics, SparseCodes, attach, check_place, measure
from qll.lens.downstream import downstream
from qll.lens.hooks import capture, hooked
from qll.lens.intervals import bootstrap
from qll.lens.tokens import token_kinds
from tests.unit.lens.conftest import encoded, fitted_sae, random_sae


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_streamed_sums_are_the_definitions():
    sae = random_sae()
    x = noise(90, 64) + 3.0
    codes = sae.encode(x)
    y = sae.decode(codes)
    kinds = torch.zeros(90, dtype=torch.long)
    kinds[::9], kinds[4] = 2, 1
    metrics = SAEMetrics(96, 64)
    for number, part in enumerate((slice(0, 20), slice(20, 55), slice(55, 90))):
        metrics.update(x[part], y[part], codes[part], kinds[part], number)
    found, chosen = metrics.summary(), kinds == 0
    a, b = x[chosen].double(), y[chosen].double()
    assert found["tokens"] == int(chosen.sum())
    assert found["fvu"] == pytest.approx(
        float((a - b).square().sum() / (a - a.mean(0)).square().sum()), rel=1e-9
    )
    assert found["l0"] == pytest.approx(float(codes[chosen.nonzero()[:, 0]].l0().double().mean()))
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1).mean()
    assert found["cosine"] == pytest.approx(float(cosine), rel=1e-9)
    assert found["l2_ratio"] == pytest.approx(float((b.norm(dim=1) / a.norm(dim=1)).mean()))
    assert found["kinds"]["sink"]["tokens"] == int((kinds == 2).sum())
    assert found["kinds"]["special"]["fvu"] is None, "one token has no variance"
    fires = (codes.dense(96)[chosen] != 0).sum(0)
    features = found["features"]
    assert features["dead"] == int((fires == 0).sum())
    assert features["dense"] == int((fires > 0.1 * found["tokens"]).sum())
    assert features["measured"] + features["unmeasured"] == 96
    assert sum(features["density"]["counts"]) == 96 - features["dead"]
    low, high = found["fvu_interval"]
    assert low <= found["fvu"] <= high


def test_perfect_and_mean_reconstructions():
    x, codes = noise(40, 8), SparseCodes(torch.ones(40, 1), torch.zeros(40, 1, dtype=torch.long))
    for y, expected in ((x, 0.0), (x.mean(0).expand_as(x), 1.0)):
        metrics = SAEMetrics(4, 8)
        metrics.update(x, y, codes, torch.zeros(40, dtype=torch.long), 0)
        assert metrics.summary()["fvu"] == pytest.approx(expected, abs=1e-6)
        assert metrics.summary()["fvu_interval"] is None, "one document has no interval"


def test_nothing_ordinary_to_measure():
    metrics = SAEMetrics(4, 8)
    codes = SparseCodes(torch.ones(5, 1), torch.zeros(5, 1, dtype=torch.long))
    metrics.update(noise(5, 8), noise(5, 8), codes, torch.ones(5, dtype=torch.long), 0)
    with pytest.raises(TextError, match="no ordinary token"):
        metrics.summary()


def test_one_sink_would_decide_the_sum():
    x = noise(50, 8)
    x[0] = 1000
    ids = torch.arange(50)
    kinds = token_kinds(ids, x, special=[7])
    assert kinds[0] == 2
    assert kinds[7] == 1
    assert int((kinds == 0).sum()) == 48


def test_bootstrap_covers_the_mean():
    """About 95 of 100 intervals of the mean hold the truth, 0."""
    hits = 0
    for seed in range(100):
        values = noise(40, seed=seed).double()
        low, high = bootstrap(lambda weights, v=values: weights @ v / weights.sum(1), 40, seed=seed)
        hits += low <= 0 <= high
    assert 85 <= hits <= 100


def test_prices_against_whole_logits(deep_llama, windows):
    sae = fitted_sae(deep_llama, windows, "layers.1", k=20)
    found = downstream(encoded(deep_llama, sae, windows))["all"]
    targets = windows[:, 1:].flatten()

    @torch.no_grad()
    def logs():
        return deep_llama(windows).logits[:, :-1].flatten(0, 1).double().log_softmax(-1)

    clean = logs()
    with attach(deep_llama, {"layers.1": sae}, mode="replace"):
        patched = logs()
    with hooked(deep_llama, [("layers.1", torch.zeros_like)]):
        zeroed = logs()
    losses = [float(cross_entropy(log, targets)) for log in (clean, patched, zeroed)]
    for name, loss in zip(("ce_clean", "ce_sae", "ce_zero"), losses, strict=True):
        assert found[name] == pytest.approx(loss, rel=1e-5)
    score = (losses[2] - losses[1]) / (losses[2] - losses[0])
    assert found["ce_score"] == pytest.approx(score, rel=1e-4)
    kl = [float((clean.exp() * (clean - log)).sum(-1).mean()) for log in (patched, zeroed)]
    assert found["kl_score"] == pytest.approx(1 - kl[0] / kl[1], rel=1e-4)
    assert found["tokens"] == windows.shape[0] * (windows.shape[1] - 1)


def test_a_perfect_autoencoder_scores_one(deep_llama, windows):
    sae = fitted_sae(deep_llama, windows, "layers.1", k=64)
    found = measure(encoded(deep_llama, sae, windows, special=[5]))
    assert found["fvu"] < 1e-6
    assert found["ce_score"] == pytest.approx(1.0, abs=1e-3)
    assert found["dead"] == found["features"]["dead"]
    assert found["downstream"]["all"]["kl_score"] == pytest.approx(1.0, abs=1e-3)
    assert all(map(math.isfinite, found["fvu_interval"]))


@pytest.mark.parametrize("place", ["embed_tokens", "layers.0", "layers.1", "layers.2"])
def test_the_right_place_wins(deep_llama, windows, place, caplog):
    found = check_place(encoded(deep_llama, fitted_sae(deep_llama, windows, place), windows))
    assert min(found, key=found.get) == place
    assert len(found) == (2 if place in ("embed_tokens", "layers.2") else 3)
    assert not caplog.records


def test_a_number_that_is_off_by_one_is_noticed(deep_llama, windows, caplog):
    from dataclasses import replace

    sae = fitted_sae(deep_llama, windows, "layers.1")
    stored = replace(sae.stored, spec=replace(sae.spec, hookpoint="layers.0", writes="layers.0"))
    check_place(encoded(deep_llama, replace(sae, stored=stored), windows))
    assert "off by one" in caplog.text
    assert "layers.1" in caplog.text


def test_an_autoencoder_of_another_model_is_noticed(deep_llama, windows, caplog):
    check_place(encoded(deep_llama, random_sae(hookpoint="layers.1"), windows))
    assert "autoencoder of layers.1" in caplog.text


def test_capture_stops_after_the_place(deep_llama, windows):
    reached = []
    with hooked(deep_llama, [("layers.2", lambda value: reached.append(1))]):
        capture(deep_llama, windows[:1], ["layers.0"])
    assert not reached
