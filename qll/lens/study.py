"""Everything about one autoencoder on an original and a converted model: a page of the report.

`study` adds to `compare` (one pass over a text, with controls) what weights say alone, what taking
features away does, and the contexts in which the most damaged and the most robust features fire.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qll import store
from qll.convert.metric import Metric
from qll.lens.cache import CodeCache, write_cache
from qll.lens.causal import Causal, causal
from qll.lens.compare import entry_of, survive
from qll.lens.features import BEFORE, top_examples
from qll.lens.sae import SAE
from qll.lens.survival import Survival
from qll.lens.weight_table import MOST_FEATURES, REACH, WeightTable, plain_everywhere, weight_table

# features of each kind (most damaged, most robust, firing most) whose contexts are kept
SHOWN = 40
CONTEXTS = 3


class Study(NamedTuple):
    """What one autoencoder showed."""

    entry: dict[str, Any]
    """Its entry of report.json's `sae.layers`."""
    features: dict[str, Tensor]
    """Numbers by feature [d_sae]; `asked` [n], `rho` and `critical` [matrices, n]."""
    examples: dict[int, list[dict[str, Any]]]
    """Contexts in which a feature fires most: tokens, before and after, window and position."""


def study(
    dense: PreTrainedModel,
    converted: PreTrainedModel,
    sae: SAE,
    windows: Int[Tensor, "windows context"],
    tokenizer: PreTrainedTokenizerBase,
    scratch: Path,
    *,
    metric_at: Callable[[str], Metric] = plain_everywhere,
    reach: int = REACH,
    seed: int = 0,
) -> Study:
    """Compare, weigh, take away, and collect examples; see the module.

    scratch: a folder for codes, deleted at the end. metric_at: see `weight_table`.
    Warns as `compare` does; raises UsageError and ShapeError for an autoencoder that does not fit.
    """
    special = tokenizer.all_special_ids
    survival, others, ledger = survive(dense, converted, sae, windows, special=special, seed=seed)
    fires = survival.counts["fires"]
    order = fires.argsort(descending=True, stable=True)[:MOST_FEATURES]
    asked = order[fires[order] > 0].sort().values
    table = weight_table(dense, converted, sae, asked, metric_at, reach=reach)
    effects = causal(dense, converted, sae, windows, special=special, seed=seed)
    entry = entry_of(dense, converted, sae, windows, survival, others, ledger, special)
    entry |= {"causal": effects.summary(), "weights": table.summary()}
    wanted = remarkable(survival)
    entry["remarkable"] = wanted
    shown = sorted({feature for found in wanted.values() for feature in found})
    examples = _examples(dense, converted, sae, windows, tokenizer, scratch, shown)
    return Study(entry, _arrays(survival, effects, table), examples)


def remarkable(survival: Survival, count: int = SHOWN) -> dict[str, list[int]]:
    """Measured features: `damaged` (lowest r first), `robust` (highest, then those that fire most),
    `active` (those that fire most).
    """
    fires = survival.counts["fires"].double()
    r, measured = survival.pearson(), (survival.classes() >= 0).nonzero()[:, 0]
    busy = measured[fires[measured].argsort(descending=True, stable=True)]
    # ties in r, which identical models have everywhere, go to the busier feature
    ranked = busy[r[busy].round(decimals=6).argsort(descending=True, stable=True)]
    return {
        "damaged": ranked.flip(0)[:count].tolist(),
        "robust": ranked[:count].tolist(),
        "active": busy[:count].tolist(),
    }


def _arrays(survival: Survival, effects: Causal, table: WeightTable) -> dict[str, Tensor]:
    """All numbers by feature, as they are saved."""
    sure, width = survival.certainty(), survival.sae.spec.d_sae
    effect, edits = effects.per_feature()
    arrays = {name: value.float() for name, value in survival.per_feature().items()}
    arrays["density_after"] = (survival.counts["fires_after"] / max(1, survival.tokens)).float()
    arrays["class"] = survival.classes().to(torch.int8)
    for name in ("low", "high"):
        arrays[name] = torch.full((width,), torch.nan)
        arrays[name][sure["features"]] = sure[name].float()
    for name in ("damaged", "sure"):
        arrays[name] = torch.zeros(width, dtype=torch.bool)
        arrays[name][sure["features"]] = sure[name]
    arrays |= {"causal": effect.float(), "causal_edits": edits.int()}
    return arrays | {"asked": table.features, "rho": table.rho, "critical": table.critical}


def _examples(
    dense: PreTrainedModel,
    converted: PreTrainedModel,
    sae: SAE,
    windows: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    scratch: Path,
    features: Collection[int],
) -> dict[int, list[dict[str, Any]]]:
    """The contexts in which features fire most in the original, with both models' activations."""
    if not features:
        return {}
    store.remove(scratch)
    place, caches = sae.spec.writes, []
    for name, model in (("dense", dense), ("converted", converted)):
        caches.append(write_cache(model, {place: sae}, windows, scratch / name))
    top = top_examples(caches[0], place, features, tokenizer, CONTEXTS)
    found = {
        feature: [
            {
                "tokens": list(example.tokens),
                "before": list(example.activations),
                "window": example.window,
                "start": max(0, example.position - BEFORE),
            }
            for example in examples
        ]
        for feature, examples in top.items()
    }
    _add_converted(caches[1], place, found)
    store.remove(scratch)
    return found


def _add_converted(cache: CodeCache, place: str, found: dict[int, list[dict[str, Any]]]) -> None:
    """Add `after`, the converted model's activations on the same tokens, to every example."""
    by_window: dict[int, list[tuple[int, dict[str, Any]]]] = {}
    for feature, examples in found.items():
        for example in examples:
            by_window.setdefault(example["window"], []).append((feature, example))
    for number, codes in cache.codes(place):
        for feature, example in by_window.get(number, ()):
            start = example["start"]
            active = codes[start : start + len(example["tokens"])].of(feature)
            example["after"] = active.tolist()
