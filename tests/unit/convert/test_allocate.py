"""Allocation: the optimum on small menus, coverage by groups, impossible budgets."""

import itertools

import pytest
import torch

from qll.convert.allocate import choose
from qll.convert.candidates import Candidate
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
