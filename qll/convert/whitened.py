"""Weights seen through their metric, as every fit of a tensor network begins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qll.convert.metric import Factor
from qll.tn.network import NetworkSpec


@dataclass(frozen=True)
class Whitened:
    """Weights seen through the metric, with what is needed to go back.

    out, into: a root per leg (per panel), None for the identity. order: where row (column) i went
    when panels were sorted.
    """

    matrices: list[Tensor]
    spec: NetworkSpec
    out: list[Factor | None]
    into: list[Factor | None]
    order: Tensor | None = None


def apply_roots(
    out: list[Factor | None], matrix: Float[Tensor, "out into"], into: list[Factor | None]
) -> Float[Tensor, "out into"]:
    """(x out)^T matrix (x into), one leg at a time; a side is whole or has a factor on each leg.

    >>> twice = Factor(2 * torch.eye(1), 0.5 * torch.eye(1))
    >>> apply_roots([twice], torch.ones(1, 1), [None]).tolist()
    [[2.0]]
    """
    dims = [*_dims(out, matrix.shape[0]), *_dims(into, matrix.shape[1])]
    items = [*(out if out[0] else [None]), *(into if into[0] else [None])]
    tensor = matrix.reshape(dims)
    for axis, item in enumerate(items):
        if item is None:
            continue
        if item.root.ndim == 1:
            tensor = tensor.movedim(axis, -1).mul(item.root).movedim(-1, axis)
        else:
            tensor = torch.tensordot(tensor, item.root, dims=([axis], [0])).movedim(-1, axis)
    return tensor.reshape(matrix.shape)


def _dims(items: list[Factor | None], total: int) -> list[int]:
    return [total if item is None else len(item.root) for item in (items if items[0] else [None])]
