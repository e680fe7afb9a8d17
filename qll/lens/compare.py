"""One autoencoder on the dense and on the converted model: an entry of report.json's `sae.layers`.

Both models read the same windows; what counts as an ordinary token is decided on the dense one.
Beside the survival of features stand its controls: `shuffled` pairs every token with another one
of its window (nothing may survive), `matched_noise` adds to the dense activations isotropic noise
as long as the conversion's own error on each token (what a conversion loses beyond it is
structured), `floor` is the dense model in bfloat16 (what rounding alone loses).
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from qll.lens.hooks import capture
from qll.lens.ledger import Ledger
from qll.lens.measure import check_place, measure
from qll.lens.sae import SAE
from qll.lens.survival import Survival
from qll.lens.tokens import ORDINARY, token_kinds

CONTROLS = ("shuffled", "matched_noise", "floor")

logger = logging.getLogger("qll.lens")


def compare(
    dense: PreTrainedModel,
    converted: PreTrainedModel,
    sae: SAE,
    windows: Int[Tensor, "windows context"],
    *,
    special: Collection[int] = (),
    controls: Collection[str] = CONTROLS,
    seed: int = 0,
) -> dict[str, Any]:
    """hookpoint, place_fvu, and dense, converted, survival, controls, ledger of `sae`; JSON.

    `floor` keeps a bfloat16 copy of the dense model in memory meanwhile. Warns when the
    autoencoder does not sit where it says, and when the text is too short for most features.
    """
    survival, others, ledger = survive(
        dense, converted, sae, windows, special=special, controls=controls, seed=seed
    )
    return entry_of(dense, converted, sae, windows, survival, others, ledger, special)


def entry_of(
    dense: PreTrainedModel,
    converted: PreTrainedModel,
    sae: SAE,
    windows: Int[Tensor, "windows context"],
    survival: Survival,
    others: Mapping[str, Survival],
    ledger: Ledger,
    special: Collection[int] = (),
) -> dict[str, Any]:
    """What `compare` returns, from the sums of `survive`; warns as it does."""
    summary = survival.summary()
    if summary["measured"] < summary["unmeasured"]:
        logger.warning(
            "autoencoder of %s: %d of %d features fire too rarely in %d tokens to be measured",
            sae.spec.writes,
            summary["unmeasured"],
            sae.spec.d_sae,
            summary["tokens"],
        )
    return {
        "hookpoint": sae.spec.writes,
        "place_fvu": check_place(dense, sae, windows, special=special),
        "dense": measure(dense, sae, windows, special=special),
        "converted": measure(converted, sae, windows, special=special),
        "survival": summary,
        "controls": {name: control.summary() for name, control in others.items()},
        "ledger": ledger.shares(),
    }


@torch.no_grad()
def survive(
    dense: PreTrainedModel,
    converted: PreTrainedModel,
    sae: SAE,
    windows: Int[Tensor, "windows context"],
    *,
    special: Collection[int] = (),
    controls: Collection[str] = CONTROLS,
    seed: int = 0,
) -> tuple[Survival, dict[str, Survival], Ledger]:
    """Sums of the comparison, of each control, and the error ledger; one pass over the windows."""
    hand = torch.Generator().manual_seed(seed)
    found, ledger = Survival(sae, documents=True), Ledger(sae)
    others = {name: Survival(sae) for name in controls}
    rounded = copy.deepcopy(dense).to(torch.bfloat16) if "floor" in others else None
    reads, writes = sae.spec.hookpoint, sae.spec.writes
    for window in tqdm(windows, f"survival at {writes}", "w", file=sys.stderr, disable=None):
        old, new = (_values(model, window, (reads, writes)) for model in (dense, converted))
        before, after = sae.encode(old[0]), sae.encode(new[0])
        chosen = token_kinds(window, old[1], special) == ORDINARY
        found.update(before, after, old[1], new[1], chosen)
        ledger.update(before, after, old[1], new[1], chosen)
        if "shuffled" in others:
            ordinary = chosen.nonzero()[:, 0]
            mixed = ordinary[torch.randperm(len(ordinary), generator=hand)]
            others["shuffled"].update(
                before.to("cpu")[ordinary],
                after.to("cpu")[mixed],
                old[1].cpu()[ordinary],
                new[1].cpu()[mixed],
            )
        if "matched_noise" in others:
            shaken = [_shaken(x, y, hand) for x, y in zip(old, new, strict=True)]
            # an autoencoder reads and writes one place: it gets one noise
            last = shaken[1] if sae.spec.transcodes else shaken[0]
            others["matched_noise"].update(before, sae.encode(shaken[0]), old[1], last, chosen)
        if rounded is not None:
            low = _values(rounded, window, (reads, writes))
            others["floor"].update(before, sae.encode(low[0]), old[1], low[1], chosen)
    return found, others, ledger


def _values(model: PreTrainedModel, window: Tensor, places: Iterable[str]) -> list[Tensor]:
    """Activations of one window at each place, float32 [context, width]."""
    places = list(places)
    seen = capture(model, window[None], list(dict.fromkeys(places)))
    return [seen[place][0].float() for place in places]


def _shaken(x: Tensor, y: Tensor, hand: torch.Generator) -> Tensor:
    """x plus noise in no preferred direction, as long on each token as y - x."""
    noise = torch.randn(x.shape, generator=hand).to(x.device)
    length = (y - x).norm(dim=1, keepdim=True)
    return x + noise * (length / noise.norm(dim=1, keepdim=True))
