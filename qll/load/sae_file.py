"""A sparse autoencoder as it lies in a file, whatever the format: its maths and its tensors.

With z = x (normalised as `normalize` says, minus b_dec if `subtract_b_dec`) and W_enc, W_dec
[d_sae, d] with one row per feature, every format is

    h = scale_enc * (W_enc z) + b_enc          codes f = activation(h)
    y = sum_i f_i scale_dec_i W_dec_i + b_dec (+ W_skip x), the normalisation undone

What a format folds into its weights (norms of decoder rows, dataset-wise scales) stays in the two
vectors of scales, so that matrices are never rewritten and can be read a few rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qll.errors import ConfigError, MissingTensorError, NonFiniteError, ShapeError
from qll.load.files import shown
from qll.load.safetensors import SafeTensor

Activation = Literal["relu", "topk", "groupmax", "jumprelu", "gated"]
Normalize = Literal["none", "layer_norm", "constant_norm_rescale", "covariance_whitening"]
MAX_WIDTH = 1 << 26  # latents; the widest published autoencoders have 2^24
# Numbers of a matrix that are checked or moved at a time: 32 MB in float32
CHUNK = 1 << 23


@dataclass(frozen=True)
class SAESpec:
    """What an autoencoder (or transcoder, which predicts another place) computes.

    >>> SAESpec("layers.7", 4096, 131072, 4096, "topk", k=192).writes
    'layers.7'
    """

    hookpoint: str
    """The place it reads, by the house's name."""
    d_in: int
    """Width of what it reads."""
    d_sae: int
    """Number of features."""
    d_out: int
    """Width of what it writes."""
    activation: Activation
    """relu; topk and groupmax (k values, after a ReLU); jumprelu; gated."""
    k: int | None = None
    """Features per token at most, of topk and groupmax."""
    signed: bool = False
    """topk by absolute value, keeping the sign."""
    subtract_b_dec: bool = True
    """Whether b_dec is taken off the input."""
    normalize: Normalize = "none"
    """What is done to every token before, and undone after."""
    writes: str = ""
    """The place it predicts: its own for an autoencoder, another one for a transcoder."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the file says: format, model, norms."""

    def __post_init__(self) -> None:
        if not self.writes:
            object.__setattr__(self, "writes", self.hookpoint)
        if self.activation in ("topk", "groupmax"):
            _require_k(self)

    @property
    def transcodes(self) -> bool:
        """Whether it predicts another place than it reads."""
        return self.writes != self.hookpoint


@dataclass(frozen=True)
class LatentMatrix:
    """A matrix with one row per feature, in memory or in its file, perhaps stored transposed.

    >>> matrix = LatentMatrix(torch.tensor([[1.0, 2.0, 3.0]]), transposed=True)
    >>> matrix.shape, matrix.block(1, 3).tolist(), matrix.rows(torch.tensor([2, 0])).tolist()
    ((3, 1), [[2.0], [3.0]], [[3.0], [1.0]])
    """

    data: Tensor | SafeTensor
    """[d_sae, width], or [width, d_sae] if `transposed`."""
    transposed: bool = False
    """Whether features are columns."""

    @property
    def shape(self) -> tuple[int, int]:
        """(d_sae, width), however it is stored."""
        first, second = self._spec[0]
        return (second, first) if self.transposed else (first, second)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it is stored in."""
        return self._spec[1]

    @property
    def in_memory(self) -> bool:
        """Whether no file is read any more."""
        return isinstance(self.data, Tensor)

    @property
    def _spec(self) -> tuple[tuple[int, ...], torch.dtype]:
        place = self.data if isinstance(self.data, Tensor) else self.data.spec
        return tuple(place.shape), place.dtype

    def block(self, start: int, stop: int) -> Float[Tensor, "latents width"]:
        """Features start..stop-1 in the stored dtype; NonFiniteError for NaN in a file."""
        if isinstance(self.data, Tensor):
            return self.data[:, start:stop].T if self.transposed else self.data[start:stop]
        if self.transposed:
            return _finite(self.data.read_columns(start, stop), self.data).T
        return _finite(self.data.read(start, stop), self.data)

    def rows(self, latents: Int[Tensor, " n"]) -> Float[Tensor, "n width"]:
        """The features `latents`, in float32 and in that order."""
        if isinstance(self.data, Tensor):
            picked = self.data.T if self.transposed else self.data
            return picked[latents.to(self.data.device)].float()
        if self.transposed:
            return self.load().rows(latents)
        wanted, places = torch.unique(latents.cpu(), return_inverse=True)
        found = self.data.read_rows(wanted.tolist())
        return _finite(found, self.data).float()[places]

    def blocks(self, most: int) -> Iterator[tuple[int, Float[Tensor, "latents width"]]]:
        """(start, block) for blocks of `most` features in float32, in order."""
        for start in range(0, self.shape[0], most):
            yield start, self.block(start, min(start + most, self.shape[0])).float()

    def load(self, device: str | torch.device = "cpu") -> LatentMatrix:
        """The same matrix in memory, in its stored dtype, with one row per feature.

        Checked for NaN on the way; holds no second copy.
        """
        count, width = self.shape
        if isinstance(self.data, Tensor) and not self.transposed:
            return LatentMatrix(self.data.to(device))
        loaded = torch.empty(count, width, dtype=self.dtype, device=device)
        step = max(1, CHUNK // width)
        for start in range(0, count, step):
            stop = min(start + step, count)
            loaded[start:stop] = self.block(start, stop).to(device)
        return LatentMatrix(loaded)


@dataclass(frozen=True)
class StoredSAE:
    """An autoencoder in its file: matrices by feature, the small tensors in float32.

    vectors: b_enc [d_sae] (b_gate, b_mag, r_mag instead for gated), b_dec [d_out]; where they
    apply threshold, scale_enc, scale_dec [d_sae], W_skip [d_out, d_in], and mean [d_in], matrix,
    inverse_matrix [d_in, d_in] of a whitening.
    """

    spec: SAESpec
    encoder: LatentMatrix
    decoder: LatentMatrix
    vectors: Mapping[str, Float[Tensor, "..."]]
    where: str = "autoencoder"

    def __post_init__(self) -> None:
        """Compare every shape with the spec; raises ShapeError or MissingTensorError."""
        spec, found = self.spec, {"W_enc": self.encoder.shape, "W_dec": self.decoder.shape}
        found |= {name: tuple(vector.shape) for name, vector in self.vectors.items()}
        shapes = {"W_enc": (spec.d_sae, spec.d_in), "W_dec": (spec.d_sae, spec.d_out)}
        shapes |= vector_shapes(spec)
        for name in required_vectors(spec):
            if name not in found:
                raise MissingTensorError("tensor is missing", where=f"{self.where}: {name}")
        for name, shape in found.items():
            if shape != shapes[name]:
                raise ShapeError(
                    "tensor and config of the autoencoder disagree about its shape",
                    where=f"{self.where}: {name}",
                    expected=shapes[name],
                    found=shape,
                    hint="the weights belong to another cfg.json",
                )

    @property
    def bytes_stored(self) -> int:
        """Bytes of the two matrices in their stored dtype."""
        return sum(
            math.prod(matrix.shape) * matrix.dtype.itemsize
            for matrix in (self.encoder, self.decoder)
        )


def vector_shapes(spec: SAESpec) -> dict[str, tuple[int, ...]]:
    """Shape of every small tensor an autoencoder may have.

    >>> vector_shapes(SAESpec("layers.0", 8, 32, 8, "relu"))["W_skip"]
    (8, 8)
    """
    per_latent = ("b_enc", "b_gate", "b_mag", "r_mag", "threshold", "scale_enc", "scale_dec")
    return dict.fromkeys(per_latent, (spec.d_sae,)) | {
        "b_dec": (spec.d_out,),
        "W_skip": (spec.d_out, spec.d_in),
        "mean": (spec.d_in,),
        "matrix": (spec.d_in, spec.d_in),
        "inverse_matrix": (spec.d_in, spec.d_in),
    }


def required_vectors(spec: SAESpec) -> tuple[str, ...]:
    """Names of the small tensors without which the spec cannot be computed."""
    names = ("b_gate", "b_mag", "r_mag") if spec.activation == "gated" else ("b_enc",)
    if spec.activation == "jumprelu":
        names += ("threshold",)
    if spec.normalize == "covariance_whitening":
        names += ("mean", "matrix", "inverse_matrix")
    return (*names, "b_dec")


def pick_tensors(
    tensors: Mapping[str, SafeTensor], names: Mapping[str, str], where: Path
) -> dict[str, SafeTensor]:
    """`tensors` under the house's names; MissingTensorError for one that is absent or unasked for.

    names: name in the file -> name here; a `?` at its end marks one that may be absent.
    """
    wanted = {name.removesuffix("?"): own for name, own in names.items()}
    for name in names:
        if not name.endswith("?") and name not in tensors:
            raise MissingTensorError(
                "tensor of the autoencoder is missing", where=f"{where}: {name}"
            )
    if unknown := sorted(set(tensors) - set(wanted)):
        raise MissingTensorError(
            "tensor has no place in this kind of autoencoder",
            where=where,
            found=", ".join(map(shown, unknown[:3])),
            hint="its cfg.json describes another architecture",
        )
    return {wanted[name]: tensor for name, tensor in tensors.items()}


def read_vector(tensor: SafeTensor) -> Float[Tensor, "..."]:
    """A small tensor whole, in float32; raises NonFiniteError."""
    if not tensor.spec.shape:
        raise ShapeError("tensor is a single number", where=tensor.path, expected="a vector")
    return _finite(tensor.read(0, tensor.spec.shape[0]), tensor).float()


def whole(config: Mapping[str, Any], key: str, where: Path, default: int | None = None) -> int:
    """A positive integer of a cfg.json (0 allowed with a default); raises ConfigError."""
    value = config.get(key, default)
    if value is None:
        raise ConfigError(
            "the autoencoder's config lacks a key",
            where=where,
            expected=key,
            found=", ".join(map(shown, sorted(config)))[:200] or "an empty object",
        )
    least = 0 if default is not None else 1
    if type(value) is not int or not least <= value <= MAX_WIDTH:
        raise ConfigError(
            "not a size", where=f"{where}: {key}", expected=f"{least} or more", found=value
        )
    return value


def flag(config: Mapping[str, Any], key: str, where: Path, default: bool = False) -> bool:
    """A true or false of a cfg.json; raises ConfigError."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ConfigError(
            "not a truth value", where=f"{where}: {key}", expected="true or false", found=value
        )
    return value


def _require_k(spec: SAESpec) -> None:
    if spec.k is None or not 1 <= spec.k <= spec.d_sae:
        raise ConfigError(
            "k is not between 1 and the number of features",
            where=spec.hookpoint,
            expected=f"1 to {spec.d_sae}",
            found=spec.k,
            hint="the cfg.json belongs to another autoencoder",
        )
    if spec.activation == "groupmax" and spec.d_sae % spec.k:
        raise ConfigError(
            "groupmax needs as many features in every group",
            where=spec.hookpoint,
            expected=f"a multiple of k = {spec.k}",
            found=spec.d_sae,
        )


def _finite(tensor: Tensor, source: SafeTensor) -> Tensor:
    if tensor.numel():
        low, high = torch.aminmax(tensor)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise NonFiniteError(
                "weights of the autoencoder hold NaN or infinity",
                where=source.path,
                hint="download or train it again",
            )
    return tensor
