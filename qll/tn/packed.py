"""Integers in the place of floating-point cores: groups of numbers that share a scale.

A group is `group` neighbours along one axis of a tensor; number = scale * code with a code of
`bits` bits, -2^(bits-1) .. 2^(bits-1) - 1. A scale may be negative: the code range has one level
more below zero, and the sign says on which side the group needs it. Scales are bfloat16: the range
of float32, and exact in whatever wider dtype they are read. Codes are packed without gaps, the
earlier one in the lower bits.

>>> packing = Packing(bits=4, group=32)
>>> packing.shapes((6, 40)), packing.num_bytes((6, 40))
({'packed': (120,), 'scales': (6, 2)}, 144)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int8, Int32, Shaped, UInt8
from torch import Tensor, nn

from qll.errors import ConfigError

BITS = (2, 3, 4, 8)
WORD = 8  # codes of `bits` bits that fill `bits` whole bytes
SCALE_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Packing:
    """How tensors are packed. Raises ConfigError for bits or a group that cannot be."""

    bits: int
    group: int

    def __post_init__(self) -> None:
        if self.bits not in BITS or self.group < 1:
            raise ConfigError(
                "not a packing",
                where="packed",
                expected=f"bits of {', '.join(map(str, BITS))} and a positive group",
                found=f"bits {self.bits}, group {self.group}",
            )

    @property
    def levels(self) -> tuple[int, int]:
        """The least and the greatest code."""
        half = 1 << (self.bits - 1)
        return -half, half - 1

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """What a tensor of `shape` is stored as: uint8 codes, scales [rows, groups in a row]."""
        rows, length = _rows_and_length(shape, self.group)
        size = -(-rows * length * self.bits // 8)
        return {"packed": (size,), "scales": (rows, -(-length // self.group))}

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of `shape`, scales included."""
        shapes = self.shapes(shape)
        return shapes["packed"][0] + math.prod(shapes["scales"]) * SCALE_DTYPE.itemsize

    def to_json(self) -> dict[str, int]:
        """A JSON object; `from_json` is its inverse."""
        return {"bits": self.bits, "group": self.group}

    @classmethod
    def from_json(cls, value: Any) -> Packing:
        """The packing written by `to_json`; raises KeyError, TypeError or ConfigError."""
        bits, group = value["bits"], value["group"]
        if type(bits) is not int or type(group) is not int:
            raise TypeError(f"bits {bits!r} and group {group!r} are not both integers")
        return cls(bits, group)


def group_axis(shape: tuple[int, ...], group: int) -> int:
    """The axis that groups run along: the last that fills a group, else the longest.

    >>> group_axis((576, 64), 32), group_axis((48, 9, 9, 1), 32), group_axis((9, 9, 8), 32)
    (1, 0, 1)
    """
    full = [axis for axis, size in enumerate(shape) if size >= group]
    return full[-1] if full else max(range(len(shape)), key=lambda axis: (shape[axis], axis))


def as_rows(tensor: Shaped[Tensor, "..."], group: int) -> Shaped[Tensor, "rows length"]:
    """The tensor with its group axis last, as a matrix.

    >>> as_rows(torch.zeros(40, 3, 1), 32).shape
    torch.Size([3, 40])
    """
    axis = group_axis(tuple(tensor.shape), group)
    return tensor.movedim(axis, -1).reshape(-1, tensor.shape[axis])


def from_rows(
    rows: Shaped[Tensor, "rows length"], shape: tuple[int, ...], group: int
) -> Shaped[Tensor, "..."]:
    """The inverse of `as_rows`.

    >>> tensor = torch.randn(40, 3, 2)
    >>> torch.equal(from_rows(as_rows(tensor, 32), (40, 3, 2), 32), tensor)
    True
    """
    axis = group_axis(shape, group)
    others = [size for k, size in enumerate(shape) if k != axis]
    return rows.reshape(*others, shape[axis]).movedim(-1, axis)


def pack(codes: Int8[Tensor, "rows length"], bits: int) -> UInt8[Tensor, " bytes"]:
    """The codes without gaps.

    >>> pack(torch.tensor([[-8, 7, 0]], dtype=torch.int8), 4).tolist()
    [240, 8]
    """
    shifted = codes.reshape(-1).to(torch.int32) + (1 << (bits - 1))
    if bits == 8:
        return shifted.to(torch.uint8)
    size = -(-shifted.numel() * bits // 8)
    words = nn.functional.pad(shifted, (0, -shifted.numel() % WORD)).reshape(-1, WORD)
    words = (words << _places(bits, WORD, words)).sum(1, dtype=torch.int32)
    return ((words[:, None] >> _places(8, bits, words)) & 255).to(torch.uint8).reshape(-1)[:size]


def unpack(
    packed: UInt8[Tensor, " bytes"], bits: int, rows: int, length: int
) -> Int8[Tensor, "rows length"]:
    """The inverse of `pack`.

    >>> codes = torch.tensor([[-4, 3, 0], [1, -1, 2]], dtype=torch.int8)
    >>> torch.equal(unpack(pack(codes, 3), 3, 2, 3), codes)
    True
    """
    half = 1 << (bits - 1)
    if bits == 8:
        return (packed.to(torch.int16) - half).to(torch.int8).reshape(rows, length)
    words = nn.functional.pad(packed, (0, -packed.numel() % bits)).reshape(-1, bits)
    words = (words.to(torch.int32) << _places(8, bits, packed)).sum(1, dtype=torch.int32)
    codes = (words[:, None] >> _places(bits, WORD, packed)) & ((1 << bits) - 1)
    return (codes - half).to(torch.int8).reshape(-1)[: rows * length].reshape(rows, length)


def dequantise(
    packed: UInt8[Tensor, " bytes"],
    scales: Float[Tensor, "rows groups"],
    shape: tuple[int, ...],
    packing: Packing,
) -> Float[Tensor, "..."]:
    """The tensor of `shape` that is stored as (packed, scales), in the dtype of the scales.

    >>> scales = torch.tensor([[0.5]])
    >>> packed = pack(torch.tensor([[-8, 7, 0]], dtype=torch.int8), 4)
    >>> dequantise(packed, scales, (1, 3), Packing(4, 32)).tolist()
    [[-4.0, 3.5, 0.0]]
    """
    codes = unpack(packed, packing.bits, *_rows_and_length(shape, packing.group))
    return scaled(codes, scales, shape, packing.group)


def scaled(
    codes: Int8[Tensor, "rows length"],
    scales: Float[Tensor, "rows groups"],
    shape: tuple[int, ...],
    group: int,
) -> Float[Tensor, "..."]:
    """The tensor of `shape` whose groups are codes times their scale; differentiable in these.

    >>> scaled(torch.tensor([[-8, 7]], dtype=torch.int8), torch.tensor([[0.5]]), (1, 2), 32)
    tensor([[-4.0000,  3.5000]])
    """
    spread = scales.repeat_interleave(group, dim=1)[:, : codes.shape[1]]
    return from_rows(codes.to(scales.dtype) * spread, shape, group).contiguous()


def _places(step: int, count: int, like: Tensor) -> Int32[Tensor, " count"]:
    """How far the parts of a word are shifted."""
    return step * torch.arange(count, dtype=torch.int32, device=like.device)


def _rows_and_length(shape: tuple[int, ...], group: int) -> tuple[int, int]:
    length = shape[group_axis(shape, group)]
    return math.prod(shape) // length, length
