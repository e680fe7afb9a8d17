"""Entropies and spectra of every matrix of a model, dense and converted, one matrix at a time."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from qll.lens.spectra import look
from qll.load import Source
from qll.model import TNEmbedding, TNLinear, TNMember, fold_gain, gain_of


def model_look(source: Source, converted: PreTrainedModel) -> dict[str, Any]:
    """The entropy section of report.json: `per_matrix` entries and `spectra` for the plots.

    Covers the linears of all blocks and the embedding: the channel cut, and the cuts between the
    sites of its MPO or between three balanced sites. The converted matrices are rebuilt from the
    cores that were read back from disk.
    """
    modules = dict(converted.named_modules())
    names = [
        name.removesuffix(".weight")
        for name, spec in source.specs().items()
        if len(spec.shape) == 2 and name.removesuffix(".weight") in modules
    ]
    entropies, spectra = [], []
    for name in tqdm(names, "lens", unit="matrix", file=sys.stderr, disable=None):
        folded = converted.config.qll_folded_norms
        dense = _dense_weight(source, name, folded)
        with torch.no_grad():
            after = _converted_weight(source, modules[name], name, folded)
        # the same object for a matrix left dense: nothing is computed twice
        after = dense if torch.equal(dense, after) else after
        seen = look(name, dense, after, modes=_modes(modules[name]))
        entropies += seen.entropies
        spectra.append(seen.spectrum)
    return {"per_matrix": entropies, "activations": [], "spectra": spectra}


def _modes(module: nn.Module) -> Mapping[str, Sequence[int]] | None:
    """The sites of an MPO, whose cuts are then its bonds; None: balanced sites."""
    spec = module.spec if isinstance(module, TNLinear | TNEmbedding) else None
    return spec.modes if spec is not None and spec.format == "mpo" else None


def _dense_weight(source: Source, name: str, folded: bool) -> Tensor:
    """The matrix of the checkpoint, with the norm gain where the conversion multiplied it in."""
    dense = source.read(f"{name}.weight").to(torch.float32)
    gain = gain_of(name, source.config) if folded else None
    return dense if gain is None else fold_gain(dense, source.read(gain))


def _converted_weight(source: Source, module: nn.Module, name: str, folded: bool) -> Tensor:
    """The matrix a module stands for; a pair that is free to choose its basis is brought into
    that of the dense one, or a spectrum would say nothing."""
    if isinstance(module, TNMember) and module.group.spec.format == "joint_value_output":
        value = _dense_weight(source, f"{name.rpartition('.')[0]}.v_proj", folded)
        return module.group.network().aligned(value)[module.member].to(torch.float32)
    return module.weight.detach().to("cpu", torch.float32)
