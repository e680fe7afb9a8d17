"""How one matrix times tokens is computed: torch's own products, in the form measured fastest here.

    plain    x @ W^T in the dtype of W
    packed   W in oneDNN's blocked layout: CPUs read a plain one well below their bandwidth
    int4     torch's kernel for 4-bit codes with a scale per group, activations in bfloat16
    int8     the same for 8-bit codes with one scale per row

A kernel takes x [tokens, into] and gives [tokens, out] in the dtype of x. Only `plain` exists on
every device; `available` says which of the others do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from itertools import count
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float
from jaxtyping import Int8 as Codes
from torch import Tensor, nn

from qll.runtime.direct import Direct
from qll.tn.packed import Packing, group_axis

INT4_GROUPS = (32, 64, 128, 256)
# torch's kernels for codes take rows and columns by so many; the 8-bit one does not check it and
# reads beyond the end
CODED_ROWS, CODED_COLUMNS = 16, 32
# CPUs have a fast float16 product for one vector and none for many: beyond, W is widened first.
FEW = 4


class Plain(Direct):
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
        weight = self.weight
        if weight.dtype == torch.float16 and x.device.type == "cpu" and x.shape[0] > FEW:
            return nn.functional.linear(x.float(), weight.float()).to(x.dtype)
        if x.dtype == weight.dtype:
            return nn.functional.linear(x, weight)
        return nn.functional.linear(x.to(weight.dtype), weight).to(x.dtype)


class Packed(Direct):
    """x @ W^T in the dtype of W (float32 or bfloat16), W reordered once for oneDNN.

    The reordered tensor is opaque to torch, so it is no buffer: `.to()` leaves it where it is, and
    a compiled graph reaches it by number.
    """

    name = "packed"

    def __init__(self, matrix: Float[Tensor, "out into"]) -> None:
        super().__init__()
        self.numbers = matrix.numel()
        self.num_bytes = self.numbers * matrix.element_size()
        self.dtype = matrix.dtype
        self._out, self._number = matrix.shape[0], next(_numbers)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), 1)
        _packed[self._number] = self

    def forward(self, x: Float[Tensor, "tokens into"]) -> Float[Tensor, "tokens out"]:
        """x W^T, rounded once, at the end."""
        if torch.compiler.is_compiling():
            return packed_product(x, self._number, self._out)
        return self.product(x)

    def product(self, x: Float[Tensor, "tokens into"]) -> Float[Tensor, "tokens out"]:
        """The same, outside a compiled graph."""
        # the overload by name: torch would look for it at every call
        product = torch.ops.mkldnn._linear_pointwise.default
        if x.dtype == self.dtype:
            return product(x, self._weight, None, "none", [], "")
        return product(x.to(self.dtype), self._weight, None, "none", [], "").to(x.dtype)


_numbers = count()
_packed: WeakValueDictionary[int, Packed] = WeakValueDictionary()


@torch.library.custom_op(
    "qll::packed_product", mutates_args=(), schema="(Tensor x, int number, int out) -> Tensor"
)
def packed_product(x: Tensor, number: int, out: int) -> Tensor:
    """What `Packed` of this number makes of x: one operation of a compiled graph."""
    return _packed[number].product(x)


@packed_product.register_fake
def _(x: Tensor, number: int, out: int) -> Tensor:
    return x.new_empty(x.shape[0], out)


class Int4(Direct):
    """x @ W^T with W as 4-bit codes in groups along its rows; x is rounded to bfloat16."""

    name = "int4"

    def __init__(
        self, codes: Codes[Tensor, "out into"], scales: Float[Tensor, "out groups"], group: int
    ) -> None:
        super().__init__()
        self.group = group
        convert = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        self.register_buffer("codes", convert(codes.to(torch.int32) + 8, 1))
        # the kernel computes (code - 8) * scale + zero
        spread = scales.to(torch.bfloat16).mT
        zeros = torch.zeros_like(spread)
        self.register_buffer("scales", torch.stack([spread, zeros], -1).contiguous())
        self.numbers = codes.numel()
        # of a scale and a zero one is needed
        self.num_bytes = self.numbers // 2 + scales.numel() * self.scales.element_size()

    def forward(self, x: Float[Tensor, "tokens into"]) -> Float[Tensor, "tokens out"]:
        """x W^T."""
        low = x.to(torch.bfloat16).contiguous()
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        return product(low, self.codes, self.group, self.scales).to(x.dtype)


class Int8(Direct):
    """x @ W^T with W as 8-bit codes and a scale per row; x is rounded to bfloat16.

    >>> codes = torch.full((16, 32), -3, dtype=torch.int8)
    >>> Int8(codes, torch.full((16, 1), 0.5), 32)(torch.ones(1, 32))[0, :2].tolist()
    [-48.0, -48.0]
    """

    name = "int8"

    def __init__(
        self, codes: Codes[Tensor, "out into"], scales: Float[Tensor, "out 1"], group: int
    ) -> None:
        super().__init__()
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scales", scales[:, 0].to(torch.bfloat16))
        self.numbers = codes.numel()
        self.num_bytes = self.numbers + scales.numel() * self.scales.element_size()

    def forward(self, x: Float[Tensor, "tokens into"]) -> Float[Tensor, "tokens out"]:
        """x W^T."""
        product = torch.ops.aten._weight_int8pack_mm
        return product(x.to(torch.bfloat16), self.codes, self.scales).to(x.dtype)


KERNELS: dict[str, Callable[[Tensor], nn.Module]] = {"plain": Plain, "packed": Packed}
CODED: dict[str, Callable[[Tensor, Tensor, int], nn.Module]] = {"int4": Int4, "int8": Int8}


def available(dtype: torch.dtype, device: torch.device) -> list[str]:
    """Kernels that hold a matrix of `dtype` exactly and work on `device`.

    >>> available(torch.float16, torch.device("cpu"))
    ['plain']
    """
    names = ["plain"]
    has_layout = dtype in (torch.float32, torch.bfloat16) and device.type == "cpu"
    if has_layout and _works(partial(_try_packed, dtype)):
        names.append("packed")
    return names


@cache
def coded_kernels(dtype: torch.dtype, device: torch.device) -> list[str]:
    """Kernels for packed matrices of a model of `dtype` on `device`.

    They round activations to bfloat16, so only a model in bfloat16 is given to them.

    >>> coded_kernels(torch.float32, torch.device("cpu"))
    []
    """
    if dtype != torch.bfloat16 or device.type != "cpu":
        return []
    return [name for name in CODED if _works(partial(_try_coded, name))]


def coded_kernel(packing: Packing, shape: tuple[int, ...]) -> str | None:
    """The kernel that reads a matrix of this shape as it is packed, or None.

    >>> coded_kernel(Packing(4, 32), (64, 96)), coded_kernel(Packing(8, 32), (64, 96))
    ('int4', None)
    >>> coded_kernel(Packing(8, 96), (64, 96))
    'int8'
    """
    if len(shape) != 2 or group_axis(shape, packing.group) != 1:
        return None
    out, into = shape
    if out % CODED_ROWS or into % CODED_COLUMNS:
        return None
    if packing.bits == 4 and packing.group in INT4_GROUPS:
        return "int4" if into % packing.group == 0 else None
    return "int8" if packing.bits == 8 and packing.group >= into else None


def _try_packed(dtype: torch.dtype) -> None:
    """oneDNN refuses bfloat16 on processors without its instructions, and float32 nowhere."""
    Packed(torch.zeros(16, 32, dtype=dtype))(torch.zeros(1, 32, dtype=dtype))


def _try_coded(name: str) -> None:
    codes = torch.zeros(CODED_ROWS, CODED_COLUMNS, dtype=torch.int8)
    scales = torch.ones(CODED_ROWS, 1)
    CODED[name](codes, scales, CODED_COLUMNS)(torch.zeros(1, CODED_COLUMNS))


def _works(attempt: Callable[[], None]) -> bool:
    """Whether an operator that some builds of torch lack runs here."""
    try:
        with torch.no_grad():
            attempt()
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return True
