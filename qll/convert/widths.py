"""Candidates of every width of integers, for a budget of bits.

Rounding a dense matrix in its metric loses what `expected_losses` says, within a few hundredths
mostly. A network loses more for its numbers, since what its cores lose is multiplied by the others.
Measured in block 28 of SmolLM2-135M, groups of 32: low rank at half and at 0.85 of the numbers,
2 to 4 bits, 1.4 to 7.9 times what its share of the numbers of the dense matrix would lose
(q_proj, gate_proj). NETWORK_FACTOR is near the upper end, so that a network is taken where it wins
for certain. Whole matrices inside a shared format round like dense ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from qll.convert.alternate import oriented
from qll.convert.candidates import Candidate, stored_bits
from qll.convert.inner import is_whole_inside
from qll.convert.inner_parts import member_scales
from qll.convert.metric import Metric
from qll.tn.network import NetworkSpec
from qll.tn.packed import BITS, Packing, as_rows
from qll.tn.rounding import expected_losses

NETWORK_FACTOR = 6.0

Losses = dict[int, float]
"""bits -> loss of a matrix that is rounded to them."""


def rounding_losses(weight: Float[Tensor, "out into"], metric: Metric, group: int) -> Losses:
    """What packing a dense matrix is expected to lose at every width, comparable with the losses
    of candidates: nats per token in the K-FAC metric, else relative.

    >>> from qll.convert.metric import plain
    >>> import torch
    >>> losses = rounding_losses(torch.randn(64, 64, dtype=torch.float64), plain(), 32)
    >>> list(losses), losses[2] > losses[3] > losses[4] > losses[8]
    ([2, 3, 4, 8], True)
    """
    (scale,) = member_scales([weight], [metric])
    pair = oriented((metric.left, metric.right), tuple(weight.shape), group)
    packings = [Packing(bits, group) for bits in BITS]
    found = expected_losses(as_rows(weight, group), packings, *pair)
    return {bits: scale * loss for bits, loss in zip(BITS, found, strict=True)}


def with_widths(
    candidates: Sequence[Candidate], rounding: Mapping[str, Losses], group: int
) -> Iterator[Candidate]:
    """Every candidate at every width, with its size in bits and what rounding adds to its loss.

    rounding: that of the dense matrix, by name.
    """
    for item in candidates:
        factor = 1.0 if is_whole(item.spec) else NETWORK_FACTOR
        share = factor * item.params / item.unit.dense_params
        for bits in BITS:
            rounded = share * sum(rounding[member][bits] for member in item.unit.members)
            size = stored_bits(item.unit, item.spec, Packing(bits, group))
            yield replace(item, loss=item.loss + rounded, bits=bits, stored_bits=size)


def is_whole(spec: NetworkSpec | None) -> bool:
    """Whether every number of a network stands in a matrix, none in a factor of one."""
    return spec is None or is_whole_inside(spec)
