"""A budget of bits: every matrix a width of its own, from the prediction to the saved folder."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from qll import store
from qll.calibrate import collect
from qll.convert import load_plan, make_plan
from qll.convert.alternate import round_matrix, round_network
from qll.convert.candidates import dense, stored_bits
from qll.convert.fit import fit
from qll.convert.metric import Metric, plain
from qll.convert.planner import block_candidates
from qll.convert.units import Unit, single_units
from qll.convert.weights import metrics_of, read_weights
from qll.convert.widths import rounding_losses, with_widths
from qll.errors import ConfigError, UsageError
from qll.load import open_source
from qll.options import ConvertOptions
from qll.tn import rounding
from qll.tn.network import NetworkSpec
from qll.tn.packed import BITS, Packing


@pytest.fixture(scope="module")
def source(tiny_hf_folder):
    return open_source(tiny_hf_folder)


@pytest.fixture(scope="module")
def moments(source, tmp_path_factory):
    windows = torch.randint(0, 512, (4, 64), generator=torch.Generator().manual_seed(0))
    return collect(source, windows, tmp_path_factory.mktemp("moments"), gradients=True)


def correlated(count: int) -> torch.Tensor:
    """The second moment of a few samples more than there are channels."""
    hand = torch.Generator().manual_seed(count)
    data = torch.randn(2 * count, count, generator=hand, dtype=torch.float64)
    return data.mT @ data / len(data)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sides", ["neither", "left", "right", "both", "diagonal"])
def test_the_expected_loss_of_a_matrix_is_near_the_real_one(bits, sides):
    hand = torch.Generator().manual_seed(bits)
    weight = torch.randn(96, 160, generator=hand, dtype=torch.float64)
    left = correlated(96) if sides in ("left", "both") else None
    right = correlated(160) if sides in ("right", "both") else None
    if sides == "diagonal":
        left = torch.rand(96, generator=hand, dtype=torch.float64) + 0.1
    metric = Metric("kfac", left, right)
    expected = rounding_losses(weight, metric, 32)[bits]
    error = weight - round_matrix(weight, Packing(bits, 32), metric).matrix
    assert 0.7 < expected / (0.5 * metric.norm_squared(error)) < 1.4


def test_a_sample_of_rows_expects_what_all_of_them_do(monkeypatch):
    hand = torch.Generator().manual_seed(0)
    weights = torch.rand(600, generator=hand, dtype=torch.float64).pow(8) + 1e-4
    rows = torch.randn(600, 64, generator=hand, dtype=torch.float64) * weights[:, None] ** -0.25
    metric = Metric("kfac", weights, correlated(64))
    sampled = rounding_losses(rows, metric, 32)
    monkeypatch.setattr(rounding, "SAMPLED_ROWS", 600)
    whole = rounding_losses(rows, metric, 32)
    assert all(0.93 < sampled[bits] / whole[bits] < 1.07 for bits in BITS)


def test_a_low_rank_network_is_promised_about_what_it_loses():
    hand = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 128, generator=hand, dtype=torch.float64) @ correlated(128)
    metric, unit = plain(), Unit(("w",), ((96, 128),))
    spec = NetworkSpec("lowrank", (96, 128), (24,), gauge="interpolative")
    network = fit([weight], spec, [metric], torch.float64).network
    item = replace(dense(unit), spec=spec, params=sum(core.numel() for core in network.cores))
    losses = {"w": rounding_losses(weight, metric, 32)}
    promised = {one.bits: one.loss for one in with_widths([item], losses, 32)}
    for bits in (2, 3, 4):
        rounded = round_network(network, Packing(bits, 32), [metric])
        real = metric.norm_squared(network.to_matrix() - rounded.network.to_matrix())
        assert 1 / 4 < real / metric.norm_squared(weight) / promised[bits] < 1.2


@pytest.mark.parametrize("format", ["auto", "dense", "lowrank", "joint_tree"])
@pytest.mark.parametrize("budget", [2.8, 3.5, 6.0])
def test_plans_stay_within_the_bits_and_near_them(format, budget, source, moments):
    options = ConvertOptions(keep=1.0, format=format, bits_per_weight=budget)
    plan = make_plan(source, moments, options)
    blocks = [entry for entry in plan.entries if entry.unit.block is not None]
    total = sum(entry.unit.dense_params for entry in blocks)
    assert plan.size <= plan.budget == int(budget * total)
    assert plan.size > 0.9 * plan.budget
    assert all(entry.bits in BITS for entry in blocks)
    assert {entry.bits for entry in plan.entries if entry.unit.block is None} == {0}


def test_widths_of_their_own_are_predicted_to_lose_less_than_one_for_all(source, moments):
    options = ConvertOptions(keep=1.0, format="dense", bits_per_weight=3.5)
    plan = make_plan(source, moments, options)
    same = [
        item
        for block in range(2)
        for item in block_candidates(source, moments, options, block)
        if item.bits == 3
    ]
    assert sum(item.stored_bits for item in same) == plan.budget
    assert sum(entry.loss for entry in plan.entries) < 0.98 * sum(item.loss for item in same)
    assert len({entry.bits for entry in plan.entries}) > 2


def test_the_size_of_a_candidate_is_that_of_its_packed_tensors(source, moments):
    options = ConvertOptions(keep=1.0, bits_per_weight=4.0)
    items = block_candidates(source, moments, options, 0)
    assert {item.bits for item in items} == set(BITS)
    for item in items[::7]:
        packing = Packing(item.bits, options.bits_group)
        assert item.size == item.stored_bits == stored_bits(item.unit, item.spec, packing)
        assert item.size > item.bits * (item.params - item.unit.dense_params)
    unit = single_units(source.config, 0)[0]
    weight = read_weights(source, unit.members, options)[0]
    losses = rounding_losses(weight, metrics_of(source, moments, unit.members, options)[0], 32)
    whole = {one.bits: one.loss for one in items if one.unit == unit and one.spec is None}
    assert whole == losses


def test_a_plan_of_bits_survives_json_and_an_entry_without_a_width_does_not(
    source, moments, tmp_path
):
    plan = make_plan(source, moments, ConvertOptions(keep=1.0, bits_per_weight=3.5))
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json", source.config) == plan
    value = json.loads((tmp_path / "plan.json").read_text())
    for bits, message in ((0, "without a width"), (5, "not a width"), (3.0, "not a width")):
        value["entries"][0]["bits"] = bits
        store.write_json(tmp_path / "plan.json", value)
        with pytest.raises(ConfigError, match=message):
            load_plan(tmp_path / "plan.json", source.config)


@pytest.mark.parametrize(
    "others",
    [
        {"keep": 0.5},
        {"bits": 4},
        {"allocation": "uniform"},
        {"losses": "measured"},
        {"outliers": 0.01},
    ],
    ids=lambda value: next(iter(value)),
)
def test_two_budgets_are_refused(others):
    with pytest.raises(UsageError, match=f"--{next(iter(others))}"):
        ConvertOptions(bits_per_weight=3.5, **others)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_what_is_no_number_of_bits_is_refused(value):
    with pytest.raises(UsageError, match="--bits_per_weight"):
        ConvertOptions(bits_per_weight=value)


def test_too_few_bits_are_refused(source, moments):
    with pytest.raises(UsageError, match=r"(?s)--bits_per_weight.*expected at least \d+ bits"):
        make_plan(source, moments, ConvertOptions(format="dense", bits_per_weight=2.0))
