"""How many parameters a config has, and the plain twin that has as many: a fair comparison."""

from __future__ import annotations

from dataclasses import replace

import torch

from qll.bytelm.config import ModelConfig
from qll.bytelm.model import ByteModel

WIDEST = 1 << 16  # hidden channels, where the search ends


def count_parameters(config: ModelConfig) -> int:
    """Numbers that a model of `config` holds; none of them is made.

    >>> count_parameters(ModelConfig())
    3246336
    """
    with torch.device("meta"):
        return ByteModel(config).num_params()


def matched(config: ModelConfig, parameters: int) -> ModelConfig:
    """`config` with the number of hidden channels that brings it closest to `parameters`.

    >>> config = matched(ModelConfig(d_model=64, n_layers=2), 200_000)
    >>> abs(count_parameters(config) / 200_000 - 1) < 0.01
    True
    """
    step = 2 * max(1, config.weights.width_groups)

    def size(steps: int) -> int:
        return count_parameters(replace(config, d_ff=step * steps))

    low, high = 1, WIDEST // step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= parameters else (low, middle)
    best = min((low, high), key=lambda steps: abs(size(steps) - parameters))
    return replace(config, d_ff=step * best)


def plain_twin(config: ModelConfig) -> ModelConfig:
    """The plain transformer of the same width, depth and context with as many parameters.

    >>> from qll.bytelm.config import MixerConfig
    >>> config = ModelConfig(d_model=64, mixer=MixerConfig(pattern=("interference",)))
    >>> abs(count_parameters(plain_twin(config)) / count_parameters(config) - 1) < 0.01
    True
    """
    plain = ModelConfig(
        d_model=config.d_model,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        context=config.context,
        dropout=config.dropout,
        tie=config.tie,
    )
    return matched(plain, count_parameters(config))
