"""How sure the survival of a single feature is: documents drawn again, false discoveries bounded.

Tokens of one text are not independent, so whole documents (windows) are drawn with replacement and
r of every feature is computed anew. On Fisher's scale z = atanh r the spread of the draws gives two
one-sided p-values: that r is `KEPT` or more, and that it is less. Among thousands of features some
look damaged by chance, so the lists of the certainly damaged and the certainly kept are cut by
Benjamini and Hochberg (1995) at a false discovery rate of `RATE`; the rest is undecided.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qll.lens.intervals import LEVEL, weights

RATE = 0.05
DRAWS = 200
# windows beyond these are joined to earlier ones
DOCUMENTS = 64
# a feature seen in fewer documents has no spread to speak of
LEAST_DOCUMENTS = 3
# features drawn at a time
CHUNK = 1024
STANDARD_ERRORS = 1.96  # on either side, for LEVEL
# where atanh is still finite in float64
NEAR_ONE = 1 - 1e-9


@dataclass
class DocumentSums:
    """Per window, the sums of each feature that fires in it: a, b, aa, bb, ab."""

    tokens: list[int] = field(default_factory=list)
    features: list[Int[Tensor, " n"]] = field(default_factory=list)
    sums: list[Float[Tensor, "5 n"]] = field(default_factory=list)

    def add(self, tokens: int, features: Tensor, a: Tensor, b: Tensor) -> None:
        """Add a window: entries of both codes side by side, as `survival.paired` gives them."""
        found, places = torch.unique(features, return_inverse=True)
        sums = a.new_zeros(5, len(found))
        sums.index_add_(1, places, torch.stack([a, b, a * a, b * b, a * b]))
        self.tokens.append(tokens)
        self.features.append(found)
        self.sums.append(sums)

    def drawn(
        self, chosen: Int[Tensor, " n"], seed: int = 0
    ) -> tuple[Float[Tensor, "draws n"], Int[Tensor, " n"]]:
        """r of the chosen features in every draw of documents, float64, NaN where it has none; and
        the number of documents that each fires in.
        """
        count = min(DOCUMENTS, len(self.tokens))
        tokens = torch.zeros(count, dtype=torch.float64)
        for number, size in enumerate(self.tokens):
            tokens[number % count] += size
        hands = weights(count, DRAWS, seed)
        drawn, seen = [], []
        for part in chosen.split(CHUNK):
            table = self._table(part, count)
            seen.append((table[:, 2] + table[:, 3] > 0).sum(0))
            sums = (hands @ table.flatten(1)).unflatten(1, table.shape[1:])
            drawn.append(pearson(*sums.unbind(1), (hands @ tokens)[:, None]))
        if not drawn:
            return torch.zeros(DRAWS, 0, dtype=torch.float64), chosen
        return torch.cat(drawn, dim=1), torch.cat(seen)

    def _table(self, chosen: Tensor, count: int) -> Float[Tensor, "documents 5 n"]:
        """Sums of the chosen features, which ascend."""
        table = torch.zeros(count, 5, len(chosen), dtype=torch.float64)
        for number, (features, sums) in enumerate(zip(self.features, self.sums, strict=True)):
            place = torch.searchsorted(chosen, features).clamp(max=len(chosen) - 1)
            here = chosen[place] == features
            table[number % count].index_add_(1, place[here], sums[:, here])
        return table


def certainty(
    sums: DocumentSums, chosen: Int[Tensor, " n"], r: Float[Tensor, " n"], kept: float
) -> dict[str, Any]:
    """What resampling documents says about the features `chosen`, ascending, with correlations r.

    damaged, sure: masks [n] of features certainly below, certainly at or above `kept`; low and
    high [n], the interval of r; kept_share, the interval of the share at or above `kept` (None for
    fewer than two documents).
    """
    if len(sums.tokens) < 2 or not len(chosen):
        nothing = torch.zeros(len(chosen), dtype=torch.bool)
        unknown = torch.full((len(chosen),), torch.nan, dtype=torch.float64)
        return {"damaged": nothing, "sure": nothing, "low": unknown, "high": unknown,
                "kept_share": None}  # fmt: skip
    drawn, documents = sums.drawn(chosen)
    edges = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = torch.nanquantile(drawn, edges, dim=0)
    spread = _fisher(drawn)
    finite = torch.isfinite(spread)
    mean = torch.where(finite, spread, 0).sum(0) / finite.sum(0)
    error = torch.where(finite, (spread - mean).square(), 0).sum(0) / (finite.sum(0) - 1)
    distance = (_fisher(r) - _fisher(torch.tensor(kept).double())) / error.sqrt()
    below = torch.special.ndtr(distance)
    few = (documents < LEAST_DOCUMENTS) | ~torch.isfinite(below)
    return {
        "damaged": benjamini_hochberg(below.masked_fill(few, 1.0)),
        "sure": benjamini_hochberg((1 - below).masked_fill(few, 1.0)),
        "low": low,
        "high": high,
        "kept_share": _share_interval(drawn, r, kept),
    }


def _share_interval(
    drawn: Float[Tensor, "draws n"], r: Float[Tensor, " n"], kept: float
) -> list[float]:
    """The share of r at or above `kept`, plus and minus two standard errors over the draws.

    Not the draws' own percentiles: repeated documents spread r, which moves the share of what lies
    beyond a threshold, so they would lie beside the estimate (Efron and Tibshirani 1993, ch. 13).
    """
    shares = (drawn >= kept).double().sum(1) / torch.isfinite(drawn).sum(1)
    share, reach = (r >= kept).double().mean(), STANDARD_ERRORS * shares.std()
    return torch.stack([share - reach, share + reach]).clamp(0, 1).tolist()


def benjamini_hochberg(p: Float[Tensor, " n"], rate: float = RATE) -> Bool[Tensor, " n"]:
    """Which hypotheses are rejected when at most `rate` of the rejections may be false.

    >>> benjamini_hochberg(torch.tensor([0.01, 0.04, 0.03, 0.9])).tolist()
    [True, False, False, False]
    """
    if not len(p):
        return torch.zeros(0, dtype=torch.bool)
    ordered, order = p.sort()
    within = ordered <= rate * torch.arange(1, len(p) + 1) / len(p)
    count = int(within.nonzero()[-1]) + 1 if within.any() else 0
    rejected = torch.zeros(len(p), dtype=torch.bool)
    rejected[order[:count]] = True
    return rejected


def pearson(
    a: Tensor, b: Tensor, aa: Tensor, bb: Tensor, ab: Tensor, tokens: Tensor | int
) -> Tensor:
    """Correlations from sums over `tokens`; NaN where a side never varies.

    >>> pearson(*map(torch.tensor, (3.0, 6.0, 5.0, 20.0, 10.0)), 2).item()
    1.0
    """
    alone = (tokens * aa - a * a).clamp(min=0) * (tokens * bb - b * b).clamp(min=0)
    return torch.where(alone > 0, (tokens * ab - a * b) / alone.sqrt(), torch.nan)


def _fisher(r: Tensor) -> Tensor:
    return r.clamp(-NEAR_ONE, NEAR_ONE).atanh()
