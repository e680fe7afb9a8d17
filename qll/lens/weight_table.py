"""Every feature at every matrix around its place: rho and critical bond, and the curve over `keep`.

Only weights are used: the converted network's for rho (`read_write`), the original's for the
critical bond (`critical`), which therefore also says what a smaller or larger budget would do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from qll.convert.metric import Metric, plain
from qll.lens.critical import NestedCuts, rank_at
from qll.lens.read_write import Crossing, crossings, weight_survival
from qll.lens.sae import SAE
from qll.lens.survival import KEPT
from qll.model import gain_of

# blocks before and after a place whose matrices are asked
REACH = 2
# the features that fire most, up to so many, are asked about
MOST_FEATURES = 16384
KEEPS = tuple(round(0.05 * step, 2) for step in range(1, 21))


class WeightTable(NamedTuple):
    """Matrices by features; both lists of a row belong to `crossings` of the same number."""

    crossings: list[Crossing]
    shapes: list[tuple[int, int]]
    """(out, in) of each matrix."""
    features: Int[Tensor, " n"]
    rho: Float[Tensor, "matrices n"]
    """float32; NaN where the original matrix answers nothing."""
    critical: Int[Tensor, "matrices n"]
    """int32; -1 where the original matrix answers nothing."""
    metric: str

    def summary(self) -> dict[str, Any]:
        """metric, features, matrices (quartiles of rho and of the critical bond), over_keep; JSON.

        over_keep: with every matrix cut to a low-rank network of `keep` of its numbers, the share
        of (feature, matrix) pairs kept, and of features kept by every matrix.
        """
        rows = []
        for number, (crossing, shape) in enumerate(zip(self.crossings, self.shapes, strict=True)):
            rho, bond = self.rho[number].double(), self.critical[number].double()
            rho, bond = rho[~rho.isnan()], bond[bond >= 0]
            rows.append(
                {
                    "matrix": crossing.matrix,
                    "side": crossing.side,
                    "rank": min(shape),
                    "rho": _quartiles(rho),
                    "kept_share": float((rho >= KEPT).double().mean()) if len(rho) else None,
                    "critical": _quartiles(bond),
                }
            )
        return {
            "metric": self.metric,
            "features": len(self.features),
            "matrices": rows,
            "over_keep": self.over_keep(),
        }

    def over_keep(self) -> dict[str, list[float]]:
        """keep, kept_share (of pairs) and every (of features kept by all matrices)."""
        found: dict[str, list[float]] = {"keep": list(KEEPS), "kept_share": [], "every": []}
        asked = self.critical >= 0
        if not asked.any():
            return {name: [] for name in found}
        for keep in KEEPS:
            ranks = torch.tensor([rank_at(keep, *shape) for shape in self.shapes])
            kept = self.critical <= ranks[:, None]
            found["kept_share"].append(float(kept[asked].double().mean()))
            found["every"].append(float((kept | ~asked).all(dim=0).double().mean()))
        return found


def plain_everywhere(matrix: str) -> Metric:
    """The Frobenius norm, whatever the matrix."""
    return plain()


def weight_table(
    dense: PreTrainedModel,
    converted: PreTrainedModel,
    sae: SAE,
    features: Int[Tensor, " n"],
    metric_at: Callable[[str], Metric] = plain_everywhere,
    *,
    reach: int = REACH,
) -> WeightTable:
    """rho and critical bond of `features` at the matrices within `reach` blocks of their place.

    metric_at: from a module path to the metric that critical bonds are cut in.
    """
    around = crossings(sae.spec.writes, dense.config.num_hidden_layers, reach)
    directions = sae.directions(features).cpu()
    rho, critical, shapes, kinds = [], [], [], set()
    places = tqdm(around, f"weights at {sae.spec.writes}", unit="w", file=sys.stderr, disable=None)
    for crossing in places:
        weight = dense.get_submodule(crossing.matrix).weight.detach().cpu()
        metric = metric_at(crossing.matrix)
        asked = directions
        if crossing.side == "read" and (gain := gain_of(crossing.matrix, dense.config)):
            asked = asked * dense.get_parameter(gain).detach().cpu().float()
        rho.append(weight_survival(dense, converted, crossing, directions).float())
        critical.append(NestedCuts(weight, metric).critical_bond(asked, crossing.side).int())
        shapes.append(tuple(weight.shape))
        kinds.add(metric.kind)
    empty = torch.zeros(0, len(features))
    return WeightTable(
        around,
        shapes,
        features,
        torch.stack(rho) if rho else empty,
        torch.stack(critical) if critical else empty.int(),
        " and ".join(sorted(kinds)) or "plain",
    )


def _quartiles(values: Tensor) -> list[float] | None:
    """First quartile, median, third; None of nothing."""
    if not len(values):
        return None
    edges = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    return torch.quantile(values.double(), edges).tolist()
