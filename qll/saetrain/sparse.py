"""Sparse codes times a dense matrix, forward and backward, without a dense array of all codes.

A row of codes names a few rows of a table. Two operations, each the other's gradient:

    combine       out_t = sum_j values_tj table[indices_tj]        decoding
    products      out_tj = <x_t, table[indices_tj]>                encoding features already chosen

and the gradient of either in the table is `combine` over the transposed pattern, where each row of
the table names the tokens that used it. So a step costs tokens * k * d, not tokens * d_sae * d, and
no atomics: the transposition is one stable sort. On CUDA with Triton the two run as kernels of
`qll.saetrain.kernels`; everywhere else as torch's embedding_bag and its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Pattern:
    """Which rows of a table with `size` rows each row of codes names (compressed sparse rows).

    >>> pattern = Pattern.of(torch.tensor([[2, 0], [2, 1]]), size=3)
    >>> pattern.rows.tolist(), pattern.transposed.indices.tolist()
    ([0, 0, 1, 1], [0, 1, 0, 1])
    >>> pattern.transposed.offsets.tolist()
    [0, 1, 2, 4]
    """

    indices: Int[Tensor, " entries"]
    offsets: Int[Tensor, " rows_and_one"]
    size: int

    @staticmethod
    def of(indices: Int[Tensor, "rows width"], size: int) -> Pattern:
        """The pattern of rows that all name as many."""
        rows, width = indices.shape
        offsets = torch.arange(rows + 1, device=indices.device) * width
        return Pattern(indices.flatten(), offsets, size)

    @cached_property
    def rows(self) -> Int[Tensor, " entries"]:
        """The row of every entry."""
        counts = self.offsets.diff()
        return torch.repeat_interleave(counts, output_size=len(self.indices))

    @cached_property
    def order(self) -> Int[Tensor, " entries"]:
        """The entries sorted by what they name, for values that go with `transposed`."""
        return self.indices.argsort(stable=True)

    @cached_property
    def transposed(self) -> Pattern:
        """For every row of the table, the rows that name it."""
        counts = self.indices.bincount(minlength=self.size)
        offsets = functional.pad(counts.cumsum(0), (1, 0))
        return Pattern(self.rows[self.order], offsets, len(self.offsets) - 1)


def combine(
    values: Float[Tensor, " entries"], table: Float[Tensor, "size d"], pattern: Pattern
) -> Float[Tensor, "rows d"]:
    """Sums of rows of `table`, weighted by `values`; differentiable in both.

    >>> pattern = Pattern.of(torch.tensor([[1], [0]]), size=2)
    >>> combine(torch.tensor([2.0, 3.0]), torch.eye(2), pattern).tolist()
    [[0.0, 2.0], [3.0, 0.0]]
    """
    return _Combine.apply(values, table, pattern)


def products(
    x: Float[Tensor, "rows d"], table: Float[Tensor, "size d"], pattern: Pattern
) -> Float[Tensor, " entries"]:
    """The inner product of every row of `x` with the rows of `table` it names; differentiable.

    >>> pattern = Pattern.of(torch.tensor([[1, 0]]), size=2)
    >>> products(torch.tensor([[5.0, 7.0]]), torch.eye(2), pattern).tolist()
    [7.0, 5.0]
    """
    return _Products.apply(x, table, pattern)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, table: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(values, table)
        ctx.pattern = pattern
        return _combine(values, table, pattern)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (values, table), pattern = ctx.saved_tensors, ctx.pattern
        grad = grad.contiguous()
        wants_values, wants_table, _ = ctx.needs_input_grad
        return (
            _products(grad, table, pattern) if wants_values else None,
            _combine(values[pattern.order], grad, pattern.transposed) if wants_table else None,
            None,
        )


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(x, table)
        ctx.pattern = pattern
        return _products(x, table, pattern)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, table), pattern = ctx.saved_tensors, ctx.pattern
        grad = grad.contiguous()
        wants_x, wants_table, _ = ctx.needs_input_grad
        return (
            _combine(grad, table, pattern) if wants_x else None,
            _combine(grad[pattern.order], x, pattern.transposed) if wants_table else None,
            None,
        )


def _combine(values: Tensor, table: Tensor, pattern: Pattern) -> Tensor:
    if uses_triton(table):
        from qll.saetrain import kernels

        return kernels.combine(values, table, pattern.indices, pattern.offsets)
    return functional.embedding_bag(
        pattern.indices,
        table,
        pattern.offsets,
        per_sample_weights=values,
        mode="sum",
        include_last_offset=True,
    )


def _products(x: Tensor, table: Tensor, pattern: Pattern) -> Tensor:
    if uses_triton(table):
        from qll.saetrain import kernels

        return kernels.products(x, table, pattern.indices, pattern.rows)
    # the gradient of embedding_bag in its weights: a gather and a sum would copy every row first
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x, table, pattern.indices, pattern.offsets[:-1], pattern.rows, 0
    )


def uses_triton(table: Tensor) -> bool:
    """Whether the kernels run on the device of `table`: CUDA, where Triton is installed."""
    return table.is_cuda and find_spec("triton") is not None
