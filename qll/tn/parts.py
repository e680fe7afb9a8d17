"""A few matrices stored one after another, each whole or as a low-rank network.

What is left of the members of a joint format once their inner dimension is smaller. A part of full
rank is stored as it is, one core; any other as `qll.tn.lowrank` stores it.

>>> parts = specs(((4, 6), (6, 4)), (4, 2), "interpolative")
>>> shapes(parts)
TensorShapes(cores=((4, 6), (4, 2), (2, 4)), indices=((2,),))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from qll.tn.lowrank import LowRank
from qll.tn.network import NetworkSpec, TensorShapes
from qll.tn.svd import singular_values

Part = Tensor | LowRank


def specs(
    sizes: Sequence[tuple[int, int]], ranks: Sequence[int], gauge: str
) -> tuple[NetworkSpec, ...]:
    """The low-rank spec of every part; one of full rank stands for a whole matrix."""
    return tuple(
        NetworkSpec("lowrank", size, (rank,), gauge=gauge)
        for size, rank in zip(sizes, ranks, strict=True)
    )


def is_whole(spec: NetworkSpec) -> bool:
    """Whether the part is stored as one matrix."""
    return spec.ranks[0] >= min(spec.shape)


def shapes(parts: Sequence[NetworkSpec]) -> TensorShapes:
    """What the parts store, in order."""
    each = [
        TensorShapes((spec.shape,)) if is_whole(spec) else LowRank.tensor_shapes(spec)
        for spec in parts
    ]
    cores = tuple(shape for item in each for shape in item.cores)
    return TensorShapes(cores, tuple(shape for item in each for shape in item.indices))


def unpack(
    parts: Sequence[NetworkSpec], cores: Sequence[Tensor], indices: Sequence[Tensor]
) -> list[Part]:
    """The parts around stored tensors, not copied."""
    cores, indices = list(cores), list(indices)
    found: list[Part] = []
    for spec in parts:
        if is_whole(spec):
            found.append(cores.pop(0))
            continue
        own = tuple(indices.pop(0) for _ in LowRank.tensor_shapes(spec).indices)
        found.append(LowRank(spec, (cores.pop(0), cores.pop(0)), own))
    return found


def pack(parts: Sequence[Part]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(cores, indices) of the parts, in the order of `shapes`."""
    cores = [core for part in parts for core in (part.cores if _low(part) else (part,))]
    return tuple(core.contiguous() for core in cores), tuple(
        i for part in parts if _low(part) for i in part.indices
    )


def truncated(matrix: Float[Tensor, "out into"], spec: NetworkSpec) -> Part:
    """The best part of `spec` in the Frobenius norm, gauge "none"."""
    return matrix if is_whole(spec) else LowRank.decompose(matrix, spec.with_gauge("none"))


def regauged(part: Part, gauge: str) -> Part:
    """The same matrix in another gauge; a whole one has none."""
    if not _low(part):
        return part
    return part.interpolate() if gauge == "interpolative" else part.expand()


def apply(part: Part, x: Float[Tensor, "*batch into"]) -> Float[Tensor, "*batch out"]:
    """W x for every vector x."""
    return part.apply(x) if _low(part) else torch.nn.functional.linear(x, part)


def matrix(part: Part) -> Float[Tensor, "out into"]:
    """W."""
    return part.to_matrix() if _low(part) else part


def rows(part: Part, ids: Int[Tensor, " ids"]) -> Float[Tensor, "ids into"]:
    """Rows `ids` of W."""
    return part.rows(ids) if _low(part) else part[ids]


def flops(part: Part, tokens: int) -> int:
    """Floating-point operations of `apply` on `tokens` vectors."""
    return part.flops(tokens) if _low(part) else 2 * tokens * part.numel()


def spectrum(part: Part) -> Float64[Tensor, "_"]:
    """Singular values of W, descending."""
    return part.bond_spectrum(0) if _low(part) else singular_values(part)


def _low(part: Part) -> bool:
    return isinstance(part, LowRank)
