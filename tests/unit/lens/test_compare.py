"""Two models through one autoencoder: the same model loses nothing, a broken one does; steering."""

from __future__ import annotations

import copy

import pytest
import torch

from qll.errors import MissingFileError, UsageError
from qll.lens import compare
from qll.lens.compare import EncodedTriple, rounded, survive
from qll.lens.hooks import capture
from qll.lens.steer import steered
from qll.load.sae_write import write_sparsify
from tests.conftest import VOCAB
from tests.unit.lens.conftest import encoded, fitted_sae, random_sae


@pytest.fixture(scope="module")
def texts():
    return torch.randint(3, VOCAB, (6, 64), generator=torch.Generator().manual_seed(12))


@pytest.fixture(scope="module")
def sae(deep_llama, texts):
    return fitted_sae(deep_llama, texts, "layers.1", k=20)


@pytest.fixture(scope="module")
def shaken_llama(deep_llama):
    """The same model with noise of a tenth in every matrix of its first two blocks."""
    model, hand = copy.deepcopy(deep_llama), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith(("model.layers.0", "model.layers.1")) and weight.ndim == 2:
                weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=hand)
    return model


def test_the_same_model(deep_llama, sae, texts):
    found = compare(deep_llama, deep_llama, sae, texts)
    survival = found["survival"]
    assert survival["kept"] == survival["measured"] > 50
    assert found["controls"]["shuffled"]["kept"] == 0
    assert found["controls"]["floor"]["kept_share"]["unweighted"] > 0.9
    assert found["controls"]["floor"]["medians"]["r"] < 1.0
    assert found["controls"]["matched_noise"]["kept"] == survival["kept"], "noise of length 0"
    assert found["dense"] == found["converted"]
    assert set(found["ledger"].values()) == {0.0}
    assert min(found["place_fvu"], key=found["place_fvu"].get) == "layers.1"


def test_a_changed_model_loses_features(deep_llama, shaken_llama, sae, texts):
    three = EncodedTriple(*(encoded(model, sae, texts) for model in (deep_llama, shaken_llama)))
    survival, others, ledger = survive(three)
    assert set(others) == {"shuffled", "matched_noise"}, "no floor without its readings"
    found = survival.summary()
    assert found["kept_share"]["unweighted"] < 1
    assert 0.5 < found["medians"]["r"] < 1
    assert others["matched_noise"].summary()["medians"]["r"] < 1
    assert sum(ledger.shares().values()) == pytest.approx(1.0)
    assert ledger.shares()["changed"] > 0


def test_the_floor_is_a_model_in_bfloat16(deep_llama, texts):
    """Same size of error as torch's own bfloat16, and the model itself stays what it was."""
    before = {name: value.clone() for name, value in deep_llama.state_dict().items()}
    ours, theirs = rounded(deep_llama), copy.deepcopy(deep_llama).to(torch.bfloat16)
    exact, here, there = (
        capture(model, texts[:1], ["layers.2"])["layers.2"].float()
        for model in (deep_llama, ours, theirs)
    )
    assert float((here - exact).norm() / (there - exact).norm()) == pytest.approx(1.0, abs=0.25)
    assert 1e-4 < float((here - exact).norm() / exact.norm()) < 1e-2
    assert torch.equal(here, here.to(torch.bfloat16).float())
    assert all(torch.equal(value, before[name]) for name, value in deep_llama.state_dict().items())


def test_too_short_a_text_is_said(deep_llama, texts, caplog):
    sae = random_sae(hookpoint="layers.1")
    compare(deep_llama, deep_llama, sae, texts[:2])
    assert "too rarely in" in caplog.text


def test_steering_by_name(deep_llama, texts, tmp_path):
    sae = random_sae(hookpoint="layers.1")
    write_sparsify(sae.stored, tmp_path / "layers.1")
    before = capture(deep_llama, texts[:1], ["layers.1"])["layers.1"]
    edits = [("layers.1", 3, 2.0), ("blocks.1.hook_resid_post", 3, 0.5)]
    with steered(deep_llama, tmp_path, edits):
        after = capture(deep_llama, texts[:1], ["layers.1"])["layers.1"]
    step = 2.5 * sae.directions([3])
    torch.testing.assert_close((after - before)[0], step.expand(64, -1), rtol=1e-3, atol=1e-4)
    with pytest.raises(MissingFileError, match=r"found layers\.1"):
        steered(deep_llama, tmp_path, [("layers.0", 3, 1.0)]).__enter__()
    with pytest.raises(UsageError, match="no such feature"):
        steered(deep_llama, tmp_path, [("layers.1", 96, 1.0)]).__enter__()
