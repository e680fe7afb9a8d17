"""What a unit could become: (spec, parameters, predicted loss) along a ladder of sizes.

Ranks come from the singular values at every cut, measured in the unit's metric: one threshold for
all cuts of a network, found by bisection so that the parameters fit. The predicted loss is the sum
of the discarded squares, exact for one bond and an upper bound to first order for several
(Oseledets 2011, theorem 2.2); in the K-FAC metric half of it is nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qll.convert.units import Unit
from qll.tn import JOINTS, NETWORKS, tensor_shapes
from qll.tn.network import NetworkSpec

RANK_STEP = 8
SHARES = tuple(step / 40 for step in range(2, 40))


@dataclass(frozen=True)
class Candidate:
    """One thing a unit could become; spec None is the dense matrix."""

    unit: Unit
    spec: NetworkSpec | None
    params: int
    loss: float


def dense(unit: Unit) -> Candidate:
    """The unit left as it is."""
    return Candidate(unit, None, unit.dense_params, 0.0)


def exact(unit: Unit, spec: NetworkSpec) -> Candidate:
    """The unit at full ranks: no loss."""
    full = spec.with_ranks(format_of(spec).max_ranks(spec))
    return Candidate(unit, full, tensor_shapes(full).num_params, 0.0)


def ladder(unit: Unit, spec: NetworkSpec, spectra: Sequence[Float[Tensor, "_"]]) -> list[Candidate]:
    """Candidates of growing size from the singular values at the cuts of `spec`, all smaller
    than the dense unit."""
    tails = [tail_energies(spectrum) for spectrum in spectra]
    if len(spectra) == 1 and spec.format in ("lowrank", "kron"):
        step = RANK_STEP if spec.format == "lowrank" else 1
        ranked = [(rank,) for rank in range(step, len(spectra[0]) + 1, step)]
        ranked = ranked[:: max(1, len(ranked) // 128)]
    else:
        ranked = [ranks_within(spec, spectra, int(share * unit.dense_params)) for share in SHARES]
    found: dict[int, Candidate] = {}
    for ranks in ranked:
        sized = format_of(spec).clamp(spec.with_ranks(ranks))
        params = tensor_shapes(sized).num_params
        if params < unit.dense_params:
            loss = sum(
                float(tail[min(rank, len(tail) - 1)])
                for tail, rank in zip(tails, sized.ranks, strict=True)
            )
            found[params] = Candidate(unit, sized, params, loss)
    return [found[params] for params in sorted(found)]


def ranks_within(
    spec: NetworkSpec, spectra: Sequence[Float[Tensor, "_"]], budget: int
) -> tuple[int, ...]:
    """Ranks from one threshold over all cuts, the largest that store at most `budget` numbers."""
    top = max(float(spectrum[0]) for spectrum in spectra)
    low, high = math.log(max(top, 1e-30)) - 40, math.log(max(top, 1e-30)) + 1
    best = _above(spectra, high)
    for _ in range(50):
        middle = (low + high) / 2
        ranks = _above(spectra, middle)
        sized = format_of(spec).clamp(spec.with_ranks(ranks))
        if tensor_shapes(sized).num_params <= budget:
            best, high = sized.ranks, middle
        else:
            low = middle
    return best


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


def _above(spectra: Sequence[Tensor], log_threshold: float) -> tuple[int, ...]:
    threshold = math.exp(log_threshold)
    return tuple(max(1, int((spectrum > threshold).sum())) for spectrum in spectra)
