"""What a unit could become: (spec, parameters, predicted loss) along a ladder of sizes.

Ranks come from the singular values at every cut, measured in the unit's metric, with one threshold
for all cuts of a network. The predicted loss is the sum
of the discarded squares, exact for one bond and an upper bound to first order for several
(Oseledets 2011, theorem 2.2); in the K-FAC metric half of it is nats per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qll.convert.units import Unit
from qll.tn import JOINTS, NETWORKS, tensor_shapes
from qll.tn.network import NetworkSpec
from qll.tn.packed import Packing
from qll.tn.panels import panel_specs

RANK_STEP = 8
HALF = 0.5  # a K-FAC error squared is twice the predicted loss (second-order Taylor term)
# candidates per unit of a format with thresholds
STEPS = 96
INDEX_BITS = 32  # of a stored pivot


@dataclass(frozen=True)
class Candidate:
    """One thing a unit could become; spec None is the dense matrix."""

    unit: Unit
    spec: NetworkSpec | None
    params: int
    loss: float
    bits: int = 0
    """Width of its numbers as integers; 0 leaves that to --bits."""
    stored_bits: int = 0
    """Under a budget of bits: all bits that are stored for it, scales and all."""

    @property
    def size(self) -> int:
        """What it takes of the budget."""
        return self.stored_bits or self.params

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` gives the same candidate, to the last bit of its loss."""
        return {
            "members": self.unit.members,
            "shapes": self.unit.shapes,
            "spec": None if self.spec is None else self.spec.to_json(),
            "params": self.params,
            "loss": self.loss,
            "bits": self.bits,
            "stored_bits": self.stored_bits,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Candidate:
        """The candidate that `to_json` wrote.

        >>> item = Candidate(Unit(("w",), ((2, 3),)), None, 6, 1 / 3)
        >>> Candidate.from_json(item.to_json()) == item
        True
        """
        unit = Unit(tuple(value["members"]), tuple(tuple(shape) for shape in value["shapes"]))
        spec = None if value["spec"] is None else NetworkSpec.from_json(value["spec"])
        sizes = (value["params"], value["loss"], value.get("bits", 0), value.get("stored_bits", 0))
        return cls(unit, spec, *sizes)


def stored_bits(unit: Unit, spec: NetworkSpec | None, packing: Packing) -> int:
    """Bits that are stored for a packed unit: codes, scales and pivot indices.

    >>> stored_bits(Unit(("w",), ((2, 32),)), None, Packing(4, 32))
    288
    """
    if spec is None:
        return 8 * sum(packing.num_bytes(shape) for shape in unit.shapes)
    shapes = tensor_shapes(spec)
    indices = INDEX_BITS * sum(map(prod, shapes.indices))
    return 8 * sum(map(packing.num_bytes, shapes.cores)) + indices


def dense(unit: Unit) -> Candidate:
    """The unit left as it is."""
    return Candidate(unit, None, unit.dense_params, 0.0)


def exact(unit: Unit, spec: NetworkSpec) -> Candidate:
    """The unit at full ranks: no loss."""
    full = spec.with_ranks(format_of(spec).max_ranks(spec))
    return Candidate(unit, full, tensor_shapes(full).num_params, 0.0)


def ladder(
    unit: Unit,
    spec: NetworkSpec,
    spectra: Sequence[Float[Tensor, "_"]],
    step: int = RANK_STEP,
) -> list[Candidate]:
    """Candidates of growing size from the singular values at the cuts of `spec`, all smaller
    than the dense unit; low ranks in multiples of `step`."""
    tails = [tail_energies(spectrum) for spectrum in spectra]
    found: dict[int, Candidate] = {}
    for ranks in rank_ladder(spec, spectra, step):
        sized = format_of(spec).clamp(spec.with_ranks(ranks))
        params = tensor_shapes(sized).num_params
        if params < unit.dense_params:
            loss = sum(
                float(tail[min(rank, len(tail) - 1)])
                for tail, rank in zip(tails, sized.ranks, strict=True)
            )
            found[params] = Candidate(unit, sized, params, loss)
    return [found[params] for params in sorted(found)]


def useful(candidates: Sequence[Candidate], below: int) -> list[Candidate]:
    """Those smaller than `below` with less loss than all smaller ones, at most STEPS of them.

    >>> unit = Unit(("w",), ((2, 2),))
    >>> menu = [Candidate(unit, None, 1, 3.0), Candidate(unit, None, 2, 4.0)]
    >>> [item.params for item in useful(menu, 4)]
    [1]
    """
    best: list[Candidate] = []
    for item in sorted(candidates, key=lambda item: (item.params, item.loss)):
        if item.params < below and (not best or item.loss < best[-1].loss):
            best.append(item)
    if len(best) <= STEPS:
        return best
    return [best[round(place)] for place in torch.linspace(0, len(best) - 1, STEPS).tolist()]


def rank_ladder(
    spec: NetworkSpec, spectra: Sequence[Float[Tensor, "_"]], step: int
) -> list[tuple[int, ...]]:
    """Ranks worth trying: steps of one bond, or for several bonds thresholds common to all.

    The thresholds are spread evenly over the singular values of all cuts, so that each step keeps
    about as many more of them.
    """
    if spec.format == "panels":
        return _panel_ranks(spec, spectra)
    if spec.format == "lowrank":
        return [(rank,) for rank in range(step, len(spectra[0]) + 1, step)]
    values = torch.cat(list(spectra)).sort(descending=True).values
    places = torch.linspace(0, len(values) - 1, min(STEPS, len(values))).long()
    return [_above(spectra, float(values[place])) for place in places]


def tail_energies(spectrum: Float[Tensor, "_"]) -> Float[Tensor, "_"]:
    """Sum of squares after the first r values, for r = 0 .. n, summed from the small end.

    >>> tail_energies(torch.tensor([2.0, 1.0], dtype=torch.float64)).tolist()
    [5.0, 1.0, 0.0]
    """
    squares = spectrum.to(torch.float64).square().flip(0)
    return torch.cat([squares.new_zeros(1), squares.cumsum(0)]).flip(0)


def format_of(spec: NetworkSpec):
    """The class of the spec's format."""
    return NETWORKS.get(spec.format) or JOINTS[spec.format]


def _panel_ranks(spec: NetworkSpec, spectra: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Ranks that minimise loss + price * parameters, for prices from dense panels to rank one.

    A rank gets cheaper the more there are (it saves twice its number in the gauge), so one
    threshold on the singular values would be wrong, and a panel can jump to dense.
    """
    sizes = [
        torch.tensor(
            [tensor_shapes(panel.with_ranks((rank,))).num_params for rank in range(1, most + 1)],
            dtype=torch.float64,
        )
        for panel, most in zip(panel_specs(spec), format_of(spec).max_ranks(spec), strict=True)
    ]
    tails = [tail_energies(spectrum)[1:] for spectrum in spectra]
    gains = torch.cat([spectrum.square() / sum(spec.shape) for spectrum in spectra])
    lowest = gains[gains > 0].min() / 16 if bool((gains > 0).any()) else gains.new_tensor(1e-12)
    prices = torch.logspace(
        float(lowest.log10()), float((16 * gains.max().clamp(min=lowest)).log10()), 2 * STEPS
    )
    found = {
        tuple(
            int((tail + price * size).argmin()) + 1 for tail, size in zip(tails, sizes, strict=True)
        )
        for price in prices.tolist()
    }
    return sorted(found)


def _above(spectra: Sequence[Tensor], threshold: float) -> tuple[int, ...]:
    return tuple(max(1, int((spectrum >= threshold).sum())) for spectrum in spectra)
