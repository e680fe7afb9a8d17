"""Modules that hold packed integers where a core or a dense matrix was.

    <path>.cores.<i>.packed  .scales    PackedTensor in the cores of a network module
    <path>.packed            .scales    PackedLinear in the place of a dense Linear

The first use turns the codes into floating point numbers in the dtype of the scales (that of the
model) and keeps them until the buffers change: a folder is as small as its packed bytes, a model
that has run is as large as an unpacked one. Codes are buffers, so nothing trains them; `trainable`
gives every scale a gain that can be trained.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qll.errors import IntegrityError
from qll.tn.packed import SCALE_DTYPE, Packing, dequantise, group_axis, scaled, unpack

Packings = Mapping[str, Packing]


class PackedTensor(nn.Module):
    """A tensor of `shape` as codes and scales; NaN until it is loaded.

    >>> held = PackedTensor((6, 40), Packing(4, 32))
    >>> {name: tuple(tensor.shape) for name, tensor in held.state_dict().items()}
    {'packed': (120,), 'scales': (6, 2)}
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        packing: Packing,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.packing = tuple(shape), packing
        sizes = packing.shapes(self.shape)
        codes = torch.zeros(sizes["packed"], dtype=torch.uint8, device=device)
        scales = torch.full(sizes["scales"], torch.nan, dtype=dtype or SCALE_DTYPE, device=device)
        self.register_buffer("packed", codes)
        self.register_buffer("scales", scales)
        self.gains: nn.Parameter | None = None
        self._memo: tuple[Any, Tensor] | None = None

    def values(self) -> Float[Tensor, "..."]:
        """The tensor, in the dtype of the scales; the same object until a buffer changes."""
        if self.gains is not None:
            return scaled(self._codes, self.scales * self.gains, self.shape, self.packing.group)
        if torch.compiler.is_compiling():
            return dequantise(self.packed, self.scales, self.shape, self.packing)
        state = tuple(_state(tensor) for tensor in (self.packed, self.scales))
        if self._memo is None or self._memo[0] != state:
            # an inference tensor could not be used in a later pass with gradients
            with torch.inference_mode(False), torch.no_grad():
                found = dequantise(self.packed, self.scales, self.shape, self.packing)
            self._memo = (state, found)
        return self._memo[1]

    def trainable(self) -> None:
        """Give every scale a factor of 1 that can be trained; the codes stay.

        >>> held = PackedTensor((6, 40), Packing(4, 32))
        >>> held.trainable(); held.gains.shape
        torch.Size([6, 2])
        """
        rows = math.prod(self.shape) // self.shape[group_axis(self.shape, self.packing.group)]
        codes = unpack(self.packed, self.packing.bits, rows, math.prod(self.shape) // rows)
        self._codes = codes
        self.gains = nn.Parameter(torch.ones_like(self.scales))

    def extra_repr(self) -> str:
        """Shape, bits and group, for print(model)."""
        return f"shape={self.shape}, bits={self.packing.bits}, group={self.packing.group}"

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles: without anything remembered."""
        return self.__dict__ | {"_memo": None}


class PackedLinear(PackedTensor):
    """A Linear without bias whose weight is packed.

    >>> layer = PackedLinear((6, 40), Packing(8, 32), dtype=torch.float32)
    >>> layer.in_features, layer(torch.ones(2, 40)).shape
    (40, torch.Size([2, 6]))
    """

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the matrix."""
        return self.shape[1]

    @property
    def bias(self) -> None:
        """None: matrices with a bias are never converted."""
        return None

    @property
    def weight(self) -> Float[Tensor, "out into"]:
        """The matrix."""
        return self.values()

    def forward(self, x: Float[Tensor, "*batch into"]) -> Float[Tensor, "*batch out"]:
        """W x for every vector x."""
        return nn.functional.linear(x, self.values())


def make_scales_trainable(model: nn.Module) -> None:
    """Every packed tensor of `model` gets a factor per scale that can be trained."""
    for module in _packed(model).values():
        module.trainable()


def tuned_scales(model: nn.Module) -> dict[str, Float[Tensor, "rows groups"]]:
    """The scales by name in the checkpoint, times what training made of their factors."""
    return {
        f"{name}.scales": (module.scales * module.gains).detach().to(SCALE_DTYPE)
        for name, module in _packed(model).items()
        if module.gains is not None
    }


def packed_shapes(name: str, shape: tuple[int, ...], packing: Packing) -> dict[str, tuple]:
    """Names and shapes of the two tensors that hold the tensor at `name`.

    >>> packed_shapes("lm_head", (6, 40), Packing(4, 32))
    {'lm_head.packed': (120,), 'lm_head.scales': (6, 2)}
    """
    return {f"{name}.{part}": size for part, size in packing.shapes(shape).items()}


def require_finite(scales: Float[Tensor, "rows groups"], where: object) -> None:
    """Raise IntegrityError for a scale that is NaN or infinite; tensors without data pass."""
    if not scales.is_meta and not torch.isfinite(scales).all():
        raise IntegrityError(
            "scales of a packed tensor are not finite",
            where=where,
            found=f"{int((~torch.isfinite(scales)).sum())} of {scales.numel()}",
            hint="copy the folder again, or convert again",
        )


def _packed(model: nn.Module) -> dict[str, PackedTensor]:
    return {n: module for n, module in model.named_modules() if isinstance(module, PackedTensor)}


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """Which tensor this is and in what version."""
    return weakref.ref(tensor), None if tensor.is_inference() else tensor._version
