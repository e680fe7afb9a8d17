"""Candidates of a low-rank network plus the few entries that it fits worst: super-weights.

Entries are chosen by what each costs the metric where the low-rank network of about the wanted size
leaves it out (`sparsify.damage`); the losses are those of the best low-rank network beside them.
The fit chooses the entries again, for its own rank, and refits their values. Every entry counts
twice, once for its position.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from qll.convert.candidates import RANK_STEP, Candidate, tail_energies
from qll.convert.metric import Metric, factor
from qll.convert.sparsify import damage
from qll.convert.truncation import truncated
from qll.convert.units import Unit
from qll.convert.whitened import apply_roots
from qll.tn import tensor_shapes
from qll.tn.network import NetworkSpec
from qll.tn.sparse import largest


def outlier_ladder(
    unit: Unit,
    spec: NetworkSpec,
    weight: Float[Tensor, "out into"],
    metric: Metric,
    share: float,
    keep: float,
    step: int = RANK_STEP,
) -> list[Candidate]:
    """Candidates with `share` of the entries and ranks in steps, smaller than the dense unit.

    Losses are squared errors in the metric. `keep`: about which share of the parameters is wanted.

    >>> from qll.convert.metric import plain
    >>> weight = torch.ones(4, 4); weight[1, 2] = 100.0
    >>> unit, spec = Unit(("a",), ((4, 4),)), NetworkSpec("sparse", (4, 4))
    >>> best = outlier_ladder(unit, spec, weight, plain(), 1 / 16, keep=0.5, step=1)[0]
    >>> best.spec.ranks, best.params
    ((1, 1), 10)
    """
    weight = weight.to(torch.float64)
    roots = [None if m is None else factor(m) for m in (metric.left, metric.right)]
    kept = max(1, round(share * unit.dense_params))
    ranks = range(step, min(spec.shape) + 1, step)
    sized = [(rank, spec.with_ranks((kept, rank))) for rank in ranks]
    sized = [
        (rank, one) for rank, one in sized if tensor_shapes(one).num_params < unit.dense_params
    ]
    if not sized:
        return []
    wanted = keep * unit.dense_params
    middle = min(sized, key=lambda pair: abs(tensor_shapes(pair[1]).num_params - wanted))[0]
    rest = weight - truncated(weight, middle, *roots).to_matrix()
    mask = largest(rest.square() * damage(spec.shape, metric), kept)
    seen = apply_roots(roots[:1], weight - rest * mask, roots[1:])
    tails = tail_energies(torch.linalg.svdvals(seen))
    return [
        Candidate(unit, one, tensor_shapes(one).num_params, float(tails[rank]))
        for rank, one in sized
    ]
