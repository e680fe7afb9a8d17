"""EleutherAI's sparsify: <hookpoint>/cfg.json and <hookpoint>/sae.safetensors.

    p = relu((x - b_dec) encoder.weight^T + encoder.bias)     a transcoder keeps b_dec out of this
    y = sum over the k largest p_i of p_i W_dec_i  + b_dec  (+ x W_skip^T)

A hookpoint is the path of a module, whose output is read; a transcoder reads its input. In all
generations of cfg.json a missing key has its default, and `num_latents: 0` (2024) means
d_in * expansion_factor. `signed` (2024) selects by absolute value; sparsify itself ignores it
today. Source: github.com/EleutherAI/sparsify, sparse_coder.py and config.py of 2024-07 to 1.3.3.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from qll.load.sae_names import EMBEDDING, hookpoint_of
from qll.load.safetensors import read_safetensors

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
ACTIVATIONS = ("topk", "groupmax")
EXPANSION = 32  # the package's default
NAMES = {
    "encoder.weight": "W_enc",
    "encoder.bias": "b_enc",
    "W_dec": "W_dec",
    "b_dec": "b_dec",
}
# what a cfg.json may say; the rest concerns training or is unknown to us
KNOWN = {
    "activation",
    "d_in",
    "expansion_factor",
    "k",
    "multi_topk",
    "normalize_decoder",
    "num_latents",
    "signed",
    "skip_connection",
    "transcode",
}

logger = logging.getLogger("qll.load")


def read_sparsify(folder: Path, hookpoint: str) -> StoredSAE:
    """The autoencoder in `folder`, trained at `hookpoint`; matrices stay in the file.

    Raises MissingFileError, ConfigError, ShapeError, MissingTensorError, TruncatedFileError,
    NonFiniteError.
    """
    where = folder / CONFIG
    config = read_object(inside(folder, CONFIG))
    spec = _spec(config, where, hookpoint)
    names = NAMES | ({"W_skip": "W_skip"} if flag(config, "skip_connection", where) else {})
    path = inside(folder, WEIGHTS)
    tensors = pick_tensors(read_safetensors(path), names, path)
    matrices = {name: LatentMatrix(tensors.pop(name)) for name in ("W_enc", "W_dec")}
    return StoredSAE(
        spec,
        matrices["W_enc"],
        matrices["W_dec"],
        {name: read_vector(tensor) for name, tensor in tensors.items()},
        where=str(folder),
    )


def _spec(config: Mapping[str, Any], where: Path, hookpoint: str) -> SAESpec:
    if unknown := sorted(set(config) - KNOWN):
        logger.warning("%s: unknown keys %s", where, ", ".join(map(shown, unknown)))
    activation = config.get("activation", "topk")
    signed, transcode = flag(config, "signed", where), flag(config, "transcode", where)
    if activation not in ACTIVATIONS or (signed and activation != "topk"):
        raise ConfigError(
            "activation of this autoencoder is not implemented",
            where=where,
            expected=", ".join(ACTIVATIONS),
            found=f"{'signed ' if signed else ''}{shown(activation)}",
        )
    d_in = whole(config, "d_in", where)
    latents = whole(config, "num_latents", where, default=0)
    expansion = whole(config, "expansion_factor", where, default=EXPANSION)
    place = hookpoint_of(hookpoint)
    if transcode and place == EMBEDDING:
        raise ConfigError("a transcoder cannot read token ids", where=where, found=place)
    return SAESpec(
        hookpoint=hookpoint_of(f"{place}.input") if transcode else place,
        d_in=d_in,
        d_sae=latents or d_in * expansion,
        d_out=d_in,
        activation=activation,
        k=whole(config, "k", where),
        signed=signed,
        subtract_b_dec=not transcode,
        writes=place,
        facts={
            "format": "sparsify",
            "normalize_decoder": flag(config, "normalize_decoder", where, default=True),
            "multi_topk": flag(config, "multi_topk", where),
        },
    )
