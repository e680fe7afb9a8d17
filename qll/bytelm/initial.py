"""Weights before training: normal, and smaller where they write to the stream.

A layer that writes to the stream (`out`, `down`) starts at 1 / sqrt(2 n_layers) of the others
(Radford et al. 2019, section 2.3), so that the stream does not grow with depth.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from qll.bytelm.adapter import AdaptedLinear
from qll.bytelm.complex_numbers import ComplexLinear
from qll.model.layers import TNLinear

STD = 0.02


@torch.no_grad()
def initialise(model: nn.Module, n_layers: int) -> None:
    """Draw the weights of every linear layer and embedding of `model`.

    >>> layer = nn.Linear(300, 300, bias=False)
    >>> initialise(layer, 1); bool((layer.weight.std() / STD - 1).abs() < 0.1)
    True
    """
    for name, module in model.named_modules():
        std = STD
        if name.endswith((".out", ".down")):
            std *= (2 * n_layers) ** -0.5
        if isinstance(module, TNLinear):
            _initialise_network(module, std)
        elif isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(std=std)
        elif isinstance(module, ComplexLinear):
            # two parts share the variance of one real entry
            module.weight.normal_(std=std / math.sqrt(2))
        if isinstance(module, AdaptedLinear):
            module.adapter_up.zero_()


def _initialise_network(module: TNLinear, std: float) -> None:
    """Cores whose contraction has entries of variance std^2: a sum over all bonds of products."""
    paths = math.prod(module.spec.ranks)
    each = (std**2 / paths) ** (0.5 / len(module.cores))
    for core in module.cores:
        core.normal_(std=each)
