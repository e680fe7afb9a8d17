"""Features taken away one by one: against whole forward passes, and on a model that was broken."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy.stats import spearmanr

from qll.lens.attach import attach
from qll.lens.causal import _changes, causal, ranks, spearman
from qll.lens.compare import EncodedTriple
from qll.lens.hooks import capture
from qll.lens.rest import Rest
from tests.unit.lens.conftest import encoded, fitted_sae, random_sae


@pytest.fixture(scope="module")
def sae(deep_llama, windows):
    return fitted_sae(deep_llama, windows, "layers.1", k=4)


def test_spearman_is_that_of_scipy():
    one, two = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    expected = [spearmanr(a, b).statistic for a, b in zip(one.numpy(), two.numpy(), strict=True)]
    assert spearman(ranks(one), ranks(two)).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("activation", ["topk", "layer_norm"])
def test_one_token_behind_a_cache_is_a_whole_pass(deep_llama, windows, sae, activation):
    if activation == "layer_norm":
        sae = random_sae(hookpoint="layers.1", normalize="layer_norm", k=3)
    window, places = windows[0], torch.tensor([0, 9, 20])
    x = capture(deep_llama, window[None], ["layers.1"])["layers.1"][0]
    codes = sae.encode(x[places])
    with torch.no_grad():
        rest = Rest(encoded(deep_llama, sae, windows).readings, "layers.1")
        found = _changes(rest, sae, 0, places, codes)
        clean = deep_llama(window[None]).logits[0]
        for number, place in enumerate(places.tolist()):
            only = torch.zeros(1, len(window), dtype=torch.bool)
            only[0, place] = True
            for row, feature in enumerate(codes[number : number + 1].entries()[1].tolist()):
                off = {"layers.1": [feature]}
                with attach(deep_llama, {"layers.1": sae}, ablate=off, positions=only):
                    changed = deep_llama(window[None]).logits[0, place]
                expected = changed - clean[place]
                assert float(expected.norm()) > 1e-3
                torch.testing.assert_close(found[number][row], expected, rtol=1e-3, atol=1e-4)


def test_survival_of_effects(deep_llama, windows, sae):
    dense = encoded(deep_llama, sae, windows)
    same = causal(EncodedTriple(dense, dense)).summary()
    assert same["edits"] == 4 * 4 * 4
    assert same["kept_share"] == 1.0
    assert same["length_ratio"] == pytest.approx(1.0)
    few = causal(EncodedTriple(dense, dense), most=2).summary()
    assert few["edits"] == 2 * 4 * 4
    broken, hand = copy.deepcopy(deep_llama), torch.Generator().manual_seed(1)
    with torch.no_grad():
        weight = broken.lm_head.weight
        weight += weight.std() * torch.randn(weight.shape, generator=hand)
    found = causal(EncodedTriple(dense, encoded(broken, sae, windows), dense))
    assert found.summary()["kept_share"] < 1
    controls = found.summary()["controls"]
    assert controls["floor"]["kept_share"] == 1.0, "the same model"
    assert abs(controls["other_feature"]["quartiles"][1]) < found.summary()["quartiles"][1]
    assert 0.3 < found.summary()["quartiles"][1] < 0.95
    c, counts = found.per_feature()
    assert int(counts.sum()) == 64
    assert bool((c[counts > 0] <= 1).all())
    assert bool(c[counts == 0].isnan().all())


def test_nothing_ordinary_to_take_away(deep_llama, windows, sae):
    dense = encoded(deep_llama, sae, windows[:1], special=windows[0].tolist())
    found = causal(EncodedTriple(dense, dense))
    assert found.summary() == {"edits": 0, "features": 0}
