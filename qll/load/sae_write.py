"""Write an autoencoder as sparsify or SAELens lay it out, so that those packages open it.

What a format folds is folded: scales go into the matrices, in float32 before they are cast back.
A format that cannot express an autoencoder refuses it. cfg.json is written last.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qll import store
from qll.errors import ConfigError
from qll.load import sae_saelens, sae_sparsify
from qll.load.sae_file import SAESpec, StoredSAE
from qll.load.sae_names import EMBEDDING, LENS_NAMES, site_of

# house's module below a block -> TransformerLens' name, the first of those that mean the same
LENS_OF = {module.removeprefix("."): name for name, module in reversed(LENS_NAMES.items())}
SAELENS_VERSION = "6.0.0"  # of the layout


def write_sparsify(sae: StoredSAE, folder: str | Path) -> None:
    """Write `sae` to `folder` (named after its hookpoint) for eai-sparsify.

    Raises ConfigError for what sparsify cannot express: other activations than topk and groupmax,
    normalised inputs, an autoencoder that leaves b_dec in its input.
    """
    spec, folder = sae.spec, Path(folder)
    own_input = site_of(spec.writes)
    fits = (
        spec.activation in ("topk", "groupmax")
        and spec.normalize == "none"
        and spec.d_in == spec.d_out
        and spec.subtract_b_dec != spec.transcodes
        and (not spec.transcodes or spec.hookpoint == f"{own_input.module}.input")
    )
    _require(fits, "sparsify", spec, folder)
    matrices, dtype = _matrices(sae), sae.encoder.dtype
    tensors = {
        "encoder.weight": matrices["W_enc"],
        "encoder.bias": sae.vectors["b_enc"],
        "W_dec": matrices["W_dec"],
        "b_dec": sae.vectors["b_dec"],
    }
    if "W_skip" in sae.vectors:
        tensors["W_skip"] = sae.vectors["W_skip"]
    config: dict[str, Any] = {
        "activation": spec.activation,
        "expansion_factor": max(1, spec.d_sae // spec.d_in),
        "normalize_decoder": spec.facts.get("normalize_decoder", True),
        "num_latents": spec.d_sae,
        "k": spec.k,
        "multi_topk": spec.facts.get("multi_topk", False),
        "skip_connection": "W_skip" in sae.vectors,
        "transcode": spec.transcodes,
        "d_in": spec.d_in,
    }
    if spec.signed:
        config["signed"] = True
    _write(folder, sae_sparsify.WEIGHTS, tensors, dtype, config)


def write_saelens(sae: StoredSAE, folder: str | Path, model_name: str = "") -> None:
    """Write `sae` to `folder` for SAELens 6; `model_name` is TransformerLens' name of the model.

    Raises ConfigError for what SAELens cannot express: groupmax, whitening (fold it first), a
    transcoder with topk or gates.
    """
    spec, folder = sae.spec, Path(folder)
    architecture = _architecture(sae)
    fits = architecture is not None and spec.normalize != "covariance_whitening"
    _require(fits, "SAELens", spec, folder)
    matrices = _matrices(sae)
    tensors = {"W_enc": matrices["W_enc"].T, "W_dec": matrices["W_dec"]}
    tensors |= {name: v for name, v in sae.vectors.items() if not name.startswith("scale_")}
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": spec.d_in,
        "d_sae": spec.d_sae,
        "dtype": str(sae.encoder.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": spec.subtract_b_dec,
        "normalize_activations": spec.normalize,
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "model_name": model_name,
            "hook_name": lens_name(spec.hookpoint),
            "hf_hook_name": f"model.{spec.hookpoint}",
        },
    }
    if spec.k is not None:
        config |= {"k": spec.k, "rescale_acts_by_decoder_norm": False}
    if spec.transcodes:
        config["d_out"] = spec.d_out
        config["metadata"]["hook_name_out"] = lens_name(spec.writes)
    _write(folder, sae_saelens.WEIGHTS, tensors, sae.encoder.dtype, config)


def lens_name(hookpoint: str) -> str:
    """TransformerLens' name of a place; the house's where it has none.

    >>> lens_name("layers.7"), lens_name("embed_tokens"), lens_name("layers.7.mlp")
    ('blocks.7.hook_resid_post', 'hook_embed', 'blocks.7.hook_mlp_out')
    """
    if hookpoint == EMBEDDING:
        return "hook_embed"
    _, block, *inner = hookpoint.split(".")
    name = LENS_OF.get(".".join(inner))
    return f"blocks.{block}.{name}" if name else hookpoint


def _architecture(sae: StoredSAE) -> str | None:
    spec, skips = sae.spec, "W_skip" in sae.vectors
    if spec.transcodes:
        kinds = {"relu": "", "jumprelu": "jumprelu_"}
        if spec.activation not in kinds or spec.subtract_b_dec:
            return None
        return f"{kinds[spec.activation]}{'skip_' if skips else ''}transcoder"
    kinds = {"relu": "standard", "jumprelu": "jumprelu", "gated": "gated"}
    kinds["topk"] = "abstopk" if spec.signed else "topk"
    return None if skips else kinds.get(spec.activation)


def _matrices(sae: StoredSAE) -> dict[str, Tensor]:
    """W_enc and W_dec [d_sae, width] in the stored dtype, scales multiplied in."""
    pairs = {"W_enc": (sae.encoder, "scale_enc"), "W_dec": (sae.decoder, "scale_dec")}
    found = {}
    for name, (matrix, scale) in pairs.items():
        data = matrix.load().data
        if scale in sae.vectors:
            data = (data.float() * sae.vectors[scale][:, None]).to(data.dtype)
        found[name] = data
    # tied weights are one tensor in memory, but two in a file
    places = [data.untyped_storage().data_ptr() for data in found.values()]
    if places[0] == places[1]:
        found["W_dec"] = found["W_dec"].clone()
    return found


def _write(
    folder: Path, name: str, tensors: dict[str, Tensor], dtype: torch.dtype, config: dict[str, Any]
) -> None:
    cast = {key: tensor.detach().cpu().to(dtype) for key, tensor in tensors.items()}
    store.write_tensors(folder / name, cast)
    store.write_json(folder / sae_sparsify.CONFIG, config)


def _require(fits: bool, name: str, spec: SAESpec, folder: Path) -> None:
    if not fits:
        raise ConfigError(
            f"{name} has no such autoencoder",
            where=folder,
            found=f"{spec.activation}, normalize {spec.normalize}, {spec.hookpoint} to "
            f"{spec.writes}",
            hint="write it in the other format",
        )
