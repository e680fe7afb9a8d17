"""Causal survival: does taking a feature away still change the same predictions?

On a token where feature i fires, its part a_i d_i is subtracted from the activation, in the
original and in the converted model alike (a_i as the original has it), and the change of the
next-token logits is compared: c_i = Spearman correlation over the vocabulary of the two changes.
The rest of the activation stays, so the autoencoder's own error cancels. Beside c stand the c of
two different features of one token, and of the original rounded to bfloat16. Needed because
features that survive by geometry can have lost their effect (Borobia et al. 2026, arXiv
2603.25325).

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
from qll.lens.compare import EncodedTriple
from qll.lens.downstream import spread
from qll.lens.hooks import hooked
from qll.lens.rest import Rest
from qll.lens.sae import SAE
from qll.lens.survival import BLURRED, KEPT
from qll.lens.tokens import ORDINARY

# tokens of each window whose features are taken away
TOKENS_PER_WINDOW = 4
# edits run side by side
BATCH = 64


class Causal:
    """Every edit made: feature, c, its controls, and the ratio of lengths of the two changes."""

    def __init__(self, d_sae: int) -> None:
        self.d_sae = d_sae
        self.features: list[Tensor] = []
        self.ratio: list[Tensor] = []
        self.correlation: dict[str, list[Tensor]] = {}

    def add(
        self,
        features: Int[Tensor, " n"],
        before: Float[Tensor, "n vocab"],
        after: Float[Tensor, "n vocab"],
        floor: Float[Tensor, "n vocab"] | None = None,
    ) -> None:
        """Add the edits of one token: the changes of the logits in both models, and rounded."""
        one, two = ranks(before), ranks(after)
        self.features.append(features)
        self.ratio.append(after.norm(dim=1).double() / before.norm(dim=1).double())
        self._note("converted", spearman(one, two))
        if len(features) > 1:
            self._note("other_feature", spearman(one, two.roll(1, dims=0)))
        if floor is not None:
            self._note("floor", spearman(one, ranks(floor)))

    def per_feature(self) -> tuple[Float[Tensor, " d_sae"], Int[Tensor, " d_sae"]]:
        """Mean c of every feature, float64, NaN where it was never taken away; number of edits."""
        counts, total = torch.zeros(2, self.d_sae, dtype=torch.float64)
        for features, found in zip(self.features, self._of("converted"), strict=True):
            counts.index_add_(0, features, torch.ones_like(found))
            total.index_add_(0, features, found)
        return total / counts, counts.long()

    def summary(self) -> dict[str, Any]:
        """edits, features, quartiles of c over edits, shares kept and lost, median length; JSON.

        controls: the same of `other_feature` (c between the effects of two features of one token)
        and `floor` (the original rounded to bfloat16 in place of the converted model).
        """
        if not self.features:
            return {"edits": 0, "features": 0}
        own = _shares(self._of("converted"))
        others = [name for name in self.correlation if name != "converted"]
        return {
            "edits": len(torch.cat(self.features)),
            "features": len(torch.cat(self.features).unique()),
            **own,
            "length_ratio": float(torch.cat(self.ratio).median()),
            "controls": {name: _shares(self._of(name)) for name in others},
        }

    def _note(self, name: str, found: Tensor) -> None:
        self.correlation.setdefault(name, []).append(found)

    def _of(self, name: str) -> list[Tensor]:
        return self.correlation.get(name, [])


@torch.no_grad()
def causal(
    three: EncodedTriple,
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
    dense, sae, writes = three.dense, three.dense.sae, three.dense.sae.spec.writes
    rests = [Rest(part.readings, writes) for part in three if part is not None]
    hand, found = torch.Generator().manual_seed(seed), Causal(sae.spec.d_sae)
    numbers = spread(len(dense.windows), most)
    for number in tqdm(numbers, f"causal at {writes}", unit="w", file=sys.stderr, disable=None):
        kinds = dense.kinds(number)
        later = torch.arange(len(kinds)) >= len(kinds) // 2
        places = ((kinds == ORDINARY) & later).nonzero()[:, 0]
        chosen = places[torch.randperm(len(places), generator=hand)[:per_window]].sort().values
        codes = dense.codes[number][chosen].to(sae.device)
        changes = [_changes(rest, sae, number, chosen, codes) for rest in rests]
        for place, rows in enumerate(zip(*changes, strict=True)):
            features = codes[place : place + 1].entries()[1].cpu()
            real = rows[0].norm(dim=1) > 0
            if real.any():
                found.add(features[real], *(row[real] for row in rows))
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


def ranks(values: Float[Tensor, "n width"]) -> Int[Tensor, "n width"]:
    """Ranks within each row, from 0; equal numbers take them in their order."""
    order = values.argsort(dim=1, stable=True)
    places = torch.arange(values.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def spearman(one: Int[Tensor, "n width"], two: Int[Tensor, "n width"]) -> Float[Tensor, " n"]:
    """Rank correlation of matching rows of `ranks`, float64.

    >>> spearman(ranks(torch.tensor([[1.0, 2.0, 9.0]])), ranks(torch.tensor([[0.0, 5.0, 6.0]])))
    tensor([1.], dtype=torch.float64)
    """
    width = one.shape[1]
    apart = (one - two).square().sum(1).double()
    return 1 - 6 * apart / (width * (width**2 - 1))


def _shares(found: list[Tensor]) -> dict[str, Any]:
    """Quartiles of c, and the shares kept and lost."""
    c = torch.cat(found)
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    return {
        "quartiles": torch.quantile(c, quartiles).tolist(),
        "kept_share": float((c >= KEPT).double().mean()),
        "lost_share": float((c < BLURRED).double().mean()),
    }
