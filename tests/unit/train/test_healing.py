"""Healing on a tiny model: it helps, it stops at the same numbers, it never does harm."""

from __future__ import annotations

import copy

import pytest
import torch

from qll.errors import TextError
from qll.model import insert_networks
from qll.model.layers import TNLinear
from qll.tn.lowrank import LowRank
from qll.tn.network import NetworkSpec
from qll.train import HealSettings, heal
from qll.train.healing import LONG_RUN, best_rate
from tests.conftest import VOCAB, make_tiny_llama

WINDOWS = torch.randint(0, VOCAB, (96, 24), generator=torch.Generator().manual_seed(0))


def damaged(dense):
    """The dense model with every MLP matrix cut to a quarter of its rank."""
    model = copy.deepcopy(dense)
    for block in range(2):
        for name in ("gate_proj", "up_proj", "down_proj"):
            path = f"model.layers.{block}.mlp.{name}"
            weight = dense.get_submodule(path).weight.detach()
            spec = NetworkSpec("lowrank", tuple(weight.shape), (16,))
            network = LowRank.decompose(weight, spec).interpolate()
            insert_networks(model, {(path,): network.spec})
            model.set_submodule(path, TNLinear.from_network(network))
    return model


@pytest.fixture
def pair():
    dense = make_tiny_llama().requires_grad_(False)
    return dense, damaged(dense)


def settings(**changes) -> HealSettings:
    return HealSettings(**{"tokens": 4608, "rates": (1e-3,), "batch_tokens": 96} | changes)


def test_it_lowers_the_held_out_divergence(pair, tmp_path):
    dense, converted = pair
    embedding = converted.model.embed_tokens.weight.detach().clone()
    facts = heal(dense, converted, WINDOWS, tmp_path, settings())
    assert facts["kept"]
    assert facts["kl_after"] < facts["kl_before"]
    assert facts["tokens"] == 4608
    assert torch.equal(converted.model.embed_tokens.weight, embedding)


def test_interrupted_it_ends_with_the_same_numbers(pair, tmp_path, monkeypatch):
    from qll.train.healing import CHECKPOINT_NAME, _School

    dense, whole = pair
    broken, resumed = copy.deepcopy(whole), copy.deepcopy(whole)
    monkeypatch.setattr("qll.train.healing.CHECKPOINT_TOKENS", 96)
    rates = (1e-3, 1e-4)
    facts = heal(dense, whole, WINDOWS, tmp_path / "a", settings(rates=rates))
    steps, original = iter(range(10**6)), _School.step

    def stop_at_twenty(self, batch):
        if next(steps) == 20:
            raise KeyboardInterrupt
        return original(self, batch)

    monkeypatch.setattr(_School, "step", stop_at_twenty)
    with pytest.raises(KeyboardInterrupt):
        heal(dense, broken, WINDOWS, tmp_path / "b", settings(rates=rates))
    monkeypatch.setattr(_School, "step", original)
    assert (tmp_path / "b" / CHECKPOINT_NAME).is_file()
    assert heal(dense, resumed, WINDOWS, tmp_path / "b", settings(rates=rates)) == facts
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_harm_is_undone_with_a_warning(pair, tmp_path, caplog):
    dense, converted = pair
    start = copy.deepcopy(converted.state_dict())
    facts = heal(dense, converted, WINDOWS, tmp_path, settings(rates=(3.0,)))
    assert not facts["kept"]
    assert "undone" in caplog.text
    assert all(torch.equal(start[name], value) for name, value in converted.state_dict().items())


def test_the_rate_is_the_best_of_short_runs(pair, tmp_path):
    dense, converted = pair
    twin = copy.deepcopy(converted)
    facts = heal(
        dense, converted, WINDOWS, tmp_path / "a", settings(rates=(3e-4, 1e-3, 1e-2, 3e-2, 3.0))
    )
    tried = dict(facts["trials"])
    assert list(tried) == [3e-4, 1e-3, 1e-2]  # worse than the one before: no higher ones
    assert tried[1e-3] < tried[3e-4] < facts["kl_before"] < tried[1e-2]
    top = best_rate(facts["kl_before"], facts["trials"])
    assert 0.5e-3 <= top <= 5.5e-3
    assert facts["rate"] == LONG_RUN * top
    assert facts["kept"]
    # the short runs leave no trace
    alone = heal(dense, twin, WINDOWS, tmp_path / "b", settings(rates=(facts["rate"],)))
    assert alone["kl_after"] == facts["kl_after"]


def test_the_best_rate_is_the_top_of_a_parabola():
    def divergence(rate):
        return 1.0 - 3.0 * rate + 0.5 * rate**2  # least at 3

    for rates in ((1.0, 2.0, 5.0), (2.5, 4.0), (3.0, 3.5)):
        assert best_rate(1.0, [(r, divergence(r)) for r in rates]) == pytest.approx(3.0)
    # where the highest rate is the best one, nothing is known above it
    assert best_rate(1.0, [(1.0, divergence(1.0)), (2.0, divergence(2.0))]) == 2.0
    assert best_rate(1.0, [(1.0, 1.5), (2.0, None)]) is None
    assert best_rate(1.0, []) is None


def test_a_rate_at_which_the_loss_breaks_is_not_taken(pair, tmp_path):
    dense, converted = pair
    facts = heal(dense, converted, WINDOWS, tmp_path, settings(rates=(1e-3, 1e30)))
    assert facts["trials"][1] == [1e30, None]
    assert facts["rate"] == LONG_RUN * 0.5e-3
    assert facts["kept"]


def test_without_a_rate_that_helps_there_is_no_long_run(pair, tmp_path, caplog):
    dense, converted = pair
    start = copy.deepcopy(converted.state_dict())
    facts = heal(dense, converted, WINDOWS, tmp_path, settings(rates=(2.0, 3.0)))
    assert (facts["kept"], facts["steps"]) == (False, 0)
    assert facts["kl_after"] == facts["kl_before"]
    assert "left out" in caplog.text
    assert all(torch.equal(start[name], value) for name, value in converted.state_dict().items())


def test_folded_gains_stay_one(pair, tmp_path):
    dense, converted = pair
    converted.config.qll_folded_norms = True
    gain = converted.model.layers[0].input_layernorm.weight.detach().clone()
    heal(dense, converted, WINDOWS, tmp_path, settings())
    assert torch.equal(converted.model.layers[0].input_layernorm.weight, gain)


def test_one_window_is_too_little(pair, tmp_path):
    with pytest.raises(TextError, match="too little text"):
        heal(*pair, WINDOWS[:1], tmp_path, settings())
