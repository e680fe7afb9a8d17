"""Plans: within budget for every format and allocation, JSON there and back, exact at keep 1."""

from __future__ import annotations

import pytest

from qll import store
from qll.calibrate import collect
from qll.convert import load_plan, make_plan, planner
from qll.convert.plan import Plan
from qll.convert.units import template
from qll.errors import ConfigError, UsageError
from qll.load import open_source
from qll.options import ConvertOptions
from qll.tn import parts
from qll.tn.joint_channels import part_specs
from qll.tn.joint_value_output import output_part

INNER = ("joint_channels", "joint_value_output", "joint_query_key")
FORMATS = (
    *("auto", "lowrank", "mpo", "tucker", "tree", "kron", "panels", "sparse"),
    *("joint_tree", "joint_tucker"),
    *INNER,
)


@pytest.fixture(scope="module")
def source(tiny_hf_folder):
    return open_source(tiny_hf_folder)


@pytest.fixture(scope="module")
def moments(source, tmp_path_factory):
    import torch

    windows = torch.randint(0, 512, (4, 64), generator=torch.Generator().manual_seed(0))
    return collect(source, windows, tmp_path_factory.mktemp("moments"), gradients=True)


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("format", FORMATS)
def test_plans_stay_within_the_budget_and_near_it(format, allocation, source, moments):
    options = ConvertOptions(keep=0.7, format=format, allocation=allocation)
    plan = make_plan(source, moments, options)
    total = sum(entry.unit.dense_params for entry in plan.entries if entry.unit.block is not None)
    assert plan.block_params <= plan.budget == int(0.7 * total)
    assert plan.block_params > 0.6 * total
    members = [member for entry in plan.entries for member in entry.unit.members]
    assert len(members) == len(set(members)) == 2 * 7 + 2


def test_plan_survives_json(source, moments, tmp_path):
    plan = make_plan(source, moments, ConvertOptions(keep=0.5, format="auto"))
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    store.write_json(tmp_path / "broken.json", {"entries": [{}]})
    with pytest.raises(ConfigError, match=r"broken\.json: not a plan"):
        load_plan(tmp_path / "broken.json")


def test_a_smaller_budget_never_predicts_less_loss(source, moments):
    losses = [
        sum(entry.loss for entry in make_plan(source, moments, ConvertOptions(keep=keep)).entries)
        for keep in (0.9, 0.7, 0.5)
    ]
    assert losses == sorted(losses)


def test_the_global_budget_beats_equal_shares_in_predicted_loss(source, moments):
    loss = {}
    for allocation in ("global", "uniform"):
        options = ConvertOptions(keep=0.6, format="lowrank", allocation=allocation)
        loss[allocation] = sum(e.loss for e in make_plan(source, moments, options).entries)
    assert loss["global"] < loss["uniform"]


def test_auto_takes_panels_where_they_lose_less(source, moments):
    loss, formats = {}, {}
    for singles in ("lowrank", "panels"):
        options = ConvertOptions(keep=0.7, sharing="none", singles=singles)
        plan = make_plan(source, moments, options)
        assert plan.block_params <= plan.budget
        loss[singles] = sum(entry.loss for entry in plan.entries)
        formats[singles] = {entry.spec.format for entry in plan.entries if entry.spec}
    assert "panels" in formats["panels"] - formats["lowrank"]
    assert loss["panels"] < loss["lowrank"]
    whole = make_plan(source, None, ConvertOptions(keep=1.0, singles="panels"))
    assert {entry.spec for entry in whole.entries} == {None}


def test_matrices_can_all_be_left_whole_with_fewer_channels_between_them(source, moments):
    inside = {"joint_channels": part_specs, "joint_value_output": lambda spec: [output_part(spec)]}
    loss = {}
    for singles in ("lowrank", "dense"):
        plan = make_plan(source, moments, ConvertOptions(keep=0.7, singles=singles))
        assert plan.block_params <= plan.budget
        loss[singles] = sum(entry.loss for entry in plan.entries)
    assert loss["dense"] > loss["lowrank"]
    inner = [entry.spec for entry in plan.entries if entry.spec]
    assert {spec.format for spec in inner} <= {*INNER}
    assert inner
    for spec in inner:
        assert all(map(parts.is_whole, inside.get(spec.format, lambda spec: [])(spec)))


@pytest.mark.parametrize(
    "words", [{"sharing": "none"}, {"sharing": "bonds"}, {"allocation": "uniform"}]
)
def test_whole_matrices_need_channels_to_drop(words):
    with pytest.raises(UsageError, match="nothing is left that could shrink"):
        ConvertOptions(singles="dense", **words)


@pytest.mark.parametrize("format", ["kron", "mpo"])
def test_several_splits_to_choose_from_predict_less_loss(format, source, moments, monkeypatch):
    options = ConvertOptions(keep=0.7, format=format)
    plan = make_plan(source, moments, options)
    monkeypatch.setattr(planner, "templates", lambda *words: [template(*words)])
    alone = make_plan(source, moments, options)
    losses = [sum(entry.loss for entry in found.entries) for found in (plan, alone)]
    assert losses[0] < 0.99 * losses[1], losses


def test_keep_one_is_exact(source):
    plan = make_plan(source, None, ConvertOptions(keep=1.0, format="mpo", metric="plain"))
    assert all(entry.loss == 0 for entry in plan.entries)
    assert {e.spec.format for e in plan.entries if e.unit.block is not None} == {"mpo"}
    assert {e.spec for e in make_plan(source, None, ConvertOptions(keep=1.0)).entries} == {None}


def test_impossible_wishes_are_refused(source, moments):
    with pytest.raises(UsageError, match=r"--format dense: dense matrices cannot be shrunk"):
        make_plan(source, moments, ConvertOptions(keep=0.5, format="dense"))
    with pytest.raises(UsageError, match="budget is too small"):
        make_plan(source, moments, ConvertOptions(keep=0.001, format="lowrank"))


def test_the_embedding_has_its_own_budget(source, moments):
    plan = make_plan(source, moments, ConvertOptions(keep=0.8, keep_embeddings=0.5))
    outside = plan.of_block(None)
    assert [entry.unit.members[0] for entry in outside] == ["model.embed_tokens", "lm_head"]
    assert all(entry.params <= 0.5 * entry.unit.dense_params for entry in outside)
    assert isinstance(Plan.from_json(plan.to_json()), Plan)


def test_candidates_are_found_again_and_the_plan_is_the_same(source, moments, tmp_path):
    options = ConvertOptions(keep=0.5)
    plan = make_plan(source, moments, options, work=tmp_path)
    assert plan == make_plan(source, moments, options)
    (tmp_path / "block.0001.json").unlink()  # a run killed after its first block
    before = (tmp_path / "block.0000.json").stat().st_mtime_ns
    assert make_plan(source, moments, options, work=tmp_path) == plan
    assert (tmp_path / "block.0000.json").stat().st_mtime_ns == before
