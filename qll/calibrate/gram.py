"""Sums of x x^T over tokens: float32 products, float64 sums, the upper triangle only.

A second moment is symmetric, so only the panels on and above the diagonal are multiplied, held and
stored: half the work, memory and disk of the square matrix.

>>> gram = GramSum(3); gram.add(torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]]))
>>> unpack(gram.packed()).tolist()
[[1.0, 2.0, 0.0], [2.0, 5.0, 1.0], [0.0, 1.0, 1.0]]
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

# Rows of a panel: narrow panels waste less below the diagonal, wide ones multiply faster.
PANEL = 256


class GramSum:
    """Running sum of x x^T over tokens of width `size`; `tokens` counts what was added."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.tokens = 0
        rows = [min(PANEL, size - start) for start in range(0, size, PANEL)]
        widths = range(size, 0, -PANEL)
        shapes = list(zip(rows, widths, strict=True))
        # one block: the C library keeps many small ones when they are freed, 3 GB in Llama 3 8B
        block = torch.zeros(sum(map(math.prod, shapes)), dtype=torch.float64)
        parts = block.split([math.prod(shape) for shape in shapes])
        self._panels = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def add(self, rows: Float[Tensor, "tokens size"]) -> None:
        """Add sum_t rows[t] rows[t]^T: multiplied in float32 where `rows` lies, summed on the CPU
        in float64 (MPS has none)."""
        assert rows.shape[1] == self.size, "rows have another width than the sum"
        rows = rows.detach().float()
        # in a model's pass autocast would round every product, and the sum could have directions of
        # negative length, more than shrinkage makes up for
        with torch.autocast(rows.device.type, enabled=False):
            for number, panel in enumerate(self._panels):
                start = number * PANEL
                product = rows[:, start : start + PANEL].T @ rows[:, start:]
                panel += product.cpu()
        self.tokens += rows.shape[0]

    def packed(self) -> Float32[Tensor, " entries"]:
        """The upper triangle row after row, size (size + 1) / 2 entries, as float32.

        Rounding a finished sum to float32 is a relative error of 6e-8 per entry, far below the
        sampling noise of any calibration text.
        """
        entries = torch.empty(self.size * (self.size + 1) // 2)
        for number, panel in enumerate(self._panels):
            start, stop = _place(number * PANEL, len(panel), self.size)
            entries[start:stop] = panel[_upper(*panel.shape)]
        return entries


def unpack(packed: Float[Tensor, " entries"]) -> Float64[Tensor, "size size"]:
    """The symmetric matrix whose upper triangle, row after row, is `packed`, in float64.

    Made in place: of 14336 x 14336 every copy would be another 1.6 GB.
    """
    size = (math.isqrt(8 * packed.numel() + 1) - 1) // 2
    assert size * (size + 1) // 2 == packed.numel(), "not the triangle of a square matrix"
    matrix, entries = np.empty((size, size)), packed.numpy()
    start = 0
    for row in range(size):
        stop = start + size - row
        matrix[row, row:] = entries[start:stop]
        start = stop
    for row in range(0, size, PANEL):
        end = min(row + PANEL, size)
        corner = matrix[row:end, row:end]
        corner[:] = np.triu(corner) + np.triu(corner, 1).T
        matrix[end:, row:end] = matrix[row:end, end:].T
    return torch.from_numpy(matrix)


def _place(row: int, rows: int, size: int) -> tuple[int, int]:
    """Where the entries from the diagonal on of `rows` rows from `row` on lie in a packed triangle.

    >>> _place(1, 2, 3)
    (3, 6)
    """
    start, stop = (size * r - r * (r - 1) // 2 for r in (row, row + rows))
    return start, stop


def _upper(rows: int, columns: int) -> Tensor:
    return torch.ones(rows, columns, dtype=torch.bool).triu()
