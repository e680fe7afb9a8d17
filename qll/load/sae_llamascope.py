"""Llama Scope (OpenMOSS): hyperparams.json and checkpoints/final.safetensors.

Trained on inputs of norm sqrt(d): s_in = sqrt(d) / norm_in, s_out likewise. The threshold is in
the units after both of these steps, so their order matters:

    1. b_E /= s_in, b_D /= s_out, W_D *= s_in / s_out        back to the units of the model
    2. n = norm of each column of W_D: W_D /= n, W_E *= n, b_E *= n
    h = x W_E^T + b_E      f = h where h > threshold         y = f W_D^T + b_D

Source: github.com/OpenMOSS/Language-Model-SAEs and He et al. 2024, arXiv 2410.20526.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qll.errors import ConfigError
from qll.load.files import inside, read_object, shown
from qll.load.sae_file import (
    LatentMatrix,
    SAESpec,
    StoredSAE,
    flag,
    pick_tensors,
    read_vector,
    whole,
)
from qll.load.sae_names import hookpoint_of
from qll.load.sae_saelens import decoder_norms
from qll.load.safetensors import read_safetensors

CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
NAMES = {
    "encoder.weight": "W_enc",
    "encoder.bias": "b_enc",
    "decoder.weight": "W_dec",
    "decoder.bias": "b_dec",
}
# what the two steps above are true for
ASSUMED = {
    "act_fn": "jumprelu",
    "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": True,
}


def read_llamascope(folder: Path) -> StoredSAE:
    """The autoencoder in `folder`; the encoder stays in the file.

    Raises MissingFileError, ConfigError, ShapeError, MissingTensorError, TruncatedFileError,
    NonFiniteError.
    """
    where = folder / CONFIG
    config = read_object(inside(folder, CONFIG))
    for key, value in ASSUMED.items():
        if config.get(key) != value:
            raise ConfigError(
                "this kind of Llama Scope autoencoder is not implemented",
                where=f"{where}: {key}",
                expected=value,
                found=shown(config.get(key)),
            )
    spec = _spec(config, where)
    path = inside(folder, WEIGHTS)
    tensors = pick_tensors(read_safetensors(path), NAMES, path)
    encoder = LatentMatrix(tensors.pop("W_enc"))
    # stored by output: gathering features from the file would touch all of it
    decoder = LatentMatrix(tensors.pop("W_dec"), transposed=True).load()
    vectors = {name: read_vector(tensor) for name, tensor in tensors.items()}
    stored = StoredSAE(
        spec, encoder, decoder, vectors | {"threshold": torch.zeros(spec.d_sae)}, str(folder)
    )
    s_in, s_out = _scales(config, spec, where)
    raw = decoder_norms(decoder)
    norms = raw * (s_in / s_out)
    vectors = {
        "b_enc": vectors["b_enc"] / s_in * norms,
        "b_dec": vectors["b_dec"] / s_out,
        "scale_enc": norms,
        "scale_dec": 1 / raw,
        "threshold": torch.full((spec.d_sae,), _number(config, "jump_relu_threshold", where)),
    }
    return StoredSAE(spec, stored.encoder, stored.decoder, vectors, str(folder))


def _spec(config: Mapping[str, Any], where: Path) -> SAESpec:
    width = whole(config, "d_model", where)
    places = [config.get(key) for key in ("hook_point_in", "hook_point_out")]
    if not all(isinstance(place, str) for place in places):
        raise ConfigError(
            "the autoencoder's config lacks a key",
            where=where,
            expected="hook_point_in, hook_point_out",
        )
    reads, writes = map(hookpoint_of, places)
    return SAESpec(
        hookpoint=reads,
        d_in=width,
        d_sae=whole(config, "d_sae", where),
        d_out=width,
        activation="jumprelu",
        subtract_b_dec=flag(config, "apply_decoder_bias_to_pre_encoder", where),
        writes=writes,
        facts={"format": "llama_scope"},
    )


def _scales(config: Mapping[str, Any], spec: SAESpec, where: Path) -> tuple[float, float]:
    """s_in and s_out."""
    norms = config.get("dataset_average_activation_norm")
    if not isinstance(norms, dict):
        raise ConfigError(
            "the autoencoder's config lacks a key",
            where=where,
            expected="dataset_average_activation_norm with in and out",
        )
    s_in, s_out = (
        math.sqrt(width) / _number(norms, key, where)
        for key, width in (("in", spec.d_in), ("out", spec.d_out))
    )
    return s_in, s_out


def _number(values: Mapping[str, Any], key: str, where: Path) -> float:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigError(
            "not a positive number", where=f"{where}: {key}", expected="above 0", found=value
        )
    return float(value)
