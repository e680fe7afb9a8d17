"""Weights of the texts of a mixture that follow what is still to be learned of each.

    weight_i <- weight_i exp(rate * excess_i), normalised, then mixed with a little of equal weights

where excess_i is the mean over bytes of max(0, nats of the model - nats of a reference model) on
windows of text i: exponentiated gradient ascent on the worst case over texts (Xie et al. 2023,
"DoReMi", algorithm 1, whose constants these are). The reference is a model that was trained on the
same texts with fixed weights: a text that it finds hard too is not drawn more for being hard.
Unlike there the weights are those that windows are drawn by, not those of their losses, and every
so many steps a few windows that come next are looked at, not those of every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch.nn import functional

from qll.bytelm.config import VOCAB, ModelConfig
from qll.bytelm.dataset import BatchLoader
from qll.bytelm.model import ByteModel
from qll.errors import IntegrityError, UsageError

RATE, SMOOTHING = 1.0, 1e-3
EVERY = 20  # steps: a tenth of the time of three texts, at batches of 16
LOOKED_AT = 16  # windows of each text


def moved(
    weights: Float64[np.ndarray, " texts"], excess: Float64[np.ndarray, " texts"]
) -> Float64[np.ndarray, " texts"]:
    """The next weights.

    >>> moved(np.array([0.5, 0.5]), np.array([np.log(3), 0.0])).round(3).tolist()
    [0.75, 0.25]
    """
    grown = weights * np.exp(RATE * (excess - excess.max()))
    return (1 - SMOOTHING) * grown / grown.sum() + SMOOTHING / len(weights)


def require_reference(reference: ModelConfig, texts: int, languages: tuple[str, ...] = ()) -> None:
    """Raise UsageError for a single text, and for a reference that knows other languages.

    >>> require_reference(ModelConfig(), texts=1)
    Traceback (most recent call last):
    ...
    qll.errors.UsageError: --reference: weighs texts against each other (found a single text)
    """
    if texts < 2:
        raise UsageError(
            "weighs texts against each other", where="--reference", found="a single text"
        )
    known = reference.stream.languages
    if known and known != languages:
        raise UsageError(
            "knows other languages", where="--reference", expected=languages, found=known
        )


class Mixture:
    """The weights of a loader's texts, moved while a model learns."""

    def __init__(self, loader: BatchLoader, reference: ByteModel) -> None:
        self.loader, self.reference = loader, reference.eval()
        self.knows_languages = bool(reference.config.stream.languages)
        self.sum, self.moves = np.zeros(len(loader.datasets)), 0

    def after_step(self, model: ByteModel, number: int) -> None:
        """Move the weights, when step `number` is one after which they are."""
        if number % EVERY == 0:
            self.loader.weigh(moved(self.loader.shares, self.excess(model)).tolist())
            self.sum += self.loader.shares
            self.moves += 1

    @torch.no_grad()
    def excess(self, model: ByteModel) -> Float64[np.ndarray, " texts"]:
        """Nats per byte that the model needs more than the reference, on windows that come next."""
        training = model.training
        model.eval()
        found = []
        for dataset, drawn in zip(self.loader.datasets, self.loader.drawn, strict=True):
            rows = dataset.gather(np.arange(drawn, drawn + LOOKED_AT)).astype(np.int64)
            ids = torch.from_numpy(rows).to(self.loader.device)
            known = ids if self.knows_languages else ids % VOCAB
            more = _nats(model, ids) - _nats(self.reference, known)
            found.append(float(more.clamp(min=0).mean()))
        model.train(training)
        return np.array(found)

    def weights(self) -> dict[str, list[float]]:
        """The weights now, and on average: the ones to train another model with.

        The order is that of the texts.
        """
        average = self.sum / self.moves if self.moves else self.loader.shares
        return {"last": self.loader.shares.tolist(), "average": average.tolist()}

    def state(self) -> dict[str, Any]:
        """What the loader does not keep, as JSON."""
        return {"sum": self.sum.tolist(), "moves": self.moves}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; raises IntegrityError when it is of other texts."""
        if len(state.get("sum", ())) != len(self.sum):
            raise IntegrityError("weights of other texts", where="the checkpoint")
        self.sum, self.moves = np.array(state["sum"]), state["moves"]


def _nats(model: ByteModel, ids: torch.Tensor) -> torch.Tensor:
    """Of every byte after the first of each row, float64."""
    logits = model(ids[:, :-1]).double()
    return functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:] % VOCAB, reduction="none")
