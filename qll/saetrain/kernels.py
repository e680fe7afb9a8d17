"""The two sparse operations of `qll.saetrain.sparse` as Triton kernels, for CUDA.

One program makes a block of one output row: it walks over the entries of its row and reads the rows
of the table they name, so nothing is written twice and the result does not depend on timing.
With TRITON_INTERPRET=1 the same kernels run on the CPU, slowly, which is how they are tested.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

MOST_COLUMNS = 1024  # of a row, per program


def combine(
    values: Float[Tensor, " entries"],
    table: Float[Tensor, "size d"],
    indices: Int[Tensor, " entries"],
    offsets: Int[Tensor, " rows_and_one"],
) -> Float[Tensor, "rows d"]:
    """out_t = sum of values_j table[indices_j] over the entries offsets_t .. offsets_(t+1) - 1."""
    table, rows, width = table.contiguous(), len(offsets) - 1, table.shape[1]
    out = torch.empty(rows, width, device=table.device, dtype=table.dtype)
    block = min(MOST_COLUMNS, triton.next_power_of_2(width))
    if rows:
        _combine[(rows, triton.cdiv(width, block))](
            values.contiguous(), table, indices, offsets, out, width, BLOCK=block
        )
    return out


def products(
    x: Float[Tensor, "rows d"],
    table: Float[Tensor, "size d"],
    indices: Int[Tensor, " entries"],
    rows: Int[Tensor, " entries"],
) -> Float[Tensor, " entries"]:
    """out_j = <x[rows_j], table[indices_j]>, summed in float32."""
    x, table, width = x.contiguous(), table.contiguous(), table.shape[1]
    out = torch.empty(len(indices), device=table.device, dtype=table.dtype)
    block = min(MOST_COLUMNS, triton.next_power_of_2(width))
    if len(indices):
        _products[(len(indices),)](x, table, indices, rows, out, width, BLOCK=block)
    return out


@triton.jit
def _combine(values, table, indices, offsets, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros([BLOCK], dtype=tl.float32)
    first = tl.load(offsets + row)
    last = tl.load(offsets + row + 1)
    for entry in range(first, last):
        place = tl.load(indices + entry).to(tl.int64)
        weight = tl.load(values + entry).to(tl.float32)
        part = tl.load(table + place * width + columns, mask=inside, other=0.0)
        total += weight * part.to(tl.float32)
    tl.store(out + row * width + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _products(x, table, indices, rows, out, width, BLOCK: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + entry).to(tl.int64)
    place = tl.load(indices + entry).to(tl.int64)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        left = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(table + place * width + columns, mask=inside, other=0.0).to(tl.float32)
        total += left * right
    tl.store(out + entry, tl.sum(total).to(out.dtype.element_ty))
