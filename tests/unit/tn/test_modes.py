"""Splitting sizes into legs, and matrices into sites."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest
import torch

from qll.errors import UsageError
from qll.tn.modes import (
    balanced_factors,
    default_modes,
    merge,
    paired_modes,
    skewed_modes,
    split,
    unfold,
)

LLAMA = {
    (576, 576): {"out": (8, 8, 9), "in": (9, 8, 8)},
    (192, 576): {"out": (4, 6, 8), "in": (9, 8, 8)},
    (1536, 576): {"out": (8, 12, 16), "in": (9, 8, 8)},
    (49152, 576): {"out": (32, 32, 48), "in": (9, 8, 8)},
    (14336, 4096): {"out": (16, 28, 32), "in": (16, 16, 16)},
    (128256, 4096): {"out": (35, 49, 75), "in": (16, 16, 16)},
}


@pytest.mark.parametrize(("shape", "modes"), LLAMA.items())
def test_modes_of_llama_matrices(shape, modes):
    assert default_modes(shape, 3) == modes


@pytest.mark.parametrize("sites", [1, 2, 3, 4, 5])
def test_only_sizes_with_large_primes_are_padded(sites):
    for size in (1, 7, 61, 64, 97, 128, 1009, 4096, 32000, 50257, 128256):
        modes = default_modes((size, size), sites)
        for side in modes.values():
            assert len(side) == sites
            assert size <= prod(side) <= 1.11 * size
        largest = max(p for p in range(1, size + 1) if size % p == 0 and balanced(p))
        if largest <= 64 or sites == 1:
            assert prod(modes["out"]) == size


def balanced(number: int) -> bool:
    """Whether `number` is 1 or a prime."""
    return all(number % divisor for divisor in range(2, int(number**0.5) + 1))


@pytest.mark.parametrize("size", [1, 12, 36, 210, 576, 997, 1536])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_factors_are_the_most_balanced(size, parts):
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    sums = [sum(choice) for choice in product(divisors, repeat=parts) if prod(choice) == size]
    found = balanced_factors(size, parts)
    assert prod(found) == size
    assert list(found) == sorted(found)
    assert sum(found) == min(sums)


def test_split_puts_every_entry_where_the_digits_say():
    out, into = (2, 3), (3, 2)
    matrix = torch.arange(25.0).reshape(5, 5)
    tensor = split(matrix, out, into)
    for first_out, first_in, second_out, second_in in product(*map(range, tensor.shape)):
        row, column = first_out * 3 + second_out, first_in * 2 + second_in
        expected = matrix[row, column] if row < 5 and column < 5 else 0.0
        assert tensor[first_out, first_in, second_out, second_in] == expected


def test_merge_undoes_split_with_and_without_padding():
    matrix = torch.randn(10, 7)
    assert torch.equal(merge(split(matrix, (5, 2), (7, 1)), (10, 7)), matrix)
    assert torch.equal(merge(split(matrix, (3, 2, 2), (2, 2, 2)), (10, 7)), matrix)


def test_unfold_keeps_all_entries_in_order():
    tensor = torch.arange(36.0).reshape(2, 3, 3, 2)
    assert torch.equal(unfold(tensor, 1).flatten(), tensor.flatten())
    assert unfold(tensor, 1).shape == (6, 6)


@pytest.mark.parametrize(
    "modes",
    [
        {"out": (2, 2)},
        {"out": (2, 2), "in": (4,)},
        {"out": (), "in": ()},
        {"out": (2, 0), "in": (2, 2)},
        {"out": (2, 1), "in": (2, 2)},
    ],
)
def test_modes_that_do_not_fit_are_refused(modes):
    with pytest.raises(UsageError):
        paired_modes(modes, (4, 4))


def test_impossible_splits_are_refused():
    with pytest.raises(UsageError):
        default_modes((0, 4), 2)
    with pytest.raises(UsageError):
        default_modes((4, 4), 0)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("sites", [2, 3, 4])
def test_skewed_modes_fill_the_matrix_and_are_no_low_rank_in_disguise(sites, axis):
    for shape in product((8, 12, 64, 192, 576), repeat=2):
        modes = skewed_modes(shape, sites, axis)
        out, into = paired_modes(modes, shape)
        assert (prod(out), prod(into), len(out)) == (*shape, sites)
        cuts = {(prod(out[:k]), prod(into[:k])) for k in range(1, sites)}
        assert not cuts & {(shape[0], 1), (1, shape[1])}
        # near the cut it is named after
        larger = max(min(m * n, prod(shape) // (m * n)) for m, n in cuts)
        assert larger >= min(shape[axis] // 2, 2 * shape[1 - axis])


def test_a_side_that_does_not_split_has_no_skewed_modes():
    assert skewed_modes((7, 12), 2, 0) == skewed_modes((22, 1), 2, 0) == {}
    assert skewed_modes((11 * 13, 12), 2, 0) == skewed_modes((12, 2), 3, 0) == {}
