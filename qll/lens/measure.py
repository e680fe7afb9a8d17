"""All about one autoencoder in one model, on a text: fit, price, and whether its place is right.

The files of an autoencoder name a block by a number, and numbers have been off by one (the first
Llama 3 files called the input of block N `layer_N`). So FVU is measured at the blocks before and
after too, and anything but a clear best at the block itself is said.
"""

from __future__ import annotations

import logging
from typing import Any

from qll.lens.downstream import downstream
from qll.lens.readings import Encoded
from qll.lens.sae_metrics import SAEMetrics

logger = logging.getLogger("qll.lens")


def fit(encoded: Encoded) -> dict[str, Any]:
    """`SAEMetrics.summary` of an autoencoder on a model's readings; each window is a document."""
    spec = encoded.sae.spec
    metrics = SAEMetrics(spec.d_sae, spec.d_out)
    for number in encoded.windows:
        codes, kinds = encoded.codes[number], encoded.kinds(number)
        metrics.update(encoded.written(number), encoded.decoded(number), codes, kinds, number)
    return metrics.summary()


def check_place(encoded: Encoded, fvu: float | None = None) -> dict[str, float | None]:
    """FVU on ordinary tokens at its place and one block before and after, by hookpoint.

    fvu: that at its own place, where `fit` has measured it already.
    Warns unless its own place is the best of them and its FVU below 1 (above, the mean alone
    describes the activations better: it belongs to another model or another place).
    """
    own, found = encoded.sae.spec.writes, {}
    for step in (-1, 0, 1):
        moved = encoded.moved(step)
        if moved is not None:
            known = fvu if step == 0 else None
            found[moved.sae.spec.writes] = fit(moved)["fvu"] if known is None else known
    ranked = sorted(found, key=lambda name: float("inf") if found[name] is None else found[name])
    if ranked[0] != own:
        logger.warning(
            "autoencoder of %s: it describes %s better (FVU %.3g against %.3g), so its number may "
            "be off by one",
            own,
            ranked[0],
            found[ranked[0]],
            found[own] if found[own] is not None else float("nan"),
        )
    elif found[own] is not None and found[own] >= 1:
        logger.warning(
            "autoencoder of %s: FVU %.3g is no better than the mean activation, so it was made for "
            "another model",
            own,
            found[own],
        )
    return found


def measure(encoded: Encoded, priced: int | None = None) -> dict[str, Any]:
    """An entry of report.json's `sae.layers`: all of `fit`, and `downstream` of both variants.

    `dead` and `ce_score` stand at the top level: the number of features that never fired on
    ordinary tokens, and the score with ordinary tokens patched. priced: see `downstream`.
    """
    found, prices = fit(encoded), downstream(encoded, priced)
    return {
        **found,
        "dead": found["features"]["dead"],
        "ce_score": prices["ordinary"]["ce_score"],
        "downstream": prices,
    }
