"""Llama 3.1's scaled rotary frequencies, and the way back from a table to its parameters.

Frequencies with wavelength above original/low are divided by `factor`, those below original/high
are kept, those between are interpolated (Meta's reference model, `apply_scaling`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from qll.errors import ConfigError

# All published models use these; `factor` is 8 for Llama 3.1 and 3.3, 32 for Llama 3.2
LOW, HIGH, ORIGINAL = 1.0, 4.0, 8192


def llama3_rope(theta: float, factor: float) -> dict[str, Any]:
    """The rotary parameters of Llama 3.1 and later, as transformers names them."""
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": LOW,
        "high_freq_factor": HIGH,
        "original_max_position_embeddings": ORIGINAL,
    }


def scaling_factors(rope: dict[str, Any], head_dim: int) -> Float64[Tensor, "frequencies"]:
    """What each rotary frequency is divided by, float64, from highest to lowest frequency.

    >>> scaling_factors(llama3_rope(500000.0, 8.0), 128)[[0, 63]].tolist()
    [1.0, 8.0]
    """
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    wavelength = 2 * math.pi * rope["rope_theta"] ** exponent
    smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def scaled_rope(
    factors: Float64[Tensor, "frequencies"], theta: float, head_dim: int, where: Path
) -> dict[str, Any]:
    """The rotary parameters whose factors are `factors`; ConfigError when no known ones are.

    >>> rope = llama3_rope(500000.0, 32.0)
    >>> scaled_rope(scaling_factors(rope, 64), 500000.0, 64, Path("a.gguf")) == rope
    True
    """
    if torch.equal(factors, torch.ones_like(factors)):
        return {"rope_type": "default", "rope_theta": theta}
    largest = float(factors.max())
    # the largest of a very short table may lie between; then only published factors can fit
    for factor in (8.0, 32.0, round(largest, 4)):
        rope = llama3_rope(theta, factor)
        if factor > 0 and torch.allclose(scaling_factors(rope, head_dim), factors, rtol=1e-4):
            return rope
    raise ConfigError(
        "rotary factors are not those of a known Llama",
        where=f"{where}: rope_freqs.weight",
        expected="the factors of Llama 3.1, 3.2 or 3.3",
        found=f"{len(factors)} factors up to {largest:.4g}",
        hint="convert the model to GGUF again with a current converter",
    )
