"""Everything about one autoencoder on an original and a converted model: a page of the report.

`study` adds to `compare` (fit, survival and controls) what weights say alone, what taking
features away does, and the contexts in which the most damaged and the most robust features fire.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qll.convert.metric import Metric
from qll.lens.causal import Causal, causal
from qll.lens.codes import SparseCodes
from qll.lens.compare import EncodedTriple, Triple, entry_of, survive
from qll.lens.features import BEFORE, Example, top_examples
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
    readings: Triple,
    sae: SAE,
    tokenizer: PreTrainedTokenizerBase,
    *,
    metric_at: Callable[[str], Metric] = plain_everywhere,
    reach: int = REACH,
    run_again: int | None = None,
    seed: int = 0,
) -> Study:
    """Compare, weigh, take away, and collect examples; see the module.

    readings: at the `places_for` the autoencoder at least. metric_at: see `weight_table`.
    run_again: windows, spread over all, on which the models run again with something replaced or
    taken away (prices, causal effects); None is all of them.
    Warns as `compare` does; raises UsageError and ShapeError for an autoencoder that does not fit.
    """
    three, dense, converted = readings.encoded(sae), readings.dense.model, readings.converted.model
    survival, others, ledger = survive(three, seed=seed)
    fires = survival.counts["fires"]
    order = fires.argsort(descending=True, stable=True)[:MOST_FEATURES]
    asked = order[fires[order] > 0].sort().values
    table = weight_table(dense, converted, sae, asked, metric_at, reach=reach)
    effects = causal(three, most=run_again, seed=seed)
    entry = entry_of(three, survival, others, ledger, run_again)
    entry |= {"causal": effects.summary(), "weights": table.summary()}
    wanted = remarkable(survival)
    entry["remarkable"] = wanted
    shown = sorted({feature for found in wanted.values() for feature in found})
    return Study(entry, _arrays(survival, effects, table), _examples(three, tokenizer, shown))


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
    three: EncodedTriple, tokenizer: PreTrainedTokenizerBase, features: Collection[int]
) -> dict[int, list[dict[str, Any]]]:
    """The contexts in which features fire most in the original, with both models' activations."""
    codes, windows = enumerate(three.dense.codes), three.dense.readings.windows
    top = top_examples(codes, windows, features, tokenizer, CONTEXTS)
    return {
        feature: [_shown(three.converted.codes, feature, example) for example in examples]
        for feature, examples in top.items()
    }


def _shown(converted: Sequence[SparseCodes], feature: int, example: Example) -> dict[str, Any]:
    """An example and, as `after`, the converted model's activations on the same tokens."""
    start = max(0, example.position - BEFORE)
    part = slice(start, start + len(example.tokens))
    return {
        "tokens": list(example.tokens),
        "before": list(example.activations),
        "after": converted[example.window][part].of(feature).tolist(),
        "window": example.window,
        "start": start,
    }
