"""How one matrix times tokens is computed: torch's own products, in the form measured fastest here.

    plain    x @ W^T in the dtype of W
    packed   W in oneDNN's blocked layout: CPUs read a plain one well below their bandwidth
    int4     torch's kernel for 4-bit codes with a scale per group, activations in bfloat16

A kernel takes x [tokens, into] and gives [tokens, out] in the dtype of x. Only `plain` exists on
every device; `available` says which of the others do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qll.tn.packed import Packing, unpack

INT4_GROUPS = (32, 64, 128, 256)
# CPUs have a fast float16 product for one vector and none for many: beyond, W is widened first.
FEW = 4


class Plain(nn.Module):
    """x @ W^T with W as it is.

    >>> Plain(torch.eye(2))(torch.ones(1, 2)).tolist()
    [[1.0, 1.0]]
    """

    name = "plain"

    def __init__(self, matrix: Float[Tensor, "out into"]) -> None:
        super().__init__()
        self.register_buffer("weight", matrix.contiguous())
        self.numbers = matrix.numel()
        self.num_bytes = self.numbers * matrix.element_size()

    def forward(self, x: Float[Tensor, "tokens into"]) -> Float[Tensor, "tokens out"]:
        """x W^T."""
        if self.weight.dtype == torch.float16 and x.device.type == "cpu" and x.shape[0] > FEW:
            return nn.functional.linear(x.float(), self.weight.float()).to(x.dtype)
        if x.dtype == self.weight.dtype:
            return nn.functional.linear(x, self.weight)
        return nn.functional.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)


class Packed(nn.Module):
    """x @ W^T in the dtype of W (float32 or bfloat16), W reordered once for oneDNN.

    The reordered tensor is opaque to torch, so it is no buffer: `.to()` leaves it where it is.
    """

    name = "packed"

    def __init__(self, matrix: Float[Tensor, "out into"]) -> None:
        super().__init__()
        self.numbers = matrix.numel()
        self.num_bytes = self.numbers * matrix.element_size()
        self.dtype = matrix.dtype
        self._weight = torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), 1)

    def forward(self, x: Float[Tensor, "tokens into"]) -> Float[Tensor, "tokens out"]:
        """x W^T, rounded once, at the end."""
        product = torch.ops.mkldnn._linear_pointwise
        return product(x.to(self.dtype), self._weight, None, "none", [], "").to(x.dtype)


class Int4(nn.Module):
    """x @ W^T with W as 4-bit codes in groups along its rows; x is rounded to bfloat16."""

    name = "int4"

    def __init__(self, packed: Tensor, scales: Tensor, shape: tuple[int, int], group: int) -> None:
        super().__init__()
        codes = unpack(packed, 4, *shape).to(torch.int32) + 8
        self.group = group
        convert = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        self.register_buffer("codes", convert(codes, 1))
        # the kernel computes (code - 8) * scale + zero
        spread = scales.to(torch.bfloat16).mT
        zeros = torch.zeros_like(spread)
        self.register_buffer("scales", torch.stack([spread, zeros], -1).contiguous())
        self.numbers = shape[0] * shape[1]
        # of a scale and a zero one is needed
        self.num_bytes = self.numbers // 2 + scales.numel() * scales.element_size()

    def forward(self, x: Float[Tensor, "tokens into"]) -> Float[Tensor, "tokens out"]:
        """x W^T."""
        low = x.to(torch.bfloat16).contiguous()
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        return product(low, self.codes, self.group, self.scales).to(x.dtype)


KERNELS: dict[str, Callable[[Tensor], nn.Module]] = {"plain": Plain, "packed": Packed}


def available(dtype: torch.dtype, device: torch.device) -> list[str]:
    """Kernels that hold a matrix of `dtype` exactly and work on `device`.

    >>> available(torch.float16, torch.device("cpu"))
    ['plain']
    """
    names = ["plain"]
    if dtype in (torch.float32, torch.bfloat16) and device.type == "cpu" and _works(_try_packed):
        names.append("packed")
    return names


def int4_fits(packing: Packing, shape: tuple[int, ...], device: torch.device) -> bool:
    """Whether torch has a 4-bit kernel for this packing of a matrix of this shape on `device`."""
    if packing.bits != 4 or packing.group not in INT4_GROUPS or len(shape) != 2:
        return False
    out, into = shape
    whole = into % packing.group == 0 and out % 16 == 0
    return whole and device.type == "cpu" and _works(_try_int4)


def _try_packed() -> None:
    Packed(torch.zeros(16, 32, dtype=torch.bfloat16))(torch.zeros(1, 32, dtype=torch.bfloat16))


def _try_int4() -> None:
    packed, scales = torch.zeros(256, dtype=torch.uint8), torch.ones(16, 1)
    Int4(packed, scales, (16, 32), 32)(torch.zeros(1, 32))


def _works(attempt: Callable[[], None]) -> bool:
    """Whether an operator that some builds of torch lack runs here."""
    try:
        with torch.no_grad():
            attempt()
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return True
