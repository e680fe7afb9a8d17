"""Alternating least squares: one core at a time, under the whole metric.

The closed form of a format whose legs split an index sees a Kronecker product instead of G_out
and G_in. With all other cores fixed the matrix is linear in one core, so
tr((W - W~)^T G_out (W - W~) G_in) is a quadratic in it, minimised here by conjugate gradients that
start from the core as it is and never build the normal equations: the error falls with every step.
All happens in the leg-wise metric of the closed form, with the core in the centre of the canonical
form where there is one, so that the quadratic is near the identity and few steps suffice.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qll.convert.metric import Factor, Metric
from qll.convert.whitened import Whitened, apply_roots
from qll.tn.network import MatrixNetwork

STEPS = 6


def swept_cores(
    network: MatrixNetwork, seen: Whitened, metric: Metric, sweeps: int
) -> MatrixNetwork:
    """`network`, fitted to seen.matrices[0], after `sweeps` rounds over its cores, gauge "none".

    A diagonal moment (of a vocabulary) is what its legs already see best, and is left alone.
    """
    moments = (metric.left, metric.right)
    if any(moment is not None and moment.ndim == 1 for moment in moments):
        return network
    shape = seen.matrices[0].shape
    local = Metric(
        metric.kind,
        _left_over(metric.left, seen.out, shape[0]),
        _left_over(metric.right, seen.into, shape[1]),
    )
    for _ in range(sweeps):
        for position in range(len(network.cores)):
            if hasattr(network, "canonicalize"):
                network = network.canonicalize(position)
            network = solved(network, position, seen.matrices[0], local)
    return network


def solved(
    network: MatrixNetwork, position: int, target: Tensor, metric: Metric, steps: int = STEPS
) -> MatrixNetwork:
    """The network with one core moved towards the least metric error to `target`.

    >>> from qll.tn import NETWORKS, NetworkSpec
    >>> spec = NetworkSpec("lowrank", (2, 2), (1,))
    >>> network = NETWORKS["lowrank"](spec, (torch.ones(2, 1), torch.ones(1, 2)))
    >>> solved(network, 0, torch.tensor([[2.0, 2.0], [3.0, 3.0]]), Metric("plain")).cores[0]
    tensor([[2.],
            [3.]])
    """
    core = network.cores[position].detach()

    def matrix(value: Tensor) -> Tensor:
        cores = (*network.cores[:position], value, *network.cores[position + 1 :])
        return replace(network, cores=cores).to_matrix()

    def gradient(error: Tensor) -> Tensor:
        with torch.enable_grad():
            variable = core.clone().requires_grad_()
            return torch.autograd.grad((matrix(variable) * error).sum(), variable)[0]

    residual = gradient(metric.weighted(target - matrix(core)))
    direction, slope = residual, float(residual.square().sum())
    start = slope
    for _ in range(steps):
        if not slope > 1e-24 * start:
            break
        image = matrix(direction)
        pulled = metric.weighted(image)
        length = slope / float((image * pulled).sum())
        core = core + length * direction
        residual = residual - length * gradient(pulled)
        previous, slope = slope, float(residual.square().sum())
        direction = residual + (slope / previous) * direction
    return replace(network, cores=(*network.cores[:position], core, *network.cores[position + 1 :]))


def _left_over(moment: Tensor | None, legs: list[Factor | None], size: int) -> Tensor | None:
    """The second moment as seen after whitening by `legs`, padding included; None: identity."""
    if moment is None:
        return None
    missing = size - len(moment)
    padded = torch.nn.functional.pad(moment, (0, missing, 0, missing))
    inverses = [None if leg is None else Factor(leg.inverse_transposed, leg.root) for leg in legs]
    return apply_roots(inverses, padded, inverses)
