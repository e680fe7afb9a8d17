"""All about one autoencoder in one model, on a text: fit, price, and whether its place is right.

The files of an autoencoder name a block by a number, and numbers have been off by one (the first
Llama 3 files called the input of block N `layer_N`). So FVU is measured at the blocks before and
after too, and anything but a clear best at the block itself is said.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from qll.lens.downstream import downstream
from qll.lens.hooks import capture
from qll.lens.sae import SAE
from qll.lens.sae_metrics import SAEMetrics
from qll.lens.tokens import token_kinds
from qll.load.sae_names import neighbour

logger = logging.getLogger("qll.lens")


@torch.no_grad()
def fit_at(
    model: PreTrainedModel,
    sae: SAE,
    windows: Int[Tensor, "windows context"],
    *,
    special: Collection[int] = (),
    step: int = 0,
) -> dict[str, Any]:
    """`SAEMetrics.summary` of `sae` in `model`, `step` blocks after its own place.

    Each window is a document. Raises UsageError when the model has no such place, ShapeError when
    its width is another.
    """
    spec = sae.spec
    reads, writes = (neighbour(place, step) for place in (spec.hookpoint, spec.writes))
    metrics = SAEMetrics(spec.d_sae, spec.d_out)
    for number, window in enumerate(
        tqdm(windows, f"FVU at {writes}", unit="window", file=sys.stderr, disable=None)
    ):
        places = list(dict.fromkeys([reads, writes]))
        seen = {name: value[0] for name, value in capture(model, window[None], places).items()}
        codes = sae.encode(seen[reads])
        kinds = token_kinds(window, seen[writes], special)
        metrics.update(seen[writes], sae.decode(codes, seen[reads]), codes, kinds, number)
    return metrics.summary()


def check_place(
    model: PreTrainedModel,
    sae: SAE,
    windows: Int[Tensor, "windows context"],
    *,
    special: Collection[int] = (),
) -> dict[str, float | None]:
    """FVU of `sae` on ordinary tokens at its place and one block before and after, by hookpoint.

    Warns unless its own place is the best of them and its FVU below 1 (above, the mean alone
    describes the activations better: it belongs to another model or another place).
    """
    own, found = sae.spec.writes, {}
    for step in (-1, 0, 1):
        places = [neighbour(place, step) for place in (sae.spec.hookpoint, own)]
        if None in places or not _has(model, places[1]):
            continue
        found[places[1]] = fit_at(model, sae, windows, special=special, step=step)["fvu"]
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


def measure(
    model: PreTrainedModel,
    sae: SAE,
    windows: Int[Tensor, "windows context"],
    *,
    special: Collection[int] = (),
) -> dict[str, Any]:
    """An entry of report.json's `sae.layers`: all of `fit_at`, and `downstream` of both variants.

    `dead` and `ce_score` stand at the top level: the number of features that never fired on
    ordinary tokens, and the score with ordinary tokens patched.
    """
    fit = fit_at(model, sae, windows, special=special)
    prices = downstream(model, sae, windows, special=special)
    return {
        **fit,
        "dead": fit["features"]["dead"],
        "ce_score": prices["ordinary"]["ce_score"],
        "downstream": prices,
    }


def _has(model: PreTrainedModel, hookpoint: str) -> bool:
    block = neighbour(hookpoint, 0)
    number = block.split(".")[1] if block and block.startswith("layers.") else "-1"
    return int(number) < model.config.num_hidden_layers
