"""How aligned phases are: circular statistics, and those of a model's residual stream.

A pair of neighbouring channels (2 j, 2 j + 1) is read as one complex number, in the real twin too:
what a complex model gains must show against what the twin has anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qll.bytelm.model import ByteModel

SCALES = (4, 16, 64)


@dataclass(frozen=True)
class PhaseStatistics:
    """Phases of the stream after one block, averaged over channels and the batch."""

    block: int
    coherence: float
    """R = |mean of e^(i phi)| over positions: 1 when all are equal."""
    random: float
    """R of as many random phases."""
    neighbours: float
    """Mean cosine of the angle between neighbouring positions."""
    windows: dict[int, float]
    """R over windows of so many positions."""


def resultant(phases: Float[Tensor, "*any n"]) -> Float[Tensor, "*any"]:
    """|mean of e^(i phi)| over the last axis, from 0 to 1 (Mardia and Jupp 2000, section 2.3).

    >>> resultant(torch.tensor([0.0, math.pi / 2])).item() == math.sqrt(0.5)
    False
    >>> round(resultant(torch.tensor([0.0, math.pi / 2])).item(), 4)
    0.7071
    """
    return torch.hypot(phases.cos().mean(dim=-1), phases.sin().mean(dim=-1))


def random_resultant(n: int) -> float:
    """What `resultant` is on average for `n` random phases, for large n: sqrt(pi / (4 n)).

    >>> round(random_resultant(100), 4)
    0.0886
    """
    return math.sqrt(math.pi / (4 * n))


def neighbour_coherence(phases: Float[Tensor, "*any n"]) -> Float[Tensor, "*any"]:
    """Mean cosine of the difference between neighbours.

    >>> neighbour_coherence(torch.zeros(5)).item()
    1.0
    """
    return phases.diff(dim=-1).cos().mean(dim=-1)


def pair_coherence(phases: Float[Tensor, "*any n"]) -> Float[Tensor, "*any"]:
    """Mean cosine over all pairs of different positions, in linear time.

    The sum over all pairs is |sum of e^(i phi)|^2.

    >>> pair_coherence(torch.tensor([0.0, math.pi])).item()
    -1.0
    """
    n = phases.shape[-1]
    return ((n * resultant(phases)).square() - n) / (n * (n - 1))


@torch.inference_mode()
def phase_statistics(
    model: ByteModel, ids: Int[Tensor, "batch seq"], scales: Sequence[int] = SCALES
) -> list[PhaseStatistics]:
    """Statistics of the phases after every block when the model reads `ids`.

    >>> from qll.bytelm.config import ModelConfig
    >>> model = ByteModel(ModelConfig(d_model=32, n_layers=2, context=8)).eval()
    >>> [found.block for found in phase_statistics(model, torch.zeros(1, 8, dtype=torch.long))]
    [0, 1]
    """
    found = []
    for block, x in enumerate(streams(model, ids)[1:]):
        pairs = x.float().unflatten(-1, (-1, 2)).movedim(1, -1)
        phases = torch.atan2(pairs[:, :, 1], pairs[:, :, 0])
        seq = phases.shape[-1]
        windows = {
            scale: float(resultant(phases.unfold(-1, scale, scale)).mean())
            for scale in scales
            if scale <= seq
        }
        found.append(
            PhaseStatistics(
                block,
                float(resultant(phases).mean()),
                random_resultant(seq),
                float(neighbour_coherence(phases).mean()),
                windows,
            )
        )
    return found


def streams(
    model: ByteModel, ids: Int[Tensor, "batch seq"]
) -> list[Float[Tensor, "batch seq d_model"]]:
    """The residual stream before the first block and after every block (and the concept layer).

    >>> from qll.bytelm.config import ModelConfig
    >>> model = ByteModel(ModelConfig(d_model=32, n_layers=2, context=8)).eval()
    >>> len(streams(model, torch.zeros(1, 8, dtype=torch.long)))
    3
    """
    readers = [*model.blocks, model.norm]
    seen: list[list[Tensor]] = [[] for _ in readers]

    def keep(place: int) -> Callable[[torch.nn.Module, tuple], None]:
        return lambda module, inputs: seen[place].append(inputs[0].detach())

    hooks = [reader.register_forward_pre_hook(keep(i)) for i, reader in enumerate(readers)]
    try:
        model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    of_bytes = passes_of_bytes(model, ids)
    blocks = [[x for x, chosen in zip(xs, of_bytes, strict=True) if chosen] for xs in seen[:-1]]
    return [torch.cat(xs, dim=1) for xs in [*blocks, seen[-1]]]


def passes_of_bytes(model: ByteModel, ids: Int[Tensor, "batch seq"]) -> list[bool]:
    """Of the passes through the blocks when `ids` are read: True reads bytes, False writes memory.

    >>> from qll.bytelm.config import ModelConfig
    >>> passes_of_bytes(ByteModel(ModelConfig(d_model=32, n_layers=1)), torch.zeros(1, 8).long())
    [True]
    """
    found, end = [], 0
    for piece in model.pieces(ids, 0):
        end += piece.shape[1]
        found.append(True)
        if model.memory is not None and end % model.memory.segment == 0:
            found.append(False)
    return found
