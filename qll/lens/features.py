"""One feature seen from outside: the words it writes, and the contexts in which it fires most.

Logit lens: the feature's direction through the final norm's gain and the output matrix, as if
nothing came between. Direct logit attribution: a_t (g * d) . W_U[next token] / rms(x_t), what the
feature adds to a logit on the direct path. Both ignore later blocks, and say nothing causal.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qll.lens.codes import SparseCodes
from qll.lens.hooks import capture
from qll.lens.sae import SAE

# tokens shown before and after the one on which a feature fires most
BEFORE, AFTER = 16, 6


@dataclass(frozen=True)
class Example:
    """A stretch of text around the token on which a feature fires most in its window."""

    activation: float
    window: int
    position: int
    tokens: tuple[str, ...]
    """The text in pieces."""
    activations: tuple[float, ...]
    """The feature's activation on each piece."""


@torch.no_grad()
def logit_weights(model: PreTrainedModel, sae: SAE, feature: int) -> Float[Tensor, " vocab"]:
    """What one unit of the feature adds to every logit directly, before the final norm's scale.

    Raises UsageError when there is no such feature.
    """
    direction = sae.directions([feature])[0]
    gain = model.base_model.norm.weight.float()
    lifted = (direction.to(gain.device) * gain).to(model.dtype)
    return model.lm_head(lifted[None])[0].float()


def logit_lens(
    model: PreTrainedModel,
    sae: SAE,
    feature: int,
    tokenizer: PreTrainedTokenizerBase,
    count: int = 10,
) -> dict[str, list[dict[str, Any]]]:
    """The `count` tokens that a feature makes more likely (`promoted`) and less (`suppressed`).

    Each entry is {token, weight}: the text, and `logit_weights` minus their mean.
    """
    weights = logit_weights(model, sae, feature)
    weights = weights - weights.mean()

    def entries(found: Any) -> list[dict[str, Any]]:
        pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        return [{"token": tokenizer.decode([token]), "weight": value} for token, value in pairs]

    count = min(count, len(weights))
    return {
        "promoted": entries(weights.topk(count)),
        "suppressed": entries(weights.topk(count, largest=False)),
    }


@torch.no_grad()
def direct_attribution(
    model: PreTrainedModel, sae: SAE, feature: int, window: Int[Tensor, " context"]
) -> Float[Tensor, " scored"]:
    """What a feature adds to the logit of each next token of a window: entry t is about token t+1.

    Raises UsageError when there is no such feature or place.
    """
    spec, last = sae.spec, f"layers.{model.config.num_hidden_layers - 1}"
    values = capture(model, window[None], list(dict.fromkeys([spec.hookpoint, last])))
    active = sae.encode(values[spec.hookpoint][0]).of(feature)
    final = values[last][0].float()
    scale = torch.rsqrt(final.square().mean(1) + model.base_model.norm.variance_epsilon)
    weights = logit_weights(model, sae, feature).cpu()
    share = active.cpu() * scale.cpu()
    return share[:-1] * weights[window[1:].cpu().long()]


def top_examples(
    codes: Iterable[tuple[int, SparseCodes]],
    windows: Int[Tensor, "windows context"],
    features: Collection[int],
    tokenizer: PreTrainedTokenizerBase,
    count: int = 8,
) -> dict[int, list[Example]]:
    """The windows in which each of `features` fires most, strongest first, at most `count`.

    codes: numbers of windows with their codes, of a `CodeCache` for instance; read once. Memory
    grows with features x count. A feature that never fires has an empty list.
    """
    wanted = torch.tensor(sorted(set(features)), dtype=torch.int64)
    best: dict[int, list[tuple[float, int, int, Tensor]]] = {int(name): [] for name in wanted}
    for number, found in codes:
        here = torch.isin(found.indices, wanted) & (found.values != 0)
        for feature in found.indices[here].unique().tolist():
            active = found.of(feature)
            position = int(active.argmax())
            start = max(0, position - BEFORE)
            shown = active[start : position + AFTER + 1].clone()
            # windows are numbered, so two entries never compare tensors
            heapq.heappush(best[feature], (float(active[position]), -number, position, shown))
            if len(best[feature]) > count:
                heapq.heappop(best[feature])
    return {
        feature: [_example(windows, entry, tokenizer) for entry in sorted(found, reverse=True)]
        for feature, found in best.items()
    }


def _example(
    windows: Tensor, entry: tuple[float, int, int, Tensor], tokenizer: PreTrainedTokenizerBase
) -> Example:
    value, minus_window, position, shown = entry
    start = max(0, position - BEFORE)
    ids = windows[-minus_window, start : start + len(shown)].tolist()
    pieces = tuple(tokenizer.decode([token]) for token in ids)
    return Example(value, -minus_window, position, pieces, tuple(shown.tolist()))
