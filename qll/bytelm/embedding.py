"""Where the byte embedding starts: at random, or at what the statistics of byte pairs say.

    normal      independent normal numbers
    orthogonal  directions of different bytes are orthogonal, as far as there is room
    ppmi        left singular vectors of the positive pointwise mutual information of byte pairs,
                times the roots of their singular values (Levy and Goldberg 2014)
    spectral    complex eigenvectors of the transition matrix between bytes, a pair of channels each
    frequency   byte b has the phases -(j + 1) log p(b), j the number of the pair of channels

All have the same root mean square, so that only directions differ. Channels that the statistics
do not reach (beyond 256) are normal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from qll.bytelm.config import VOCAB
from qll.bytelm.documents import Document
from qll.bytelm.initial import STD

Start = Literal["normal", "orthogonal", "ppmi", "spectral", "frequency"]
STARTS = get_args(Start)
COUNTED = 4 << 20  # bytes of text: rare pairs say little
SMOOTHING = 0.1  # added to every count


def bigram_counts(documents: Iterable[Document]) -> Float64[Tensor, "256 256"]:
    """How often byte b follows byte a in the first megabytes, at [a, b].

    >>> found = bigram_counts([Document("text", b"abab")])
    >>> found[97, 98].item(), found[98, 97].item(), found.sum().item()
    (2.0, 1.0, 3.0)
    """
    counts, left = np.zeros(VOCAB * VOCAB, dtype=np.int64), COUNTED
    for document in documents:
        for piece in document.pieces():
            data = np.frombuffer(piece[:left], dtype=np.uint8).astype(np.int64)
            left -= len(data)
            counts += np.bincount(data[:-1] * VOCAB + data[1:], minlength=VOCAB * VOCAB)
        if left <= 0:
            break
    return torch.from_numpy(counts).double().view(VOCAB, VOCAB)


def start_of(
    kind: Start, width: int, counts: Float64[Tensor, "256 256"], seed: int = 0
) -> Float[Tensor, "256 width"]:
    """The embedding to start with, of root mean square STD.

    >>> start_of("orthogonal", 256, torch.ones(256, 256).double()).std().round(decimals=3).item()
    0.019999999552965164
    """
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(VOCAB, width, generator=generator, dtype=torch.float64)
    if kind == "orthogonal":
        found = _orthogonal(found)
    elif kind != "normal":
        known = {"ppmi": _ppmi, "spectral": _spectral, "frequency": _frequency}[kind]
        directions = known(counts + SMOOTHING, width)
        found[:, : directions.shape[1]] = directions / _size(directions)
    return (found * (STD / _size(found))).float()


def _orthogonal(normal: Tensor) -> Tensor:
    """Orthonormal rows, or columns where there are fewer of those."""
    tall = normal if len(normal) >= normal.shape[1] else normal.T
    basis = torch.linalg.qr(tall).Q
    return basis if tall is normal else basis.T


def _ppmi(counts: Tensor, width: int) -> Tensor:
    shares = counts / counts.sum()
    expected = shares.sum(1, keepdim=True) * shares.sum(0, keepdim=True)
    u, s, _ = torch.linalg.svd((shares / expected).log().clamp(min=0))
    return (u * s.sqrt())[:, :width]


def _spectral(counts: Tensor, width: int) -> Tensor:
    """The slowest modes: eigenvectors of the largest eigenvalues, each of length 1."""
    values, vectors = torch.linalg.eig(counts / counts.sum(1, keepdim=True))
    order = values.abs().argsort(descending=True, stable=True)[: width // 2]
    pairs = torch.view_as_real(vectors[:, order])
    return pairs.flatten(1)


def _frequency(counts: Tensor, width: int) -> Tensor:
    turns = torch.arange(1, width // 2 + 1).double()
    phases = -torch.outer((counts.sum(1) / counts.sum()).log(), turns)
    return torch.stack((phases.cos(), phases.sin()), dim=-1).flatten(1)


def _size(matrix: Tensor) -> float:
    """Root mean square."""
    return float(matrix.norm()) / math.sqrt(matrix.numel())
