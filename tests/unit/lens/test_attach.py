"""Autoencoders in a model: what changes nothing, what changes exactly one direction, what fails."""

from __future__ import annotations

import pytest
import torch

from qll.errors import ShapeError, UsageError
from qll.lens import attach
from qll.lens.hooks import capture, hooked
from qll.model import generate, load
from tests.conftest import VOCAB, make_tiny_llama
from tests.unit.lens.conftest import random_sae
from tests.unit.model.conftest import make_tokenizer, write_folder

PLACES = ("embed_tokens", "layers.0", "layers.1", "layers.0.mlp", "layers.1.self_attn")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same weights dense and as networks of full rank."""
    dense = make_tiny_llama(seed=3)
    return dense, load(write_folder(tmp_path_factory.mktemp("attach") / "full", dense))


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("place", PLACES)
def test_observing_is_bit_identical_and_the_error_term_lossless(models, which, place, ids):
    model, sae = models[which], random_sae(hookpoint=place)
    clean = logits(model, ids)
    with attach(model, {place: sae}) as seen:
        assert torch.equal(logits(model, ids), clean)
    x = capture(model, ids, [place])[place]
    assert torch.equal(seen.codes[place].values, sae.encode(x.flatten(0, 1)).values)
    with attach(model, {place: sae}, mode="replace_error"):
        assert torch.equal(logits(model, ids), clean)
    with attach(model, {place: sae}, mode="replace"):
        assert not torch.allclose(logits(model, ids), clean)
    assert torch.equal(logits(model, ids), clean), "hooks are gone"


def test_names_mean_the_same_on_dense_and_networks(models, ids):
    names = [
        "layers.0",
        "embed_tokens",
        "blocks.1.hook_resid_mid",
        "blocks.0.attn.hook_z",
        "layers.1.mlp.down_proj.input",
        "blocks.0.ln2.hook_normalized",
        "layers.1.mlp.input",
    ]
    dense, converted = (capture(model, ids, names) for model in models)
    for name in names:
        torch.testing.assert_close(dense[name], converted[name], rtol=1e-3, atol=1e-4)
    power = dense["blocks.0.ln2.hook_normalized"].square().mean(-1)
    torch.testing.assert_close(power, torch.ones_like(power), rtol=1e-2, atol=0)


def test_capture_agrees_with_hidden_states(models, ids):
    model = models[0]
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    seen = capture(model, ids, ["embed_tokens", "layers.0"])
    assert torch.equal(seen["embed_tokens"], states[0])
    assert torch.equal(seen["layers.0"], states[1])
    assert torch.equal(capture(model, ids, ["layer_1"])["layer_1"], states[1])


def test_replacing_puts_the_reconstruction_there(models, ids):
    model, sae = models[0], random_sae(hookpoint="layers.0")
    x = capture(model, ids, ["layers.0"])["layers.0"]
    seen = []
    with (
        attach(model, {"layers.0": sae}, mode="replace"),
        hooked(model, [("layers.1.input", lambda value: seen.append(value.clone()))]),
    ):
        logits(model, ids)
    torch.testing.assert_close(seen[0].flatten(0, 1), sae.reconstruct(x.flatten(0, 1)))


def test_steering_adds_one_direction_on_every_token(models, ids):
    model, sae = models[1], random_sae(hookpoint="layers.0")
    x = capture(model, ids, ["layers.0"])["layers.0"]
    seen = []
    with (
        attach(model, {"layers.0": sae}, steer={"blocks.0.hook_resid_post": {11: -3.0}}),
        hooked(model, [("layers.0", lambda value: seen.append(value.clone()))]),
    ):
        logits(model, ids)
    expected = (-3.0 * sae.directions([11])).expand(24, -1)
    torch.testing.assert_close((seen[0] - x).flatten(0, 1), expected, rtol=1e-4, atol=1e-5)


def test_ablation_takes_away_what_the_feature_wrote(models, ids):
    model, sae = models[0], random_sae(hookpoint="layers.0")
    x = capture(model, ids, ["layers.0"])["layers.0"].flatten(0, 1)
    codes = sae.encode(x)
    feature = int(codes.indices.flatten().mode().values)
    seen = []
    with (
        attach(model, {"layers.0": sae}, ablate={"layers.0": [feature]}) as attached,
        hooked(model, [("layers.0", lambda value: seen.append(value.clone()))]),
    ):
        logits(model, ids)
    expected = x - codes.of(feature)[:, None] * sae.directions([feature])
    torch.testing.assert_close(seen[0].flatten(0, 1), expected)
    assert attached.codes["layers.0"].of(feature).any(), "recorded before the edit"


def test_positions_leave_the_others_alone(models, ids):
    model, sae = models[0], random_sae(hookpoint="layers.1")
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, 5] = True
    clean = logits(model, ids)
    with attach(model, {"layers.1": sae}, mode="replace", positions=mask):
        changed = logits(model, ids) != clean
    assert changed[0, 5].any()
    assert not changed[~mask].any()


def test_transcoder_reads_one_place_and_writes_another(models, ids):
    model = models[0]
    sae = random_sae(hookpoint="layers.0.mlp.input", writes="layers.0.mlp", subtract_b_dec=False)
    x = capture(model, ids, ["layers.0.mlp.input"])["layers.0.mlp.input"].flatten(0, 1)
    seen = []
    with (
        attach(model, {"layers.0.mlp": sae}, mode="replace"),
        hooked(model, [("layers.0.mlp", lambda value: seen.append(value.clone()))]),
    ):
        logits(model, ids)
    torch.testing.assert_close(seen[0].flatten(0, 1), sae.reconstruct(x))


def test_generation_is_steered():
    model, tokenizer = make_tiny_llama(seed=4, vocab_size=259), make_tokenizer()
    sae = random_sae(hookpoint="layers.0")

    def text():
        return "".join(generate(model, tokenizer, "tensor", max_new_tokens=12))

    plain = text()
    with attach(model, {"layers.0": sae}):
        assert text() == plain
    with attach(model, {"layers.0": sae}, steer={"layers.0": {5: 0.0}}):
        assert text() == plain
    with attach(model, {"layers.0": sae}, steer={"layers.0": {5: 40.0}}) as seen:
        assert text() != plain
    assert len(seen.codes["layers.0"]) == 1, "with a cache, one token at a time"


def test_what_is_refused(models, ids):
    model, sae = models[0], random_sae(hookpoint="layers.0")
    with pytest.raises(UsageError, match="no such block"), attach(model, {"layers.2": sae}):
        pass
    with pytest.raises(UsageError, match="not a place"), attach(model, {"layer.2": sae}):
        pass
    wide = random_sae(d_in=32)
    with pytest.raises(ShapeError, match="another model"), attach(model, {"layers.0": wide}):
        pass
    edits = {"layers.0": {96: 1.0}}
    with pytest.raises(UsageError, match="no such feature"):
        attach(model, {"layers.0": sae}, steer=edits).__enter__()
    with pytest.raises(UsageError, match="no autoencoder is attached"):
        attach(model, {"layers.0": sae}, ablate={"layers.1": [3]}).__enter__()
    with pytest.raises(UsageError, match="changes nothing"):
        attach(model, {"layers.0": sae}, mode="observe", ablate={"layers.0": [3]}).__enter__()
    with pytest.raises(UsageError, match="no such mode"):
        attach(model, {"layers.0": sae}, mode="other").__enter__()


def test_folded_gains_are_noticed(models, ids):
    model = models[1]
    model.config.qll_folded_norms = True
    try:
        with pytest.raises(UsageError, match="folded away"):
            capture(model, ids, ["layers.0.mlp.input"])
        capture(model, ids, ["layers.0.mlp", "layers.0.mlp.down_proj.input"])
    finally:
        model.config.qll_folded_norms = False
