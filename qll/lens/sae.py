"""A sparse autoencoder that encodes and decodes in blocks, from memory or straight from its file.

    z = x - b_dec     h = W_enc z + b_enc     f = activation(h)     y = sum_i f_i W_dec_i + b_dec

Arithmetic is float32 whatever the weights are stored in (bfloat16 may choose which features are
computed: `qll.lens.coarse`), unless bfloat16 is asked for. Encoding walks over blocks of features
and keeps a running top-k, so that no [tokens, d_sae] array exists; decoding gathers the k rows a
token needs. Formulas and their variants: `qll.load.sae_file` and the readers of each format.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.nn import functional

from qll.errors import ShapeError, UsageError
from qll.lens import coarse
from qll.lens.activations import collector, padded
from qll.lens.codes import SparseCodes, concatenate
from qll.lens.rows import combine, products_with
from qll.load.sae import open_sae
from qll.load.sae_file import SAESpec, StoredSAE

CPU = torch.device("cpu")
# Bytes of a block of weights, and of a block of pre-activations, in float32
BLOCK_BYTES = 64 << 20
DIRECTIONS = 4096  # whose norms are computed at a time
# Weights of up to this size are kept in memory; larger ones stay in their file
MEMORY_BYTES = 5 << 29


@dataclass(frozen=True)
class SAE:
    """An autoencoder (or transcoder) ready to compute, on `device`.

    >>> from qll.load.sae_file import LatentMatrix
    >>> spec, eye = SAESpec("layers.0", 2, 2, 2, "topk", k=1), LatentMatrix(torch.eye(2))
    >>> biases = {"b_enc": torch.zeros(2), "b_dec": torch.zeros(2)}
    >>> sae = SAE(StoredSAE(spec, eye, eye, biases))
    >>> codes = sae.encode(torch.tensor([[3.0, 1.0]]))
    >>> codes.indices.tolist(), sae.decode(codes).tolist()
    ([[0]], [[3.0, 0.0]])
    """

    stored: StoredSAE
    device: torch.device = CPU
    precision: torch.dtype = torch.float32
    """bfloat16: products and sums of rows as the weights are stored, and results rounded to it."""

    def __post_init__(self) -> None:
        if self.precision != torch.float32 and not coarse.allows(self.stored):
            raise UsageError(
                "this autoencoder cannot compute in bfloat16",
                where=self.stored.where,
                expected="topk, with weights stored in bfloat16 (a row per feature) and in memory",
                hint="use float32",
            )

    @property
    def spec(self) -> SAESpec:
        """What it computes, and where in a model it belongs."""
        return self.stored.spec

    @property
    def needs_input(self) -> bool:
        """Whether decoding needs the encoded input too, for a skip connection."""
        return "W_skip" in self.stored.vectors

    def encode(self, x: Float[Tensor, "tokens d_in"]) -> SparseCodes:
        """The features that fire on each row of `x`; raises ShapeError for another width."""
        self._require_width(x)
        if not len(x):
            empty = torch.zeros(0, 1, device=self.device)
            return SparseCodes(empty, empty.long())
        latents, tokens = self._block_sizes()
        with torch.no_grad():
            parts = x.to(self.device).split(tokens)
            return concatenate([self._encode(part, latents) for part in parts])

    def decode(
        self, codes: SparseCodes, x: Float[Tensor, "tokens d_in"] | None = None
    ) -> Float[Tensor, "tokens d_out"]:
        """What the codes stand for, in the units of the model, float32.

        x: the encoded input, which an autoencoder with a skip connection needs (UsageError without
        it).
        """
        vectors = self.stored.vectors
        with torch.no_grad():
            y = self.weighted_sum(codes) + vectors["b_dec"]
            y = self._restored(y, codes)
            if self.needs_input:
                if x is None:
                    raise UsageError(
                        "decoding needs the input, because of a skip connection",
                        where=self.spec.hookpoint,
                        hint="call decode(codes, x)",
                    )
                y = y + x.to(self.device, torch.float32) @ vectors["W_skip"].T
        return y

    def reconstruct(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_out"]:
        """decode(encode(x)), a chunk of tokens at a time."""
        _, tokens = self._block_sizes()
        return torch.cat([self.decode(self.encode(part), part) for part in x.split(tokens)])

    def difference(self, before: SparseCodes, after: SparseCodes) -> Float[Tensor, "tokens d_out"]:
        """decode(after) - decode(before), without the rounding of what they share.

        Entries of the same value at the same place of both cancel exactly.
        """
        width = max(before.values.shape[1], after.values.shape[1])
        before, after = before.widened(width), after.widened(width)
        kept = (before.values == after.values) & (before.indices == after.indices)
        minus = replace(before, values=before.values.masked_fill(kept, 0))
        plus = replace(after, values=after.values.masked_fill(kept, 0))
        change = self.weighted_sum(plus) - self.weighted_sum(minus)
        matrix = self.stored.vectors.get("inverse_matrix")
        change = change if matrix is None else change @ matrix
        return change if before.scale is None else change * before.scale

    def directions(self, features: Iterable[int] | Int[Tensor, " n"]) -> Float[Tensor, "n d_out"]:
        """What a feature of activation 1 adds to the output: rows of W_dec, scales included."""
        wanted = torch.as_tensor(features if isinstance(features, Tensor) else list(features))
        wanted = wanted.to(self.device)
        self.require_features(wanted.tolist())
        rows = self.stored.decoder.rows(wanted).to(self.device)
        scale = self.stored.vectors.get("scale_dec")
        matrix = self.stored.vectors.get("inverse_matrix")
        rows = rows if scale is None else rows * scale[wanted][:, None]
        return rows if matrix is None else rows @ matrix

    def projections(
        self, features: Int[Tensor, "tokens k"], several: list[Float[Tensor, "tokens d_out"]]
    ) -> list[Float[Tensor, "tokens k"]]:
        """<direction of feature, x_t> of the features that each token names, for several x."""
        vectors, weight = self.stored.vectors, self._decoder_rows
        features = features.to(self.device)
        several = [x.to(self.device, torch.float32) for x in several]
        if "inverse_matrix" in vectors:  # <row M, x> = <row, M x>
            several = [x @ vectors["inverse_matrix"].T for x in several]
        if weight is not None:
            found = products_with(several, weight, features)
        else:
            tokens = max(1, BLOCK_BYTES // (4 * features.shape[1] * self.spec.d_out))
            chunks = zip(features.split(tokens), *[x.split(tokens) for x in several], strict=True)
            parts = [self._fetched_products(wanted, xs) for wanted, *xs in chunks]
            found = [torch.cat(dots) for dots in zip(*parts, strict=True)]
        scale = vectors.get("scale_dec")
        return found if scale is None else [dots * scale[features] for dots in found]

    def _fetched_products(self, features: Tensor, several: list[Tensor]) -> list[Tensor]:
        """The same for few tokens: the rows they need are brought to float32 first."""
        needed, places = torch.unique(features, return_inverse=True)
        return products_with(several, self.stored.decoder.rows(needed).to(self.device), places)

    @cached_property
    def direction_squares(self) -> Float64[Tensor, " d_sae"]:
        """Squared norm of every direction, on the CPU; computed once."""
        latents = torch.arange(self.spec.d_sae).split(DIRECTIONS)
        return torch.cat([self.directions(n).square().sum(1).cpu().double() for n in latents])

    def require_features(self, features: Iterable[int]) -> None:
        """Raise UsageError unless the autoencoder has all of `features`."""
        if wrong := [feature for feature in features if not 0 <= feature < self.spec.d_sae]:
            raise UsageError(
                "the autoencoder has no such feature",
                where=self.spec.hookpoint,
                expected=f"0 to {self.spec.d_sae - 1}",
                found=wrong[0],
            )

    def weighted_sum(self, codes: SparseCodes) -> Float[Tensor, "tokens d_out"]:
        """sum_i f_i W_dec_i of every token: no bias, before any normalisation is undone."""
        values, scale = codes.values, self.stored.vectors.get("scale_dec")
        if scale is not None:
            values = values * scale[codes.indices]
        weight = self._decoder_rows
        if weight is not None and weight.dtype == self.precision:
            values = values.to(weight.dtype)
            return functional.embedding_bag(
                codes.indices, weight, per_sample_weights=values, mode="sum"
            ).float()
        if weight is not None:
            return combine(values, weight, codes.indices)
        width = max(1, codes.values.shape[1])
        tokens = max(1, BLOCK_BYTES // (4 * width * self.spec.d_out))
        parts = zip(values.split(tokens), codes.indices.split(tokens), strict=True)
        return torch.cat([self._gathered_sum(*part) for part in parts])

    @property
    def _decoder_rows(self) -> Tensor | None:
        """W_dec as it is stored, if it is in memory with a row for every feature."""
        decoder = self.stored.decoder
        return decoder.data if isinstance(decoder.data, Tensor) and not decoder.transposed else None

    def _gathered_sum(self, values: Tensor, indices: Tensor) -> Tensor:
        """The same for few tokens: the rows they need are brought to float32 first."""
        needed, places = torch.unique(indices, return_inverse=True)
        rows = self.stored.decoder.rows(needed).to(self.device)
        return functional.embedding_bag(places, rows, per_sample_weights=values, mode="sum")

    def _encode(self, x: Tensor, latents: int) -> SparseCodes:
        vectors = self.stored.vectors
        z, scale, shift = self._normalised(x.float())
        if self.spec.subtract_b_dec:
            z = z - vectors["b_dec"]
        if self.precision == torch.bfloat16:
            found = self._rounded(z)
        else:
            found = self._coarse(z, latents) if self._is_coarse else self._blockwise(z, latents)
        return replace(found, scale=scale, shift=shift)

    @cached_property
    def _is_coarse(self) -> bool:
        return coarse.is_fast(self.stored, self.device)

    def _rounded(self, z: Tensor) -> SparseCodes:
        spec = self.spec
        values, features = coarse.rounded(
            z, self.stored.encoder.data, self.stored.vectors["b_enc"], spec.k, spec.signed
        )
        return padded(values if spec.signed else values.relu(), features)

    def _coarse(self, z: Tensor, latents: int) -> SparseCodes:
        """The codes by a coarse look first, and once more where that left a doubt."""
        spec = self.spec
        values, features, doubtful = coarse.strongest(
            z, self.stored.encoder.data, self.stored.vectors["b_enc"], spec.k, spec.signed
        )
        found = padded(values if spec.signed else values.relu(), features)
        if doubtful.any():
            again = self._blockwise(z[doubtful], latents)
            found.values[doubtful], found.indices[doubtful] = again.values, again.indices
        return found

    def _blockwise(self, z: Tensor, latents: int) -> SparseCodes:
        found = collector(self.spec, self.stored.vectors)
        scales = self.stored.vectors.get("scale_enc")
        for start, block in self.stored.encoder.blocks(latents):
            before = z @ block.to(self.device).T
            if scales is not None:
                before *= scales[start : start + len(block)]
            found.add(start, before)
        return found.codes()

    def _normalised(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x as the encoder reads it, and the scale and shift that undo it (none if transcoding)."""
        kind, vectors = self.spec.normalize, self.stored.vectors
        scale = shift = None
        if kind == "layer_norm":
            shift = x.mean(dim=1, keepdim=True)
            scale = (x - shift).std(dim=1, keepdim=True)
            x = (x - shift) / (scale + 1e-5)
        elif kind == "constant_norm_rescale":
            scale = x.norm(dim=1, keepdim=True) / self.spec.d_in**0.5
            x = x / scale
        elif kind == "covariance_whitening":
            x = (x - vectors["mean"]) @ vectors["matrix"]
        return (x, None, None) if self.spec.transcodes else (x, scale, shift)

    def _restored(self, y: Tensor, codes: SparseCodes) -> Tensor:
        vectors = self.stored.vectors
        if "inverse_matrix" in vectors:
            y = y @ vectors["inverse_matrix"] + vectors["mean"]
        y = y if codes.scale is None else y * codes.scale
        return y if codes.shift is None else y + codes.shift

    def _block_sizes(self) -> tuple[int, int]:
        """Features per block and tokens per chunk; a block holds whole groups of groupmax."""
        latents = max(1, BLOCK_BYTES // (4 * self.spec.d_in))
        if self.spec.activation == "groupmax":
            group = self.spec.d_sae // self.spec.k
            latents = max(1, latents // group) * group
        latents = min(latents, self.spec.d_sae)
        return latents, max(1, BLOCK_BYTES // (4 * latents))

    def _require_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.spec.d_in:
            raise ShapeError(
                "the autoencoder reads vectors of another width",
                where=self.spec.hookpoint,
                expected=self.spec.d_in,
                found=x.shape[-1],
                hint="it belongs to another model or another place",
            )


def load_sae(
    folder: str | Path,
    hookpoint: str | None = None,
    *,
    k: int | None = None,
    device: str | torch.device = "cpu",
    precision: Literal["float32", "bfloat16"] = "float32",
    memory_bytes: int = MEMORY_BYTES,
) -> SAE:
    """The autoencoder of `folder` at `hookpoint` (a place's name, or its path below `folder`).

    k: use another number of features per token, as a MultiTopK autoencoder allows. Weights of more
    than `memory_bytes` stay in the file and are read block by block whenever they are needed.
    precision: bfloat16 is faster and rounds every result to three digits, as other packages do;
    topk autoencoders stored in bfloat16 allow it (UsageError).
    Raises MissingFileError naming the hookpoints found, and what `qll.load.sae.open_sae` raises.
    """
    stored = open_sae(folder, hookpoint)
    if k is not None:
        if stored.spec.k is None:
            raise UsageError("this autoencoder has no k", where=stored.where, found=k)
        stored = replace(stored, spec=replace(stored.spec, k=k))
    if stored.bytes_stored <= memory_bytes:
        encoder, decoder = stored.encoder.load(device), stored.decoder.load(device)
        stored = replace(stored, encoder=encoder, decoder=decoder)
    vectors = {name: vector.to(device) for name, vector in stored.vectors.items()}
    stored = replace(stored, vectors=vectors)
    return SAE(stored, torch.device(device), getattr(torch, precision))
