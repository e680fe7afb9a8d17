"""Which features survive a conversion: the same autoencoder on the original and on the converted.

For feature i, over the same ordinary tokens t: a_t its activation on the original model, b_t on the
converted, d its direction, x and x' the activations of the two.

    functional   r = Pearson(a, b), zeros included     kept >= 0.9 > blurred >= 0.5 > lost;
                                                       silenced: fires no more
    firing       J = |F and F'| / |F or F'|, deaths and births per token; J of firm firings, which
                 leaves out those within MARGIN of the weakest on their token, where top-k flips
    direction    beta = sum a (x - b_dec).d / sum a^2 and the same with x'; their ratio is 1 when
                 the direction is still written, even where the encoder misfires (Minder et al.
                 2025, arXiv 2504.02922); gain = sum a b / sum a^2 where both fire

Features that fire on fewer than 30 tokens are counted as unmeasured. Cut-offs are ours: read the
CDF. All sums are streaming: O(k) work per token, some float64 vectors of d_sae per autoencoder.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qll.errors import ShapeError
from qll.lens.certainty import RATE, DocumentSums, certainty, pearson
from qll.lens.codes import SparseCodes
from qll.lens.sae import SAE
from qll.lens.sae_metrics import MEASURED_FROM

KEPT, BLURRED = 0.9, 0.5
# a firing is firm if it exceeds the weakest on its token by this share
MARGIN = 0.1
CDF_POINTS = 101
CLASSES = ("kept", "blurred", "lost", "silenced")
SUMS = ("a", "b", "aa", "bb", "ab", "aa_both", "written", "written_after")
COUNTS = ("fires", "fires_after", "both", "firm_both", "firm_any")


class Pairs(NamedTuple):
    """Entries of two sets of codes of the same tokens, side by side; 0 where one is absent."""

    tokens: Int[Tensor, " n"]
    features: Int[Tensor, " n"]
    before: Float[Tensor, " n"]
    after: Float[Tensor, " n"]


def paired(before: SparseCodes, after: SparseCodes, d_sae: int) -> Pairs:
    """Every (token, feature) that fires in either, once.

    >>> one = SparseCodes(torch.tensor([[2.0, 1.0]]), torch.tensor([[5, 3]]))
    >>> two = SparseCodes(torch.tensor([[4.0]]), torch.tensor([[5]]))
    >>> paired(one, two, 8).after.tolist()
    [0.0, 4.0]
    """
    keys, values = [], []
    for codes in (before, after):
        tokens, features, found = codes.entries()
        keys.append(tokens * d_sae + features)
        values.append(found)
    every, places = torch.unique(torch.cat(keys), return_inverse=True)
    table = torch.zeros(2, len(every), dtype=torch.float32, device=every.device)
    table[0, places[: len(keys[0])]] = values[0].float()
    table[1, places[len(keys[0]) :]] = values[1].float()
    return Pairs(every // d_sae, every % d_sae, table[0], table[1])


class Survival:
    """Running sums for one autoencoder; one update per window, results at the end.

    >>> from qll.load.sae_file import LatentMatrix, SAESpec, StoredSAE
    >>> eye, zeros = LatentMatrix(torch.eye(2)), {"b_enc": torch.zeros(2), "b_dec": torch.zeros(2)}
    >>> sae = SAE(StoredSAE(SAESpec("layers.0", 2, 2, 2, "topk", k=1), eye, eye, zeros))
    >>> x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    >>> survival = Survival(sae)
    >>> survival.update(sae.encode(x), sae.encode(x), x, x)
    >>> survival.summary()["kept"]
    2
    """

    def __init__(self, sae: SAE, *, documents: bool = False) -> None:
        """With `documents`, sums are also kept per update, to say how sure a single feature is."""
        self.sae, width = sae, sae.spec.d_sae
        self.documents = DocumentSums() if documents else None
        self.sums = {name: torch.zeros(width, dtype=torch.float64) for name in SUMS}
        self.counts = {name: torch.zeros(width, dtype=torch.int64) for name in COUNTS}
        self.peak = torch.zeros(width)
        self.tokens = 0

    def update(
        self,
        before: SparseCodes,
        after: SparseCodes,
        x: Float[Tensor, "tokens d_out"],
        x_after: Float[Tensor, "tokens d_out"],
        chosen: Bool[Tensor, " tokens"] | None = None,
    ) -> None:
        """Add the tokens of one window (only the `chosen` ones); x, x_after: the activations.

        Raises ShapeError unless both models saw the same number of tokens.
        """
        if not len(before) == len(after) == len(x) == len(x_after):
            raise ShapeError(
                "the two models have to see the same tokens",
                where=self.sae.spec.hookpoint,
                expected=len(before),
                found=len(after),
            )
        if chosen is not None:
            where = chosen.nonzero()[:, 0]
            before, after = before.to("cpu")[where], after.to("cpu")[where]
            x, x_after = x.cpu()[where], x_after.cpu()[where]
        before, after = before.to("cpu"), after.to("cpu")
        self.tokens += len(before)
        self._add_codes(before, after)
        self._add_directions(before, x.float().cpu(), x_after.float().cpu())

    def pearson(self) -> Float[Tensor, " d_sae"]:
        """r of every feature, float64; 0 where either side never varies."""
        sums = (self.sums[name] for name in ("a", "b", "aa", "bb", "ab"))
        return pearson(*sums, self.tokens).nan_to_num(0.0)

    def per_feature(self) -> dict[str, Float[Tensor, " d_sae"]]:
        """r, jaccard, firm_jaccard, direction (ratio), gain, density, peak of every feature.

        NaN where there is nothing to divide by.
        """
        s, c = self.sums, {name: count.double() for name, count in self.counts.items()}
        return {
            "r": self.pearson(),
            "jaccard": c["both"] / (c["fires"] + c["fires_after"] - c["both"]),
            "firm_jaccard": c["firm_both"] / c["firm_any"],
            "direction": s["written_after"] / s["written"],
            "gain": torch.where(c["both"] > 0, s["ab"] / s["aa_both"], torch.nan),
            "density": c["fires"] / max(1, self.tokens),
            "peak": self.peak.double(),
        }

    def certainty(self) -> dict[str, Any]:
        """`qll.lens.certainty.certainty` of the measured features; needs sums per document."""
        chosen = (self.counts["fires"] >= MEASURED_FROM).nonzero()[:, 0]
        return {"features": chosen} | certainty(
            self.documents, chosen, self.pearson()[chosen], KEPT
        )

    def classes(self) -> Int[Tensor, " d_sae"]:
        """Index into CLASSES for every measured feature, -1 for the others."""
        r, measured = self.pearson(), self.counts["fires"] >= MEASURED_FROM
        found = torch.where(r >= KEPT, 0, torch.where(r >= BLURRED, 1, 2))
        found = torch.where(self.counts["fires_after"] == 0, 3, found)
        return torch.where(measured, found, -1)

    def summary(self) -> dict[str, Any]:
        """Counts of classes, shares weighted three ways, the CDF of r, strata, medians; JSON."""
        classes, values = self.classes(), self.per_feature()
        measured = classes >= 0
        counts = {name: int((classes == number).sum()) for number, name in enumerate(CLASSES)}
        energy = self.sums["aa"] * self.sae.direction_squares
        weights = {
            "unweighted": torch.ones_like(energy),
            "by_fires": self.counts["fires"].double(),
            "by_energy": energy,
        }
        edges = torch.linspace(0, 1, CDF_POINTS, dtype=torch.float64)
        r = values["r"][measured]
        found = {} if self.documents is None else {"certainty": self._certainty()}
        return {
            **counts,
            **found,
            "unmeasured": int((~measured).sum()),
            "measured": int(measured.sum()),
            "tokens": self.tokens,
            "kept_share": {
                name: _share(classes == 0, measured, weight) for name, weight in weights.items()
            },
            "r_quantiles": torch.quantile(r, edges).tolist() if len(r) else [],
            "medians": {name: _median(value[measured]) for name, value in values.items()},
            "births_per_token": self._per_token("fires_after"),
            "deaths_per_token": self._per_token("fires"),
            "by_density": _strata(values["density"].log10().floor(), classes),
            "by_peak": _strata(_quartile(values["peak"], measured), classes),
        }

    def _certainty(self) -> dict[str, Any]:
        """How many features are certainly damaged, certainly kept, and neither."""
        sure = self.certainty()
        damaged, kept = int(sure["damaged"].sum()), int(sure["sure"].sum())
        return {
            "damaged": damaged,
            "kept": kept,
            "undecided": len(sure["features"]) - damaged - kept,
            "kept_share_interval": sure["kept_share"],
            "documents": len(self.documents.tokens),
            "false_discovery_rate": RATE,
        }

    def _add_codes(self, before: SparseCodes, after: SparseCodes) -> None:
        pairs = paired(before, after, self.sae.spec.d_sae)
        a, b, features = pairs.before.double(), pairs.after.double(), pairs.features
        both = (a != 0) & (b != 0)
        firm = _firm(before)[pairs.tokens] <= a.abs()
        firm &= a != 0
        firm |= (b != 0) & (_firm(after)[pairs.tokens] <= b.abs())
        terms = {"a": a, "b": b, "aa": a * a, "bb": b * b, "ab": a * b, "aa_both": a * a * both}
        for name, term in terms.items():
            self.sums[name].index_add_(0, features, term)
        flags = {
            "fires": a != 0,
            "fires_after": b != 0,
            "both": both,
            "firm_both": both & firm,
            "firm_any": firm,
        }
        if self.documents is not None:
            self.documents.add(len(before), features, a, b)
        for name, flag in flags.items():
            self.counts[name].index_add_(0, features, flag.long())
        self.peak.scatter_reduce_(0, features, pairs.before.abs(), "amax")

    def _add_directions(self, codes: SparseCodes, x: Tensor, x_after: Tensor) -> None:
        """sum a (x - b_dec).d, and with x_after: each direction is fetched once for both."""
        middle = self.sae.stored.vectors["b_dec"].cpu()
        found = self.sae.projections(codes.indices, [x - middle, x_after - middle])
        for name, dots in zip(("written", "written_after"), found, strict=True):
            written = (dots.cpu() * codes.values).double().flatten()
            self.sums[name].index_add_(0, codes.indices.flatten(), written)

    def _per_token(self, name: str) -> float:
        only = self.counts[name].sum() - self.counts["both"].sum()
        return float(only) / max(1, self.tokens)


def _firm(codes: SparseCodes) -> Tensor:
    """Per token, what a firing has to reach to be firm."""
    sizes = codes.values.abs().double()
    sizes = torch.where(sizes > 0, sizes, torch.inf)
    return sizes.amin(dim=1) * (1 + MARGIN)


def _share(kept: Tensor, measured: Tensor, weight: Tensor) -> float | None:
    total = float(weight[measured].sum())
    return float(weight[kept & measured].sum()) / total if total > 0 else None


def _median(values: Tensor) -> float | None:
    finite = values[torch.isfinite(values)]
    return float(finite.median()) if len(finite) else None


def _quartile(values: Tensor, measured: Tensor) -> Tensor:
    """1 to 4 among the measured features."""
    if not measured.any():
        return torch.zeros_like(values)
    cuts = torch.quantile(values[measured], torch.tensor([0.25, 0.5, 0.75]).to(values.dtype))
    return torch.bucketize(values, cuts) + 1.0


def _strata(levels: Tensor, classes: Tensor) -> list[dict[str, Any]]:
    """Features and share kept in each level, lowest first."""
    measured, found = classes >= 0, []
    for level in levels[measured].unique().tolist():
        here = measured & (levels == level)
        kept = float((classes[here] == 0).double().mean())
        found.append({"level": int(level), "features": int(here.sum()), "kept_share": kept})
    return found
