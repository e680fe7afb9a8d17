"""The whole look at one autoencoder: tables agree with each other, examples with the codes."""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from qll.lens import study, weight_table
from qll.lens.compare import read_three
from qll.lens.critical import rank_at
from qll.lens.hooks import capture
from qll.lens.readings import places_for
from tests.conftest import VOCAB
from tests.unit.lens.conftest import fitted_sae


@pytest.fixture(scope="module")
def tokenizer():
    """Token i is the word wi; ids below 3 are special."""
    vocabulary = {f"w{number}": number for number in range(VOCAB)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")),
        unk_token="w0",
        bos_token="w1",
        eos_token="w2",
    )


@pytest.fixture(scope="module")
def case(deep_llama, tokenizer, tmp_path_factory):
    texts = torch.randint(3, VOCAB, (6, 64), generator=torch.Generator().manual_seed(12))
    sae, broken = fitted_sae(deep_llama, texts, "layers.1", k=20), copy.deepcopy(deep_llama)
    hand = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in broken.named_parameters():
            if weight.ndim == 2 and "layers." in name:
                weight += 0.2 * weight.std() * torch.randn(weight.shape, generator=hand)
    places = places_for(sae.spec, deep_llama.config.num_hidden_layers)
    special, folder = tokenizer.all_special_ids, tmp_path_factory.mktemp("study")
    three = read_three(deep_llama, broken, texts, places, special=special, folder=folder)
    found = study(three, sae, tokenizer, reach=1)
    return found, deep_llama, broken, sae, texts


def test_numbers_by_feature_agree_with_the_entry(case):
    found, *_ = case
    entry, arrays = found.entry, found.features
    survival = entry["survival"]
    for number, name in enumerate(("kept", "blurred", "lost", "silenced")):
        assert int((arrays["class"] == number).sum()) == survival[name]
    sure = survival["certainty"]
    assert int(arrays["damaged"].sum()) == sure["damaged"]
    assert int(arrays["sure"].sum()) == sure["kept"]
    assert sure["damaged"] + sure["kept"] + sure["undecided"] == survival["measured"] > 0
    assert (arrays["class"][arrays["damaged"]] > 0).all()
    assert int((arrays["causal_edits"] > 0).sum()) == entry["causal"]["features"] > 0
    low, high = sure["kept_share_interval"]
    assert low <= survival["kept_share"]["unweighted"] <= high


def test_remarkable_features_are_the_extremes(case):
    found, *_ = case
    r, wanted = found.features["r"], found.entry["remarkable"]
    measured = (found.features["class"] >= 0).nonzero()[:, 0]
    assert float(r[wanted["damaged"][0]]) == float(r[measured].min())
    assert float(r[wanted["robust"][0]]) == pytest.approx(float(r[measured].max()), abs=1e-5)
    assert float(r[wanted["damaged"]].max()) <= float(r[measured].median())
    assert {feature for name in wanted for feature in wanted[name]} == set(found.examples)


def test_examples_are_the_codes_of_both_models(case):
    found, dense, broken, sae, texts = case
    feature = found.entry["remarkable"]["active"][0]
    example = found.examples[feature][0]
    window, part = (
        example["window"],
        slice(example["start"], example["start"] + len(example["tokens"])),
    )
    assert example["tokens"] == [f"w{int(token)}" for token in texts[window, part]]
    for name, model in (("before", dense), ("after", broken)):
        x = capture(model, texts[window][None], ["layers.1"])["layers.1"][0]
        codes = sae.encode(x).of(feature)[part]
        torch.testing.assert_close(torch.tensor(example[name]), codes, rtol=1e-2, atol=1e-2)
    assert max(example["before"]) > 0


def test_the_weight_table(case):
    found, dense, broken, sae, _ = case
    weights = found.entry["weights"]
    names = [row["matrix"].split(".", 2)[2] for row in weights["matrices"]]
    assert names == ["1.self_attn.o_proj", "1.mlp.down_proj", "2.self_attn.q_proj",
                     "2.self_attn.k_proj", "2.self_attn.v_proj", "2.mlp.gate_proj",
                     "2.mlp.up_proj"]  # fmt: skip
    assert (
        found.features["rho"].shape == found.features["critical"].shape == (7, weights["features"])
    )
    for number, row in enumerate(weights["matrices"]):
        rho, bond = found.features["rho"][number], found.features["critical"][number]
        assert row["kept_share"] == pytest.approx(float((rho >= 0.9).double().mean()))
        assert row["critical"][1] <= row["rank"]
        assert row["rank"] == (32 if row["matrix"].endswith(("k_proj", "v_proj")) else 64)
        assert int(bond.min()) >= 1
    curve = weights["over_keep"]
    assert curve["kept_share"] == sorted(curve["kept_share"])
    assert curve["kept_share"][-1] == curve["every"][-1] == 1.0
    bonds, shapes = found.features["critical"], [(64, 64), (64, 128), (64, 64), (32, 64), (32, 64),
                                                 (128, 64), (128, 64)]  # fmt: skip
    kept = torch.stack(
        [row <= rank_at(0.5, *shape) for row, shape in zip(bonds, shapes, strict=True)]
    )
    assert curve["every"][9] == pytest.approx(float(kept.all(0).double().mean()))
    nothing = weight_table(dense, broken, sae, torch.zeros(0, dtype=torch.int64)).summary()
    assert nothing["over_keep"] == {"keep": [], "kept_share": [], "every": []}
