"""Which features fire, found block by block of features: what is kept grows with k, not d_sae.

Each collector sees the pre-activations of a block of features for all tokens in hand and keeps a
running result: the k largest so far, the largest of each group, or all that pass a threshold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from qll.lens.codes import SparseCodes
from qll.load.sae_file import SAESpec


@runtime_checkable
class Collector(Protocol):
    """Takes blocks of pre-activations in order of features; gives codes."""

    def add(self, start: int, before: Tensor) -> None:
        """Pre-activations [tokens, block] of the features from `start` on."""

    def codes(self) -> SparseCodes:
        """The codes once all blocks were seen."""


def collector(spec: SAESpec, vectors: Mapping[str, Tensor]) -> Collector:
    """The collector of an activation; `vectors` holds biases and thresholds."""
    if spec.activation == "topk":
        return _TopK(spec, vectors)
    if spec.activation == "groupmax":
        return _GroupMax(spec, vectors)
    return _Passing(spec, vectors)


class _TopK:
    """relu, then the k largest; or the k largest by absolute value with their sign."""

    def __init__(self, spec: SAESpec, vectors: Mapping[str, Tensor]) -> None:
        self.k, self.signed, self.bias = spec.k, spec.signed, vectors["b_enc"]
        self.values: Tensor | None = None
        self.indices: Tensor | None = None

    def add(self, start: int, before: Tensor) -> None:
        """Merge the best of the block with the best so far."""
        before += self.bias[start : start + before.shape[1]]
        sizes = before.abs() if self.signed else before
        _, places = sizes.topk(min(self.k, before.shape[1]), dim=1, sorted=False)
        values, indices = before.gather(1, places), places + start
        if self.values is not None:
            values = torch.cat([self.values, values], dim=1)
            indices = torch.cat([self.indices, indices], dim=1)
            sizes = values.abs() if self.signed else values
            _, places = sizes.topk(min(self.k, values.shape[1]), dim=1, sorted=False)
            values, indices = values.gather(1, places), indices.gather(1, places)
        self.values, self.indices = values, indices

    def codes(self) -> SparseCodes:
        """Strongest first."""
        values = self.values if self.signed else self.values.relu()
        order = values.abs().argsort(dim=1, descending=True)
        return padded(values.gather(1, order), self.indices.gather(1, order))


class _GroupMax:
    """relu, then the largest of each of k contiguous groups; blocks hold whole groups."""

    def __init__(self, spec: SAESpec, vectors: Mapping[str, Tensor]) -> None:
        self.size, self.bias = spec.d_sae // spec.k, vectors["b_enc"]
        self.values: list[Tensor] = []
        self.indices: list[Tensor] = []

    def add(self, start: int, before: Tensor) -> None:
        """The winners of the groups in the block."""
        stop = start + before.shape[1]
        groups = (before + self.bias[start:stop]).unflatten(1, (-1, self.size))
        values, places = groups.max(dim=2)
        firsts = torch.arange(start, stop, self.size, device=before.device)
        self.values.append(values.relu())
        self.indices.append(places + firsts)

    def codes(self) -> SparseCodes:
        """One entry per group, in order of groups."""
        return padded(torch.cat(self.values, dim=1), torch.cat(self.indices, dim=1))


class _Passing:
    """All features above 0, above their threshold, or behind an open gate."""

    def __init__(self, spec: SAESpec, vectors: Mapping[str, Tensor]) -> None:
        self.vectors = vectors
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self.tokens = 0

    def add(self, start: int, before: Tensor) -> None:
        """Keep what fires in the block."""
        part = slice(start, start + before.shape[1])
        self.tokens, vectors = before.shape[0], self.vectors
        if "b_gate" in vectors:
            opened = before + vectors["b_gate"][part] > 0
            strength = before * vectors["r_mag"][part].exp() + vectors["b_mag"][part]
        else:
            strength = before + vectors["b_enc"][part]
            opened = strength > vectors["threshold"][part] if "threshold" in vectors else None
        fires = strength > 0 if opened is None else opened & (strength > 0)
        tokens, features = fires.nonzero(as_tuple=True)
        self.parts.append((tokens, features + start, strength[tokens, features]))

    def codes(self) -> SparseCodes:
        """As wide as the token on which most features fire."""
        tokens, features, values = (torch.cat(part) for part in zip(*self.parts, strict=True))
        tokens, order = tokens.sort(stable=True)
        counts = tokens.bincount(minlength=self.tokens)
        firsts = counts.cumsum(0) - counts
        places = torch.arange(len(tokens), device=tokens.device) - firsts[tokens]
        width = int(counts.max()) if len(tokens) else 1
        found = SparseCodes(
            values.new_zeros(self.tokens, width), features.new_zeros(self.tokens, width)
        )
        found.values[tokens, places] = values[order]
        found.indices[tokens, places] = features[order]
        return found


def padded(values: Tensor, indices: Tensor) -> SparseCodes:
    """Where the value is 0 the index says nothing: make it 0."""
    return SparseCodes(values, indices.masked_fill(values == 0, 0))
