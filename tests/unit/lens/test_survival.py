"""Survival against dense formulas, on changes whose effect is known; the ledger adds up."""

from __future__ import annotations

import pytest
import torch

from qll.errors import ShapeError
from qll.lens import Ledger, SparseCodes, Survival
from tests.unit.lens.conftest import random_sae


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def case():
    """An autoencoder, activations, and the same with noise; in three windows."""
    sae, x = random_sae(d_in=16, d_sae=48, k=5), noise(600, 16)
    return sae, x, x + 0.3 * noise(600, 16, seed=1)


def run(sae, x, after, chosen=None):
    survival = Survival(sae)
    for part in (slice(0, 250), slice(250, 255), slice(255, 600)):
        mask = None if chosen is None else chosen[part]
        one, two = sae.encode(x[part]), sae.encode(after[part])
        survival.update(one, two, x[part], after[part], mask)
    return survival


def test_against_dense_formulas(case):
    sae, x, after = case
    chosen = torch.arange(600) % 7 != 0
    survival = run(sae, x, after, chosen)
    a = sae.encode(x[chosen]).dense(48).double()
    b = sae.encode(after[chosen]).dense(48).double()
    found, both = survival.per_feature(), (a != 0) & (b != 0)
    expected = torch.corrcoef(torch.cat([a, b], dim=1).T)[:48, 48:].diagonal()
    torch.testing.assert_close(found["r"], expected, rtol=1e-6, atol=1e-6)
    jaccard = both.sum(0) / ((a != 0) | (b != 0)).sum(0)
    torch.testing.assert_close(found["jaccard"], jaccard.double())
    gain = (a * b).sum(0) / (a * a * both).sum(0)
    torch.testing.assert_close(found["gain"], gain, rtol=1e-5, atol=1e-6, equal_nan=True)
    directions, bias = sae.directions(range(48)).double(), sae.stored.vectors["b_dec"].double()
    written = [(a * ((v[chosen].double() - bias) @ directions.T)).sum(0) for v in (x, after)]
    torch.testing.assert_close(found["direction"], written[1] / written[0], rtol=1e-4, atol=1e-4)
    summary = survival.summary()
    assert summary["births_per_token"] == pytest.approx(float(((a == 0) & (b != 0)).sum()) / len(a))
    assert summary["tokens"] == int(chosen.sum())
    assert summary["medians"]["firm_jaccard"] > summary["medians"]["jaccard"]


def test_the_same_model_keeps_everything(case):
    sae, x, _ = case
    found = run(sae, x, x).summary()
    assert found["kept"] == found["measured"] > 20
    assert found["kept_share"] == {"unweighted": 1.0, "by_fires": 1.0, "by_energy": 1.0}
    assert found["births_per_token"] == found["deaths_per_token"] == 0
    assert found["r_quantiles"][0] == pytest.approx(1.0)
    assert found["medians"]["direction"] == pytest.approx(1.0, rel=1e-5)


def test_shuffled_tokens_lose_everything(case):
    sae, x, _ = case
    order = torch.randperm(600, generator=torch.Generator().manual_seed(4))
    found = run(sae, x, x[order]).summary()
    assert found["kept"] == 0
    assert abs(found["medians"]["r"]) < 0.1


def test_halved_activations_are_kept_but_shrunk(case):
    sae, x, _ = case
    codes, survival = sae.encode(x), Survival(sae)
    half = SparseCodes(codes.values / 2, codes.indices)
    survival.update(codes, half, x, x)
    found = survival.per_feature()
    measured = survival.classes() >= 0
    assert (survival.classes()[measured] == 0).all()
    assert found["gain"][measured].sub(0.5).abs().max() < 1e-6


def test_a_feature_switched_off_is_silenced_and_rare_ones_unmeasured(case):
    sae, x, _ = case
    codes, survival = sae.encode(x), Survival(sae)
    fires = (codes.dense(48) != 0).sum(0)
    gone = int(fires.argmax())
    survival.update(codes, codes.without([gone]), x, x)
    found = survival.summary()
    assert found["silenced"] == 1
    assert survival.classes()[gone] == 3
    assert found["unmeasured"] == int((fires < 30).sum())
    assert sum(found[name] for name in ("kept", "blurred", "lost", "silenced")) == found["measured"]
    assert sum(level["features"] for level in found["by_density"]) == found["measured"]


def test_other_tokens_are_refused(case):
    sae, x, _ = case
    with pytest.raises(ShapeError, match="the same tokens"):
        Survival(sae).update(sae.encode(x), sae.encode(x[1:]), x, x)


def test_ledger_terms_add_up(case):
    sae, x, after = case
    before, changed = sae.encode(x), sae.encode(after)
    ledger = Ledger(sae)
    ledger.update(before, changed, x, after)
    a, b = before.dense(48), changed.dense(48)
    directions = sae.directions(range(48))
    both = (a != 0) & (b != 0)
    dark = (after - sae.decode(changed)) - (x - sae.decode(before))
    terms = {
        "changed": ((b - a) * both) @ directions,
        "born": (b * (a == 0)) @ directions,
        "died": -(a * (b == 0)) @ directions,
        "dark": dark,
    }
    torch.testing.assert_close(sum(terms.values()), after - x, rtol=1e-4, atol=1e-4)
    whole = (after - x).square().sum()
    for name, term in terms.items():
        share = float(term.square().sum() / whole)
        assert ledger.shares()[name] == pytest.approx(share, rel=1e-4), name
    assert sum(ledger.shares().values()) == pytest.approx(1.0)


def test_ledger_of_no_change_is_empty(case):
    sae, x, _ = case
    ledger = Ledger(sae)
    ledger.update(sae.encode(x), sae.encode(x), x, x)
    assert set(ledger.shares().values()) == {0.0}
