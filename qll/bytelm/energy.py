"""Energies of phases and states: low when coherent, means rather than sums, so 0 to about 1.

A phase is a pair of channels read as a complex number z; only its direction z / |z| counts, and no
angle is ever computed (its gradient at 0 is undefined). A state is the vector of one position.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from qll.tn.modes import balanced_factors

SMALLEST = 1e-6  # what a modulus is at least, where it divides


def phasors(x: Float[Tensor, "batch seq channels"]) -> Float[Tensor, "batch seq pairs 2"]:
    """Channel pairs scaled to length 1: (cos, sin) of their phases, float32 or better.

    >>> phasors(torch.tensor([[[3.0, 4.0]]])).flatten().mul(10).round().tolist()
    [6.0, 8.0]
    """
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    return pairs / (pairs.square().sum(dim=-1, keepdim=True) + SMALLEST**2).sqrt()


def neighbour_energy(unit: Float[Tensor, "batch seq pairs 2"]) -> Float[Tensor, ""]:
    """1 - mean cos(phase difference) of neighbouring positions: 0 equal, 1 random, 2 opposite.

    >>> neighbour_energy(phasors(torch.ones(1, 8, 4))) < 1e-5
    tensor(True)
    """
    return 1 - (unit[:, 1:] * unit[:, :-1]).sum(dim=-1).mean()


def pair_energy(unit: Float[Tensor, "batch seq pairs 2"]) -> Float[Tensor, ""]:
    """1 - mean cos(phase difference) over every two different positions, in O(seq).

    sum_ij cos(phi_i - phi_j) = |sum_i e^{i phi_i}|^2, of which the i = j terms are the lengths.

    >>> pair_energy(phasors(torch.ones(1, 8, 4))) < 1e-5
    tensor(True)
    """
    seq = unit.shape[1]
    together = unit.sum(dim=1).square().sum(dim=-1)
    alone = unit.square().sum(dim=(1, 3))
    return 1 - ((together - alone) / max(1, seq * (seq - 1))).mean()


def cut_purity(x: Float[Tensor, "*batch channels"]) -> Float[Tensor, " *batch"]:
    """tr(rho^2) of one side of a cut of each normalised vector into two factors; 1 is a product.

    The vector of d channels is read as a matrix of the two most equal factors of d, the amplitudes
    of two subsystems; rho is the reduced density matrix of one.

    >>> bell = torch.tensor([1.0, 0.0, 0.0, 1.0])
    >>> round(float(-cut_purity(bell).log()), 4)  # one bit, in nats
    0.6931
    """
    left, right = balanced_factors(x.shape[-1], 2)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    amplitudes = functional.normalize(x, dim=-1, eps=SMALLEST).unflatten(-1, (left, right))
    reduced = amplitudes @ amplitudes.transpose(-1, -2)
    return reduced.square().sum(dim=(-1, -2))


def entanglement_energy(x: Float[Tensor, "batch seq channels"]) -> Float[Tensor, ""]:
    """1 - mean Renyi-2 entropy across the cut over its largest value: 1 product, 0 maximal.

    >>> round(float(entanglement_energy(torch.eye(4)[None, :1])), 4)
    1.0
    """
    largest = torch.tensor(balanced_factors(x.shape[-1], 2)[0], dtype=torch.float64).log()
    return 1 + cut_purity(x).clamp(min=SMALLEST).log().mean() / max(float(largest), SMALLEST)
