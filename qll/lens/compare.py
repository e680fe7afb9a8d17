"""One autoencoder on the dense and on the converted model: an entry of report.json's `sae.layers`.

Both models read the same windows; what counts as an ordinary token is decided on the dense one.
Beside the survival of features stand its controls: `shuffled` pairs every token with another one
of its window (nothing may survive), `matched_noise` adds to the dense activations isotropic noise
as long as the conversion's own error on each token (what a conversion loses beyond it is
structured), `floor` is the dense model rounded to bfloat16 (what rounding alone loses).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qll.lens.ledger import Ledger
from qll.lens.measure import check_place, measure
from qll.lens.readings import Encoded, Readings, empty, places_for, read
from qll.lens.sae import SAE
from qll.lens.survival import Survival
from qll.lens.tokens import ORDINARY

CONTROLS = ("shuffled", "matched_noise", "floor")

logger = logging.getLogger("qll.lens")


class Triple(NamedTuple):
    """Readings of one text: the original, the converted, and the original rounded to bfloat16."""

    dense: Readings
    converted: Readings
    floor: Readings | None = None
    """Without it there is no control `floor`."""

    def encoded(self, sae: SAE) -> EncodedTriple:
        """What `sae` makes of each."""
        return EncodedTriple(*(None if part is None else Encoded(part, sae) for part in self))


class EncodedTriple(NamedTuple):
    """What one autoencoder makes of a `Triple`."""

    dense: Encoded
    converted: Encoded
    floor: Encoded | None = None


def read_three(
    dense: PreTrainedModel,
    converted: PreTrainedModel,
    windows: Int[Tensor, "windows context"],
    hookpoints: Collection[str],
    *,
    special: Collection[int] = (),
    folder: Path | None = None,
) -> Triple:
    """`read` three times; a rounded copy of the dense model is in memory meanwhile."""

    def one(name: str, model: PreTrainedModel) -> Readings:
        inner = None if folder is None else folder / name
        return read(model, windows, list(hookpoints), special=special, folder=inner)

    floor = one("floor", rounded(dense))
    return Triple(one("dense", dense), one("converted", converted), floor)


def rounded(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with weights and what modules hand on rounded to bfloat16, and sums in float32.

    That is what kernels for bfloat16 compute (but for the sum in the middle of a block, which stays
    exact here), at the speed of float32 on machines that have none.
    """
    found = copy.deepcopy(model)
    with torch.no_grad():
        for weight in found.parameters():
            weight.copy_(_rounded(weight))
    for module in found.base_model.modules():
        if not any(module.children()) or isinstance(module, GradientCheckpointingLayer):
            module.register_forward_pre_hook(lambda _, values: _rounded(values))
            module.register_forward_hook(lambda _, values, result: _rounded(result))
    return found


def _rounded(value: Any) -> Any:
    """Tensors of real numbers rounded to bfloat16; tuples one by one; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(_rounded(part) for part in value)
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(torch.bfloat16).to(value.dtype)
    return value


def compare(
    dense: PreTrainedModel,
    converted: PreTrainedModel,
    sae: SAE,
    windows: Int[Tensor, "windows context"],
    *,
    special: Collection[int] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """hookpoint, place_fvu, and dense, converted, survival, controls, ledger of `sae`; JSON.

    Reads both models, and a `rounded` copy of the dense one. Warns when the autoencoder does not
    sit where it says, and when the text is too short for most features.
    """
    places = places_for(sae.spec, dense.config.num_hidden_layers)
    three = read_three(dense, converted, windows, places, special=special).encoded(sae)
    return entry_of(three, *survive(three, seed=seed))


def entry_of(
    three: EncodedTriple,
    survival: Survival,
    others: Mapping[str, Survival],
    ledger: Ledger,
    priced: int | None = None,
) -> dict[str, Any]:
    """What `compare` returns, from the sums of `survive`; warns as it does."""
    summary, spec = survival.summary(), three.dense.sae.spec
    if summary["measured"] < summary["unmeasured"]:
        logger.warning(
            "autoencoder of %s: %d of %d features fire too rarely in %d tokens to be measured",
            spec.writes,
            summary["unmeasured"],
            spec.d_sae,
            summary["tokens"],
        )
    dense = measure(three.dense, priced)
    return {
        "hookpoint": spec.writes,
        "place_fvu": check_place(three.dense, dense["fvu"]),
        "dense": dense,
        "converted": measure(three.converted, priced),
        "survival": summary,
        "controls": {name: control.summary() for name, control in others.items()},
        "ledger": ledger.shares(),
    }


def survive(
    three: EncodedTriple, *, controls: Collection[str] = CONTROLS, seed: int = 0
) -> tuple[Survival, dict[str, Survival], Ledger]:
    """Sums of the comparison, of each control, and the error ledger."""
    dense, converted, floor = three
    sae, hand = dense.sae, torch.Generator().manual_seed(seed)
    found, ledger = Survival(sae, documents=True), Ledger(sae)
    noise = shaken(dense, converted, hand) if "matched_noise" in controls else None
    wanted = [name for name in controls if name != "floor" or floor is not None]
    others = {name: Survival(sae) for name in wanted}
    for number in dense.windows:
        before, after = dense.codes[number], converted.codes[number]
        old, new = dense.written(number), converted.written(number)
        chosen = dense.kinds(number) == ORDINARY
        found.update(before, after, old, new, chosen)
        ledger.update(before.to(sae.device), after.to(sae.device), old, new, chosen)
        if "shuffled" in others:
            ordinary = chosen.nonzero()[:, 0]
            mixed = ordinary[torch.randperm(len(ordinary), generator=hand)]
            pair = before[ordinary], after[mixed]
            others["shuffled"].update(*pair, old.cpu()[ordinary], new.cpu()[mixed])
        if "matched_noise" in others:
            after = noise.codes[number]
            others["matched_noise"].update(before, after, old, noise.written(number), chosen)
        if "floor" in others:
            others["floor"].update(before, floor.codes[number], old, floor.written(number), chosen)
    return found, others, ledger


def shaken(dense: Encoded, converted: Encoded, hand: torch.Generator) -> Encoded:
    """The dense readings plus noise in no preferred direction, as long on each token as the error.

    An autoencoder reads and writes one place: it gets one noise. A transcoder gets two.
    """
    old, new = dense.readings, converted.readings
    names = list(dict.fromkeys([dense.sae.spec.hookpoint, dense.sae.spec.writes]))
    folder = None if old.folder is None else old.folder / "noise"
    values = empty({name: tuple(old.values[name].shape) for name in names}, folder)
    for name in names:
        for number in dense.windows:
            x, y = old.values[name][number], new.values[name][number]
            noise = torch.randn(x.shape, generator=hand)
            length = (y - x).norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
            values[name][number] = x + noise * length
    return Encoded(replace(old, values=values), dense.sae)
