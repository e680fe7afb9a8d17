"""Allocation: the optimum on small menus, coverage by groups, impossible budgets."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import OptimizeResult

from qll.convert.allocate import choose
from qll.convert.candidates import Candidate
from qll.convert.lagrange import lagrangian
from qll.convert.units import Unit
from qll.errors import UsageError


def random_menu(seed: int) -> list[Candidate]:
    generator = torch.Generator().manual_seed(seed)
    menu = []
    for name in "abcd":
        unit = Unit((name,), ((10, 10),))
        sizes = torch.randint(10, 100, (4,), generator=generator).tolist()
        losses = sorted(torch.rand(4, generator=generator).tolist(), reverse=True)
        menu += [
            Candidate(unit, None, size, loss)
            for size, loss in zip(sorted(sizes), losses, strict=True)
        ]
    return menu


@pytest.mark.parametrize("seed", range(5))
def test_finds_the_brute_force_optimum(seed):
    menu, budget = random_menu(seed), 220
    by_unit = [[item for item in menu if item.unit.members == (name,)] for name in "abcd"]
    combinations = [
        combo
        for combo in itertools.product(*by_unit)
        if sum(item.params for item in combo) <= budget
    ]
    best = min(sum(item.loss for item in combo) for combo in combinations)
    chosen = choose(menu, budget)
    assert sum(item.params for item in chosen) <= budget
    assert sum(item.loss for item in chosen) <= best * 1.002


def test_a_group_replaces_its_members():
    a, b, both = Unit(("a",), ((4, 4),)), Unit(("b",), ((4, 4),)), Unit(("a", "b"), ((4, 4),) * 2)
    menu = [
        Candidate(a, None, 16, 0.0),
        Candidate(a, None, 8, 2.0),
        Candidate(b, None, 16, 0.0),
        Candidate(b, None, 8, 2.0),
        Candidate(both, None, 16, 1.0),
    ]
    assert [item.unit for item in choose(menu, 16)] == [both]
    assert [item.params for item in choose(menu, 24)] == [16] or choose(menu, 24)[0].unit == both
    assert sum(item.loss for item in choose(menu, 32)) == 0


def test_a_budget_below_the_smallest_choice_is_refused():
    with pytest.raises(UsageError, match=r"budget is too small.*--keep"):
        choose([Candidate(Unit(("a",), ((2, 2),)), None, 4, 0.0)], 3)


def realistic_menu(seed: int, blocks: int = 12) -> tuple[list[Candidate], int]:
    """Blocks of three matrices, two of them also offered as a group, losses falling with size."""
    draw = np.random.default_rng(seed)
    menu = []
    for block in range(blocks):
        names = [f"model.layers.{block}.{name}" for name in "abc"]
        units = [Unit((name,), ((40, 40),)) for name in names]
        units.append(Unit(tuple(names[:2]), ((40, 40),) * 2))
        for unit in units:
            scale, decay = draw.lognormal(0, 1), draw.uniform(1, 6)
            whole = unit.dense_params
            for params in range(whole // 20, whole + 1, whole // 20):
                share = params / whole
                loss = scale * (1 - share) * np.exp(-decay * share)
                menu.append(Candidate(unit, None, params, loss))
    return menu, int(0.55 * blocks * 3 * 1600)


@pytest.mark.parametrize("seed", range(4))
def test_the_relaxation_is_within_a_hundredth_of_the_optimum(seed):
    menu, budget = realistic_menu(seed)
    exact, relaxed = choose(menu, budget), lagrangian(menu, budget)
    assert sum(item.params for item in relaxed) <= budget
    members = [member for item in relaxed for member in item.unit.members]
    assert sorted(members) == sorted({m for item in menu for m in item.unit.members})
    least, found = (sum(item.loss for item in chosen) for chosen in (exact, relaxed))
    assert least * 0.999 <= found <= least * 1.01


@given(st.integers(0, 10_000), st.floats(0.05, 1.3))
@settings(max_examples=40, deadline=None)
def test_the_relaxation_covers_every_matrix_once_within_any_budget(seed, share):
    menu, _ = realistic_menu(seed, blocks=2)
    budget = int(share * 6 * 1600)
    relaxed = lagrangian(menu, budget)
    if relaxed is None:
        with pytest.raises(UsageError):
            choose(menu, budget)
        return
    members = [member for item in relaxed for member in item.unit.members]
    assert len(members) == len(set(members)) == 6
    assert sum(item.params for item in relaxed) <= budget


@pytest.mark.parametrize("status", [1, 4])
def test_without_highs_the_relaxation_is_used_with_a_warning(status, monkeypatch, caplog):
    menu, budget = realistic_menu(0)
    stopped = OptimizeResult(x=None, status=status, message="time limit reached")
    monkeypatch.setattr("qll.convert.allocate.milp", lambda *args, **more: stopped)
    with caplog.at_level("WARNING", logger="qll"):
        chosen = choose(menu, budget)
    assert sum(item.loss for item in chosen) == pytest.approx(
        sum(item.loss for item in lagrangian(menu, budget))
    )
    assert "time limit reached" in caplog.text
    with pytest.raises(UsageError, match="budget is too small"):
        choose(menu, 10)


def test_a_real_time_limit_ends_in_a_plan(caplog):
    menu, budget = realistic_menu(1)
    with caplog.at_level("WARNING", logger="qll"):
        chosen = choose(menu, budget, seconds=1e-6)
    assert sum(item.params for item in chosen) <= budget
    exact = sum(item.loss for item in choose(menu, budget))
    assert sum(item.loss for item in chosen) <= 1.01 * exact
