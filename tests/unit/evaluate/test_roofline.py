"""Work is counted from what runs: for a dense Llama it is what the closed form of cost says."""

from __future__ import annotations

import pytest

from qll.evaluate import forward_flops
from qll.evaluate.paired import best_ratio, race, ratio
from qll.runtime import Runtime
from qll.runtime.work import Work, held_bytes, work_of
from tests.unit.runtime.conftest import both, flat, make_model, rebuilt, stored


@pytest.mark.parametrize("name", ["dense", "interpolative", "inner", "mpo"])
def test_flops_are_those_of_the_model(name):
    model = make_model(name)
    runtime = Runtime.from_model(model, flat(), choice=stored)
    counted = work_of(runtime, 1, 1, 33).flops
    expected = forward_flops(model, 1, 33)
    if name == "inner":  # attention runs over the channels that are left, values are written out
        assert 0.8 * expected < counted < 1.1 * expected
    else:
        assert counted == expected


def test_bytes_are_those_of_the_weights_and_the_cache():
    model = make_model("dense")
    runtime = Runtime.from_model(model, flat())
    linears = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    weights = 4 * (linears + model.lm_head.weight.numel())
    cache = 2 * 2 * 2 * 16 * 10 * 4
    assert work_of(runtime, 1, 1, 10).bytes == weights + cache
    assert held_bytes(runtime) == weights
    # ten texts share the weights, not their caches
    assert work_of(runtime, 10, 1, 10).bytes == weights + 10 * cache


def test_two_programs_are_held_and_one_is_read():
    sizes = {}
    for name, choice in {"stored": stored, "rebuilt": rebuilt, "both": both}.items():
        runtime = Runtime.from_model(make_model("interpolative"), flat(), choice=choice)
        sizes[name] = held_bytes(runtime)
    assert sizes["stored"] < sizes["rebuilt"] < sizes["both"]
    runtime = Runtime.from_model(make_model("interpolative"), flat(), choice=both)
    one, many = (work_of(runtime, 1, tokens, 0).bytes for tokens in (1, 8))
    assert one < many < sizes["both"]


def test_limits_take_the_slower_of_reading_and_computing():
    assert Work(10, 100).seconds(1.0, 100.0) == 10.0
    assert Work(10, 100).seconds(100.0, 1.0) == 100.0


def test_runs_take_turns():
    order = []
    times = race({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3)
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3}
    steady = {"a": [1.0, 10.0, 2.0], "b": [2.0, 20.0, 4.0]}
    assert ratio(steady, "a", "b") == 2.0
    assert best_ratio(steady, "b", "a") == 0.5
