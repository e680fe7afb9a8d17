"""Entropies and spectra of every matrix of a model, dense and converted, one matrix at a time."""

from __future__ import annotations

import sys
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from qll.lens.spectra import look
from qll.load import Source
from qll.model import fold_gain, gain_of


def model_look(source: Source, converted: PreTrainedModel) -> dict[str, Any]:
    """The entropy section of report.json: `per_matrix` entries and `spectra` for the plots.

    Covers the linears of all blocks and the embedding (channel cut and three-site cuts). The
    converted matrices are rebuilt from the cores that were read back from disk.
    """
    modules = dict(converted.named_modules())
    names = [
        name.removesuffix(".weight")
        for name, spec in source.specs().items()
        if len(spec.shape) == 2 and name.removesuffix(".weight") in modules
    ]
    entropies, spectra = [], []
    for name in tqdm(names, "lens", unit="matrix", file=sys.stderr, disable=None):
        dense = source.read(f"{name}.weight").to(torch.float32)
        gain = gain_of(name, source.config) if converted.config.qll_folded_norms else None
        if gain is not None:
            dense = fold_gain(dense, source.read(gain))
        with torch.no_grad():
            after = modules[name].weight.detach().to("cpu", torch.float32)
        # the same object for a matrix left dense: nothing is computed twice
        seen = look(name, dense, dense if torch.equal(dense, after) else after)
        entropies += seen.entropies
        spectra.append(seen.spectrum)
    return {"per_matrix": entropies, "activations": [], "spectra": spectra}
