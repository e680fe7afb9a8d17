"""SAELens: cfg.json and sae_weights.safetensors, of version 6 and of those before.

    z = norm(x) - b_dec (if apply_b_dec_to_input)      y = undo_norm(f W_dec + b_dec) (+ x W_skip^T)
    standard f = relu(h), h = z W_enc + b_enc          topk      the k largest h, then relu
    jumprelu f = relu(h) where h > threshold           abstopk   the k largest |h|, with their sign
    gated    f = relu(z W_enc exp(r_mag) + b_mag) where z W_enc + b_gate > 0

W_enc is [d_in, d_sae], W_dec [d_sae, d_out]. Autoencoders trained as batchtopk or matryoshka are
saved as jumprelu. The normalisation `expected_average_only_in` multiplies x by a factor that
stands in activation_scaler.json unless it is folded in; a transcoder's output is not normalised.
Source: github.com/jbloomAus/SAELens 6.54, saes/ and loading/pretrained_sae_loaders.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qll.errors import ConfigError, UsageError
from qll.load.files import inside, read_object, shown
from qll.load.sae_file import (
    LatentMatrix,
    Normalize,
    SAESpec,
    StoredSAE,
    flag,
    pick_tensors,
    read_vector,
    whole,
)
from qll.load.sae_names import hookpoint_of
from qll.load.safetensors import read_safetensors

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"
# architecture -> activation here
ARCHITECTURES = {
    "standard": "relu",
    "topk": "topk",
    "abstopk": "topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
SCALED = "expected_average_only_in"
NORMS: tuple[Normalize, ...] = (
    "none",
    "layer_norm",
    "constant_norm_rescale",
    "covariance_whitening",
)
SMALLEST = 1e-12
ROWS = 4096  # decoder rows whose norm is taken at a time


def read_saelens(folder: Path) -> StoredSAE:
    """The autoencoder in `folder`; its matrices stay in the file.

    Raises MissingFileError, ConfigError, UsageError for a hook that no Llama has, ShapeError,
    MissingTensorError, TruncatedFileError, NonFiniteError.
    """
    where = folder / CONFIG
    config = version_6(read_object(inside(folder, CONFIG)), where)
    architecture = _architecture(config, where)
    norm = config.get("normalize_activations", "none")
    spec = _spec(config, architecture, norm, where)
    path = inside(folder, WEIGHTS)
    tensors = pick_tensors(read_safetensors(path), _names(architecture, spec), path)
    ones = tensors.pop("scaling_factor", None)
    if ones is not None and not bool((read_vector(ones) == 1).all()):
        raise ConfigError("finetuning scaling factors are not implemented", where=path)
    encoder = LatentMatrix(tensors.pop("W_enc"), transposed=True)
    decoder = LatentMatrix(tensors.pop("W_dec"))
    vectors = {name: read_vector(tensor) for name, tensor in tensors.items()}
    if norm == "covariance_whitening":
        vectors |= _whitening(folder)
    stored = StoredSAE(spec, encoder, decoder, vectors, where=str(folder))
    scale = _input_scale(folder) if norm == SCALED else 1.0
    rescaled = flag(config, "rescale_acts_by_decoder_norm", where)
    return StoredSAE(spec, encoder, decoder, _folded(stored, scale, rescaled), where=str(folder))


def hook_names(config: Mapping[str, Any]) -> tuple[str, str]:
    """What a cfg.json calls the place read and the place written; empty for none."""
    facts = config.get("metadata") if isinstance(config.get("metadata"), dict) else config
    keys = ("hook_name", "hook_point", "hf_hook_name")
    outs = ("hook_name_out", "hf_hook_name_out")
    ins = [str(facts[key]) for key in keys if facts.get(key)]
    out = [str(facts[key]) for key in outs if facts.get(key)]
    return ins[0] if ins else "", out[0] if out else ""


def version_6(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """A cfg.json of any version with the keys of version 6, as SAELens itself upgrades them."""
    metadata = config.get("metadata")
    if isinstance(metadata, dict) and metadata.get("sae_lens_version"):
        return dict(config)
    new = {"apply_b_dec_to_input": True, "architecture": "standard"} | dict(config)
    activation = new.get("activation_fn", new.get("activation_fn_str", "relu"))
    if activation == "topk" and isinstance(new.get("activation_fn_kwargs"), dict):
        new["architecture"] = "topk"
        new["k"] = new["activation_fn_kwargs"].get("k")
    elif activation not in ("relu", "topk"):
        raise ConfigError(
            "activation of this autoencoder is not implemented",
            where=where,
            expected="relu or topk",
            found=shown(activation),
        )
    norm = new.get("normalize_activations")
    if norm is None or isinstance(norm, bool):
        new["normalize_activations"] = SCALED if norm else "none"
    return new


def _architecture(config: Mapping[str, Any], where: Path) -> str:
    found = config.get("architecture", "standard")
    if found not in ARCHITECTURES:
        raise ConfigError(
            "architecture of this autoencoder is not implemented",
            where=where,
            expected=", ".join(ARCHITECTURES),
            found=shown(found),
            hint="save it for inference: SAELens turns batchtopk and matryoshka into jumprelu",
        )
    return found


def _spec(config: Mapping[str, Any], architecture: str, norm: Any, where: Path) -> SAESpec:
    if norm not in (*NORMS, SCALED):
        raise ConfigError(
            "normalisation of this autoencoder is not implemented",
            where=where,
            expected=", ".join((*NORMS, SCALED)),
            found=shown(norm),
        )
    transcodes = architecture.endswith("transcoder")
    d_in = whole(config, "d_in", where)
    reads, writes = hook_names(config)
    if not reads or (transcodes and not writes):
        raise ConfigError(
            "the autoencoder does not say where in a model it belongs",
            where=where,
            expected="hook_name in its metadata, and hook_name_out for a transcoder",
        )
    return SAESpec(
        hookpoint=_place(reads, where),
        d_in=d_in,
        d_sae=whole(config, "d_sae", where),
        d_out=whole(config, "d_out", where) if transcodes else d_in,
        activation=ARCHITECTURES[architecture],
        k=whole(config, "k", where) if ARCHITECTURES[architecture] == "topk" else None,
        signed=architecture == "abstopk",
        subtract_b_dec=flag(config, "apply_b_dec_to_input", where, default=True) and not transcodes,
        normalize="none" if norm == SCALED else norm,
        writes=_place(writes, where) if transcodes else "",
        facts={"format": "saelens", "architecture": architecture},
    )


def _place(name: str, where: Path) -> str:
    try:
        return hookpoint_of(name)
    except UsageError:
        raise ConfigError(
            "the autoencoder reads a place that no Llama has, or that is not implemented",
            where=where,
            expected="for instance blocks.7.hook_resid_post",
            found=shown(name),
        ) from None


def _names(architecture: str, spec: SAESpec) -> dict[str, str]:
    gated = ("b_gate", "b_mag", "r_mag")
    names = ["W_enc", "W_dec", "b_dec", *(gated if spec.activation == "gated" else ("b_enc",))]
    if spec.activation == "jumprelu":
        names.append("threshold")
    if "skip" in architecture:
        names.append("W_skip")
    return {name: name for name in names} | {"scaling_factor?": "scaling_factor"}


def _folded(stored: StoredSAE, scale: float, rescaled: bool) -> dict[str, Tensor]:
    """The small tensors with the input's factor and the norms of decoder rows folded in."""
    vectors = dict(stored.vectors)
    latents = stored.spec.d_sae
    if scale != 1.0:
        vectors["b_dec"] = vectors["b_dec"] / scale
        vectors["scale_enc"] = torch.full((latents,), scale)
        vectors["scale_dec"] = torch.full((latents,), 1 / scale)
    if rescaled and stored.spec.activation == "topk":
        norms = decoder_norms(stored.decoder) / scale
        vectors["b_enc"] = vectors["b_enc"] * norms
        vectors["scale_enc"] = norms * scale
        vectors["scale_dec"] = 1 / (norms * scale)
    return vectors


def decoder_norms(decoder: LatentMatrix) -> Tensor:
    """Euclidean norm of every feature's decoder row, float32 [d_sae]; above 0, to divide by."""
    norms = torch.cat([block.norm(dim=1) for _, block in decoder.blocks(ROWS)])
    return norms.clamp(min=SMALLEST)


def _input_scale(folder: Path) -> float:
    hint = "save the autoencoder for inference, which folds the factor in"
    if not (folder / SCALER).is_file():
        raise ConfigError(
            "the factor of the inputs is neither folded in nor in the folder",
            where=folder,
            expected=SCALER,
            hint=hint,
        )
    factor = read_object(inside(folder, SCALER)).get("scaling_factor")
    if not isinstance(factor, (int, float)) or not 0 < factor < float("inf"):
        raise ConfigError(
            "not a factor", where=folder / SCALER, expected="a number above 0", found=factor
        )
    return float(factor)


def _whitening(folder: Path) -> dict[str, Tensor]:
    path = inside(folder, WHITENING)
    names = ("mean", "matrix", "inverse_matrix")
    found = pick_tensors(read_safetensors(path), {name: name for name in names}, path)
    return {name: read_vector(tensor) for name, tensor in found.items()}
