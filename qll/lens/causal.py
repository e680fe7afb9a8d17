"""Causal survival: does taking a feature away still change the same predictions?

On a token where feature i fires, its part a_i d_i is subtracted from the activation, in the
original and in the converted model alike (a_i as the original has it), and the change of the
next-token logits is compared: c_i = Spearman correlation over the vocabulary of the two changes.
The rest of the activation stays, so the autoencoder's own error cancels. Needed because features
that survive by geometry can have lost their effect (Borobia et al. 2026, arXiv 2603.25325).

An edit at token t cannot reach earlier tokens. So a window is read once, and every feature that
fires on t is taken away in one batch of single tokens behind the cached prefix, from the
feature's block on.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from qll.lens.codes import SparseCodes
from qll.lens.downstream import spread
from qll.lens.hooks import hooked
from qll.lens.readings import Encoded, Readings
from qll.lens.rest import Rest
from qll.lens.sae import SAE
from qll.lens.survival import BLURRED, KEPT
from qll.lens.tokens import ORDINARY

# tokens of each window whose features are taken away
TOKENS_PER_WINDOW = 4
# edits run side by side
BATCH = 64


class Causal:
    """Every edit made: feature, c, and by how much the converted model's change is longer."""

    def __init__(self, d_sae: int) -> None:
        self.d_sae = d_sae
        self.features: list[Tensor] = []
        self.correlation: list[Tensor] = []
        self.ratio: list[Tensor] = []

    def add(self, features: Tensor, before: Tensor, after: Tensor) -> None:
        """Add edits [n]: the changes of the logits [n, vocab] in the two models."""
        self.features.append(features)
        self.correlation.append(spearman(before, after))
        self.ratio.append(after.norm(dim=1).double() / before.norm(dim=1).double())

    def per_feature(self) -> tuple[Float[Tensor, " d_sae"], Int[Tensor, " d_sae"]]:
        """Mean c of every feature, float64, NaN where it was never taken away; number of edits."""
        counts, total = torch.zeros(2, self.d_sae, dtype=torch.float64)
        for features, found in zip(self.features, self.correlation, strict=True):
            counts.index_add_(0, features, torch.ones_like(found))
            total.index_add_(0, features, found)
        return total / counts, counts.long()

    def summary(self) -> dict[str, Any]:
        """edits, features, quartiles of c over edits, shares kept and lost, median length; JSON."""
        if not self.features:
            return {"edits": 0, "features": 0}
        c, ratio = torch.cat(self.correlation), torch.cat(self.ratio)
        quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        return {
            "edits": len(c),
            "features": len(torch.cat(self.features).unique()),
            "quartiles": torch.quantile(c, quartiles).tolist(),
            "kept_share": float((c >= KEPT).double().mean()),
            "lost_share": float((c < BLURRED).double().mean()),
            "length_ratio": float(ratio.median()),
        }


@torch.no_grad()
def causal(
    dense: Encoded,
    converted: Readings,
    *,
    most: int | None = None,
    per_window: int = TOKENS_PER_WINDOW,
    seed: int = 0,
) -> Causal:
    """Take away, one by one, all features firing on `per_window` ordinary tokens of each window.

    most: of so many windows at most, spread over all. Tokens are drawn from the second half of a
    window, so that there is a context; windows without an ordinary token there add nothing.
    Raises UsageError as `hooked` does.
    """
    sae, writes = dense.sae, dense.sae.spec.writes
    hand, found = torch.Generator().manual_seed(seed), Causal(sae.spec.d_sae)
    numbers = spread(len(dense.windows), most)
    for number in tqdm(numbers, f"causal at {writes}", unit="w", file=sys.stderr, disable=None):
        kinds = dense.kinds(number)
        later = torch.arange(len(kinds)) >= len(kinds) // 2
        places = ((kinds == ORDINARY) & later).nonzero()[:, 0]
        chosen = places[torch.randperm(len(places), generator=hand)[:per_window]].sort().values
        codes = dense.codes[number][chosen].to(sae.device)
        changes = [
            _changes(Rest(readings, writes), sae, number, chosen, codes)
            for readings in (dense.readings, converted)
        ]
        for place, (before, after) in enumerate(zip(*changes, strict=True)):
            features = codes[place : place + 1].entries()[1].cpu()
            real = before.norm(dim=1) > 0
            if real.any():
                found.add(features[real], before[real], after[real])
    return found


def _changes(
    rest: Rest, sae: SAE, number: int, chosen: Int[Tensor, " places"], codes: SparseCodes
) -> list[Float[Tensor, "edits vocab"]]:
    """Per chosen token, the change of the next-token logits by every feature taken away."""
    cache, start, found = DynamicCache(), 0, []
    for row, place in enumerate(chosen.tolist()):
        if place > start:  # the tokens before, as they are
            rest.states(number, slice(start, place), cache=cache)
        one = codes[row : row + 1]
        _, features, values = one.entries()
        parts = values[:, None] * sae.directions(features)
        parts = parts if one.scale is None else parts * one.scale
        # the first row of the first batch takes nothing away
        rows = torch.cat([parts[:1] * 0, parts]).split(BATCH)
        logits = torch.cat([_logits(rest, number, place, cache, part) for part in rows])
        found.append((logits[1:] - logits[:1]).float().cpu())
        start = place
    return found


def _logits(
    rest: Rest, number: int, place: int, cache: DynamicCache, minus: Float[Tensor, "edits d"]
) -> Float[Tensor, "edits vocab"]:
    """Next-token logits after the cached tokens and the one at `place`, with each row of `minus`
    taken away from the activation there; the cache is left as it was."""
    own, model = DynamicCache(), rest.readings.model
    for layer, held in enumerate(cache.layers if cache.get_seq_length() else []):
        shape = (len(minus), -1, -1, -1)
        own.update(held.keys.expand(shape), held.values.expand(shape), layer)

    def take(value: Tensor) -> Tensor:
        return value - minus[:, None].to(value.device, value.dtype)

    with hooked(model, [(rest.hookpoint, take)]):
        states = rest.states(number, slice(place, place + 1), copies=len(minus), cache=own)
    return model.lm_head(states[:, -1]).float()


def spearman(one: Float[Tensor, "n width"], two: Float[Tensor, "n width"]) -> Float[Tensor, " n"]:
    """Rank correlation of matching rows, float64; equal numbers take ranks in their order.

    >>> spearman(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[0.0, 5.0, 6.0]])).tolist()
    [1.0]
    """
    width, ranks = one.shape[1], []
    for part in (one, two):
        order = part.argsort(dim=1, stable=True)
        places = torch.arange(width, device=order.device).expand_as(order)
        ranks.append(torch.empty_like(order).scatter_(1, order, places))
    apart = (ranks[0] - ranks[1]).square().sum(1).double()
    return 1 - 6 * apart / (width * (width**2 - 1))
