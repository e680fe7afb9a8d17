"""Steering from the command line: autoencoders opened by name and attached to a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from qll.lens.attach import attach
from qll.lens.sae import load_sae
from qll.load.sae_names import hookpoint_of


@contextlib.contextmanager
def steered(
    model: PreTrainedModel, folder: Path, edits: Sequence[tuple[str, int, float]]
) -> Iterator[None]:
    """Add an amount to a feature's activation on every token, for each (place, feature, amount).

    folder: where the autoencoders of those places lie. Several edits of one feature add up. Raises
    what `load_sae` and `attach` raise.
    """
    amounts: dict[str, dict[int, float]] = {}
    for place, feature, amount in edits:
        here = amounts.setdefault(hookpoint_of(place), {})
        here[feature] = here.get(feature, 0.0) + amount
    saes = {place: load_sae(folder, place, device=model.device) for place in amounts}
    with attach(model, saes, steer=amounts):
        yield
