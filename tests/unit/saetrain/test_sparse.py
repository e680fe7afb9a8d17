"""Sparse products against dense ones, their gradients, and the kernels against both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qll.saetrain.sparse import Pattern, combine, products

ROOT = Path(__file__).parents[3]


def ragged(seed: int, rows: int, size: int) -> Pattern:
    """Rows that name 0 to 5 rows of a table, repeats included."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 6, (rows,), generator=generator)
    indices = torch.randint(0, size, (int(counts.sum()),), generator=generator)
    return Pattern(indices, torch.nn.functional.pad(counts.cumsum(0), (1, 0)), size)


def dense(values: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """All codes as a [rows, size] matrix."""
    full = values.new_zeros(len(pattern.offsets) - 1, pattern.size)
    return full.index_put((pattern.rows, pattern.indices), values, accumulate=True)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 12))
def test_both_are_what_the_dense_matrices_give(seed, rows, size):
    pattern = ragged(seed, rows, size)
    torch.manual_seed(seed)
    values = torch.randn(len(pattern.indices), dtype=torch.float64, requires_grad=True)
    table = torch.randn(size, 7, dtype=torch.float64, requires_grad=True)
    x = torch.randn(rows, 7, dtype=torch.float64, requires_grad=True)
    made, wanted = combine(values, table, pattern), dense(values, pattern) @ table
    torch.testing.assert_close(made, wanted)
    found = products(x, table, pattern)
    expected = (x @ table.T)[pattern.rows, pattern.indices]
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(made), torch.randn_like(found)
    pairs = ((made * weights[0]).sum() + (found * weights[1]).sum()) / 1
    others = ((wanted * weights[0]).sum() + (expected * weights[1]).sum()) / 1
    inputs = (values, table, x)
    for left, right in zip(
        torch.autograd.grad(pairs, inputs), torch.autograd.grad(others, inputs), strict=True
    ):
        torch.testing.assert_close(left, right)


def test_gradients_by_differences():
    pattern = ragged(1, 5, 6)
    torch.manual_seed(0)
    values = torch.randn(len(pattern.indices), dtype=torch.float64, requires_grad=True)
    table = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, t: combine(v, t, pattern), (values, table))
    assert torch.autograd.gradcheck(lambda x, t: products(x, t, pattern), (x, table))


def test_the_transposed_pattern_twice_is_the_pattern():
    pattern = Pattern.of(torch.tensor([[1, 3], [0, 3], [2, 3]]), size=5)
    again = pattern.transposed.transposed
    assert again.offsets.tolist() == pattern.offsets.tolist()
    assert again.indices.tolist() == pattern.indices.view(-1, 2).sort(dim=1)[0].flatten().tolist()


KERNELS = """
import torch
from qll.saetrain import kernels
from qll.saetrain.sparse import Pattern, combine, products

torch.manual_seed(0)
for width in (9, 64, 1100):
    counts = torch.tensor([0, 3, 1, 0, 6])
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    pattern = Pattern(torch.randint(0, 13, (10,)), offsets, 13)
    values, table, x = torch.randn(10), torch.randn(13, width), torch.randn(5, width)
    made = kernels.combine(values, table, pattern.indices, offsets)
    torch.testing.assert_close(made, combine(values, table, pattern), rtol=1e-4, atol=1e-4)
    found = kernels.products(x, table, pattern.indices, pattern.rows)
    torch.testing.assert_close(found, products(x, table, pattern), rtol=1e-4, atol=1e-4)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is published for Linux")
def test_triton_kernels_give_what_the_cpu_gives():
    """In Triton's interpreter, which has to be asked for before Triton is imported."""
    result = subprocess.run(
        [sys.executable, "-c", KERNELS],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
