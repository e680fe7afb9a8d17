"""Entropies and spectra of one weight matrix, dense and converted, as entries of report.json.

The state is |W>> = vec(W) / ||W||_F. The *channel cut* out | in is the ordinary SVD of W: it does
not change when rows or columns are permuted. The *site cut* k parts the first k sites of a split
into modes from the others: it does change, so an order of rows has to be stated beside it. Both
stand beside a random real matrix of the same size, because the entropy of noise is close to the
maximum and a bare number says nothing (Page 1993; for real matrices Kumar and Pandey 2011).

>>> entries = matrix_entropies("w", torch.eye(16), sites=2)
>>> [(entry["cut"], abs(round(entry["nats"], 6))) for entry in entries]
[('channel', 2.772589), ('site1', 0.0)]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, pi, prod, sqrt
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qll.errors import NonFiniteError, ShapeError, UsageError
from qll.tn.entropy import max_entropy, participation_ratio, random_entropy, renyi, von_neumann
from qll.tn.modes import default_modes, paired_modes, split, unfold
from qll.tn.symmetric import eigenvalues_descending

CHANNEL = "channel"
SINGLE_FROM = 4096  # sides from here on are factored in float32: twice as fast, 1e-7 in entropy
CHUNK = 1 << 23  # numbers of a matrix that are in float64 at a time: 64 MB
QUADRATURE = 4097  # angles at which the Marchenko-Pastur distribution is summed: 1e-6 in sigma


class MatrixLook(NamedTuple):
    """All that the report says about the spectrum of one matrix."""

    entropies: list[dict[str, Any]]
    """Entries of report.json's `entropy.per_matrix`, the channel cut first."""
    spectrum: dict[str, Any]
    """The matrix's entry of `entropy.spectra`."""


class _Cut(NamedTuple):
    name: str
    values: Tensor
    size: tuple[int, int]


def look(
    name: str,
    dense: Float[Tensor, "out into"],
    converted: Float[Tensor, "_ _"] | None = None,
    *,
    modes: Mapping[str, Sequence[int]] | None = None,
    sites: int = 3,
    points: int = 48,
) -> MatrixLook:
    """`matrix_entropies` and `spectrum` together, with one factorisation per matrix and cut.

    For a matrix that was left dense pass `dense` twice: nothing is computed again. Raises what the
    two raise.

    >>> seen = look("w", torch.eye(8), points=3)
    >>> len(seen.entropies), seen.spectrum["rank"]
    (3, [1, 3, 8])
    """
    _check_pair(name, dense, converted)
    cuts = _cuts(dense, modes, sites)
    after = cuts if converted is dense else None
    if after is None and converted is not None:
        after = _cuts(converted, modes, sites)
    values = None if after is None else after[0].values
    return MatrixLook(
        _entries(name, cuts, after),
        _spectrum_entry(name, dense.shape, cuts[0].values, values, points),
    )


def matrix_entropies(
    name: str,
    dense: Float[Tensor, "out into"],
    converted: Float[Tensor, "_ _"] | None = None,
    *,
    modes: Mapping[str, Sequence[int]] | None = None,
    sites: int = 3,
) -> list[dict[str, Any]]:
    """Entries of report.json's `entropy.per_matrix`: the channel cut, then cuts site1 .. site d-1.

    modes: {"out": (m_1 .. m_d), "in": (n_1 .. n_d)}; without them the shape splits into `sites`
    balanced ones. Each entry: name, cut, nats (von Neumann, dense), nats_converted (None without
    a converted matrix), nats_random (mean of real Gaussian matrices of the cut's size), max_nats,
    renyi2 (nats, dense), participation_ratio (exp renyi2). Raises ShapeError when the matrices
    differ in shape, UsageError for modes that do not fit, NonFiniteError for NaN.

    >>> noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    >>> entry = matrix_entropies("w", noise)[0]
    >>> abs(entry["nats"] - entry["nats_random"]) < 0.02
    True
    """
    return look(name, dense, converted, modes=modes, sites=sites).entropies


def spectrum(
    name: str,
    dense: Float[Tensor, "out into"],
    converted: Float[Tensor, "_ _"] | None = None,
    *,
    points: int = 64,
) -> dict[str, Any]:
    """A matrix's entry of report.json's `entropy.spectra`: singular values at up to `points` ranks.

    Keys: name, shape, rank (ascending from 1 to min(shape), closer together at the top), dense,
    converted (None without one). Values are divided by the root mean square of the dense ones, so
    that 1 is typical whatever the scale, and `random_spectrum` is what noise would have. Raises
    ShapeError, UsageError for fewer than 2 points, NonFiniteError.

    >>> entry = spectrum("w", torch.diag(torch.tensor([3.0, 1.0])), points=2)
    >>> entry["rank"], [round(value, 3) for value in entry["dense"]]
    ([1, 2], [1.342, 0.447])
    """
    _check_pair(name, dense, converted)
    values = None if converted is None else _singular_values(converted)
    return _spectrum_entry(name, dense.shape, _singular_values(dense), values, points)


def random_spectrum(out: int, into: int, ranks: Sequence[int]) -> list[float]:
    """Singular values at `ranks` of a large random out x into matrix over their root mean square.

    Quantiles of Marchenko and Pastur (1967): with y = min/max of the sides and the angle t,
    sigma^2 = 1 + y + 2 sqrt(y) cos t has the density 2 sin^2 t / (pi sigma^2) dt.

    >>> [round(value, 2) for value in random_spectrum(100, 400, [1, 50, 100])]
    [1.48, 0.96, 0.52]
    """
    small, large = min(out, into), max(out, into)
    ratio = small / large
    angles = np.linspace(0.0, pi, QUADRATURE)
    middle = (angles[1:] + angles[:-1]) / 2
    squares = 1 + ratio + 2 * sqrt(ratio) * np.cos(middle)
    above = np.cumsum(2 * np.sin(middle) ** 2 / (pi * squares)) * (angles[1] - angles[0])
    shares = (np.asarray(ranks, dtype=float) - 0.5) / small
    return [float(value) for value in np.interp(shares, above / above[-1], np.sqrt(squares))]


def _cuts(matrix: Tensor, modes: Mapping[str, Sequence[int]] | None, sites: int) -> list[_Cut]:
    """The channel cut and the site cuts: singular values, and the size of the random twin."""
    out, into = matrix.shape
    out_modes, in_modes = paired_modes(modes or default_modes((out, into), sites), (out, into))
    cuts = [_Cut(CHANNEL, _singular_values(matrix), (out, into))]
    tensor = split(matrix, out_modes, in_modes).contiguous()
    for number in range(1, len(out_modes)):
        values = _singular_values(unfold(tensor, number))
        above, below = _parts(out, out_modes, number), _parts(into, in_modes, number)
        size = (above[0] * below[0], above[1] * below[1])
        cuts.append(_Cut(f"site{number}", values, size))
    return cuts


def _singular_values(matrix: Tensor) -> Tensor:
    """Descending, float64, from the Gram matrix of the short side.

    Values below 1e-8 of the largest (3e-4 in float32) are lost. Their weights are 1e-16 and less,
    so no entropy and no plot shows it, and a converted matrix, whose rank is deficient, costs no
    more than a dense one: an SVD would take five times as long.
    """
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    side = wide.shape[0]
    kind = torch.float32 if side >= SINGLE_FROM else torch.float64
    gram = torch.zeros(side, side, dtype=kind)
    for part in wide.split(max(1, CHUNK // side), dim=1):  # an embedding never becomes float64
        exact = part.to("cpu", kind)
        gram.addmm_(exact, exact.T)
    if not bool(torch.isfinite(gram).all()):
        raise NonFiniteError("NaN or infinity in a matrix", where="entropy", expected="finite")
    return eigenvalues_descending(gram).double().clamp(min=0).sqrt()


def _parts(size: int, modes: Sequence[int], cut: int) -> tuple[int, int]:
    """How many values the multi-index left and right of a cut takes: padding takes none."""
    right = prod(modes[cut:])
    return ceil(size / right), min(size, right)


def _entries(name: str, cuts: list[_Cut], after: list[_Cut] | None) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "cut": cut.name,
            "nats": von_neumann(cut.values),
            "nats_converted": None if after is None else von_neumann(after[number].values),
            "nats_random": random_entropy(*cut.size),
            "max_nats": max_entropy(*cut.size),
            "renyi2": renyi(cut.values, 2.0),
            "participation_ratio": participation_ratio(cut.values),
        }
        for number, cut in enumerate(cuts)
    ]


def _spectrum_entry(
    name: str, shape: torch.Size, dense: Tensor, converted: Tensor | None, points: int
) -> dict[str, Any]:
    if points < 2:
        raise UsageError("too few points", where="spectrum", expected=">= 2", found=points)
    full = len(dense)
    steps = torch.linspace(0, 1, points, dtype=torch.float64).square() * (full - 1)
    places = sorted({round(step) for step in steps.tolist()})
    scale = float(dense.square().mean().sqrt()) or 1.0  # a zero matrix stays zero
    return {
        "name": name,
        "shape": list(shape),
        "rank": [place + 1 for place in places],
        "dense": _rounded(dense, places, scale),
        "converted": None if converted is None else _rounded(converted, places, scale),
    }


def _rounded(values: Tensor, places: list[int], scale: float) -> list[float]:
    """Four digits: these are for a plot, and a report of 500 matrices should stay small."""
    return [float(f"{float(values[place]) / scale:.4g}") for place in places]


def _check_pair(name: str, dense: Tensor, converted: Tensor | None) -> None:
    if converted is not None and converted.shape != dense.shape:
        raise ShapeError(
            "the converted matrix has another shape than the dense one",
            where=name,
            expected=tuple(dense.shape),
            found=tuple(converted.shape),
        )
