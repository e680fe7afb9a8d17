"""Linears of adaptive rank: nested, chosen by each position alone, paid for, and reported."""

from __future__ import annotations

import json

import pytest
import torch

from qll import cli
from qll.bytelm.adaptive_rank import AdaptiveRank
from qll.bytelm.config import LossConfig, WeightConfig
from qll.bytelm.losses import Objective
from qll.bytelm.opening import nested
from qll.bytelm.ranks import bond_ranks
from qll.bytelm.saved import save_model
from qll.errors import UsageError
from tests.unit.bytelm.byte_models import byte_model, text


def layer_of(model) -> AdaptiveRank:
    return model.blocks[0].feed_forward.down


@torch.no_grad()
def test_a_position_uses_the_first_components_alone():
    layer = layer_of(byte_model("adaptive rank"))
    x = torch.randn(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, right = layer.cores
    share = torch.tensor([[0.1], [1 / 3], [0.5], [2 / 3], [0.99]], dtype=torch.float64)
    before = layer.opened(x, share)
    weights = nested(share, layer.rank, layer.groups)
    assert (weights.diff(dim=-1) <= 0).all()  # nested: what is open comes first
    torch.testing.assert_close(before, (x @ right.T * weights) @ left.T, rtol=0, atol=1e-14)
    used = (weights > 0).sum(dim=-1)
    assert used[0] < used[2] < used[4] == layer.rank
    for row, rank in enumerate(used.tolist()):
        changed = left.clone()
        left[:, rank:] += 7.0  # what is closed
        assert torch.equal(layer.opened(x, share)[row], before[row])
        left.copy_(changed)
        left[:, rank - 1] += 7.0  # the last that is open
        assert not torch.equal(layer.opened(x, share)[row], before[row])
        left.copy_(changed)


@torch.no_grad()
def test_with_everything_open_it_is_its_twin_of_fixed_rank():
    model = byte_model("adaptive rank")
    twin = byte_model("lowrank")
    tensors = model.state_dict()
    twin.load_state_dict({name: item for name, item in tensors.items() if "opening" not in name})
    assert twin.num_params() == sum(t.numel() for n, t in tensors.items() if "opening" not in n)
    ids = text(2, 9)
    assert not torch.allclose(model(ids), twin(ids))
    for module in model.modules():
        if isinstance(module, AdaptiveRank):
            module.opening.choose.weight.zero_()
            module.opening.choose.bias.fill_(50.0)
    torch.testing.assert_close(model(ids), twin(ids), rtol=0, atol=1e-12)


def test_the_open_share_costs_and_pushes_the_gates_shut():
    model = byte_model("adaptive rank")
    free, priced = (
        Objective(LossConfig(rank=weight))(model, text(2, 9), text(2, 9, seed=1))
        for weight in (0.0, 0.5)
    )
    assert "rank" not in free[1]
    share = priced[1]["rank"]
    assert 0 < share < 1
    torch.testing.assert_close(priced[0], free[0] + 0.5 * share)
    gradient = torch.autograd.grad(
        priced[0] - free[0], [layer_of(model).opening.choose.bias], retain_graph=True
    )[0]
    assert gradient > 0  # less of it, less to pay
    plain = Objective(LossConfig(rank=0.5))(byte_model("lowrank"), text(2, 9), text(2, 9))
    assert "rank" not in plain[1]


@torch.no_grad()
def test_mean_ranks_are_counted_where_they_are_chosen(tmp_path, capsys):
    model, ids = byte_model("adaptive rank"), text(2, 9)
    found = bond_ranks(model, ids)
    assert len(found) == 4 * model.config.n_layers
    assert all(1 <= item.mean_rank <= item.full_rank for item in found)
    layer = layer_of(model)
    layer.opening.choose.weight.zero_()
    layer.opening.choose.bias.fill_(-2.9)  # a bit more than half: the second of three groups
    changed = {item.linear: item for item in bond_ranks(model, ids)}
    item = changed["blocks.0.feed_forward.down"]
    assert item.mean_rank == (torch.arange(layer.rank) * 3 // layer.rank < 2).sum()
    assert bond_ranks(byte_model("lowrank"), ids) == []

    save_model(tmp_path / "run", model.float())
    (tmp_path / "text").write_text("some text to score. " * 20)
    words = ["lm", "eval", "--model", str(tmp_path / "run"), "--data", str(tmp_path / "text")]
    assert cli.main(words) == 0
    ranks = json.loads(capsys.readouterr().out)["ranks"]
    assert ranks["blocks.0.feed_forward.down"] == [item.mean_rank, layer.rank]


def test_only_low_rank_linears_have_such_a_bond():
    with pytest.raises(UsageError, match=r"weights\.rank_groups.*expected weights\.format=lowrank"):
        WeightConfig(format="mpo", rank_groups=2)
    with pytest.raises(UsageError, match=r"weights\.rank_groups"):
        WeightConfig(format="lowrank", rank_groups=-1)
