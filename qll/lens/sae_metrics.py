"""How well an autoencoder describes activations: streaming sums, one update per window.

    FVU          sum |x - y|^2 / sum |x - mean x|^2, one mean over everything (pooled)
    L0           features that fire per token      cosine  mean of cos(x, y)
    l2_ratio     mean |y| / |x|                    density  share of tokens on which a feature fires

Ordinary tokens, special tokens and attention sinks are summed apart (`qll.lens.tokens`). Sums are
float64 and kept per document, so that intervals come from resampling documents.

>>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
>>> codes = SparseCodes(torch.ones(3, 1), torch.tensor([[0], [1], [0]]))
>>> metrics = SAEMetrics(d_sae=4, d_out=2)
>>> metrics.update(x, x, codes, torch.zeros(3, dtype=torch.long), document=0)
>>> found = metrics.summary()
>>> found["fvu"], found["l0"], found["features"]["dead"]
(0.0, 1.0, 2)
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from qll.errors import TextError
from qll.lens.codes import SparseCodes
from qll.lens.intervals import bootstrap
from qll.lens.tokens import KINDS, ORDINARY

DENSE_FROM = 0.1  # share of tokens from which on a feature is called dense
MEASURED_FROM = 30  # firings below which nothing is said about a feature alone
BINS = 28  # of the density histogram: quarters of a decade from 1e-7 to 1
LOWEST_DENSITY = -7.0
# the sums of one document and kind, in this order, before the sum of the vectors themselves
SCALARS = ("tokens", "sse", "squares", "l0", "l1", "cosine", "ratio")


class SAEMetrics:
    """Running sums of one autoencoder at one place."""

    def __init__(self, d_sae: int, d_out: int) -> None:
        self.d_out = d_out
        self.fires = torch.zeros(len(KINDS), d_sae, dtype=torch.int64)
        self.sums: list[dict[int, Tensor]] = [{} for _ in KINDS]

    def update(
        self,
        x: Float[Tensor, "tokens d_out"],
        y: Float[Tensor, "tokens d_out"],
        codes: SparseCodes,
        kinds: Int[Tensor, " tokens"],
        document: int,
    ) -> None:
        """Add tokens of one document: targets, reconstructions, codes, and what kind each is."""
        exact, made = x.detach().cpu().double(), y.detach().cpu().double()
        codes = codes.to("cpu")
        per_token = torch.stack(
            [
                torch.ones(len(exact), dtype=torch.float64),
                (exact - made).square().sum(1),
                exact.square().sum(1),
                codes.l0().double(),
                codes.values.double().abs().sum(1),
                functional.cosine_similarity(exact, made, dim=1),
                made.norm(dim=1) / exact.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny),
            ],
            dim=1,
        )
        columns = torch.cat([per_token, exact], dim=1)
        tokens, features, _ = codes.entries()
        self.fires.index_put_((kinds[tokens], features), torch.ones_like(features), accumulate=True)
        for kind in range(len(KINDS)):
            if (chosen := kinds == kind).any():
                total = columns[chosen].sum(0)
                self.sums[kind][document] = self.sums[kind].get(document, 0) + total

    def summary(self) -> dict[str, Any]:
        """All metrics as plain JSON values; those of ordinary tokens at the top level.

        Raises TextError when no ordinary token was seen.
        """
        if not self.sums[ORDINARY]:
            raise TextError(
                "no ordinary token to measure an autoencoder on",
                hint="give a longer text, or fewer special tokens",
            )
        by_kind = {
            name: self._means(number) for number, name in enumerate(KINDS) if self.sums[number]
        }
        table = torch.stack(list(self.sums[ORDINARY].values()))
        return {
            **by_kind["ordinary"],
            "fvu_interval": bootstrap(lambda weights: _fvu(weights @ table), len(table)),
            "l0_interval": bootstrap(lambda weights: _mean(weights @ table, "l0"), len(table)),
            "documents": len(table),
            "kinds": by_kind,
            "features": self._features(),
        }

    def _means(self, kind: int) -> dict[str, float | int | None]:
        total = torch.stack(list(self.sums[kind].values())).sum(0)[None]
        means = {name: float(_mean(total, name)) for name in ("l0", "l1", "cosine")}
        fvu = float(_fvu(total))
        return {
            "tokens": int(total[0, 0]),
            # of one token there is no variance
            "fvu": fvu if fvu < float("inf") else None,
            **means,
            "l2_ratio": float(_mean(total, "ratio")),
        }

    def _features(self) -> dict[str, Any]:
        """Counts of features by how often they fire on ordinary tokens."""
        fires = self.fires[ORDINARY]
        tokens = sum(int(total[0]) for total in self.sums[ORDINARY].values())
        alive = fires[fires > 0]
        density = (alive.double() / tokens).log10().clamp(min=LOWEST_DENSITY)
        counts = torch.histc(density, bins=BINS, min=LOWEST_DENSITY, max=0.0)
        return {
            "total": len(fires),
            "dead": int((fires == 0).sum()),
            "dead_share": float((fires == 0).double().mean()),
            "dense": int((fires > DENSE_FROM * tokens).sum()),
            "measured": int((fires >= MEASURED_FROM).sum()),
            "unmeasured": int((fires < MEASURED_FROM).sum()),
            "density": {"log10_from": LOWEST_DENSITY, "log10_to": 0.0, "counts": counts.tolist()},
        }


def _fvu(total: Tensor) -> Tensor:
    """From sums [draws, columns]: squared error over squared distance from the common mean."""
    first = len(SCALARS)
    spread = total[:, 2] - total[:, first:].square().sum(1) / total[:, 0]
    # what cancels to rounding is no variance
    spread = torch.where(spread > 1e-12 * total[:, 2], spread, 0.0)
    return total[:, 1] / spread


def _mean(total: Tensor, name: str) -> Tensor:
    return total[:, SCALARS.index(name)] / total[:, 0]
