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
    network: MatrixNetwork,
    seen: Whitened,
    metric: Metric,
    sweeps: int,
    dtype: torch.dtype = torch.float64,
) -> MatrixNetwork:
    """`network`, fitted to seen.matrices[0], after `sweeps` rounds over its cores, gauge "none".

    Products are taken in `dtype`: whitened, the problem is near the identity, so that the
    precision of the saved cores is enough, at half the time. A diagonal moment (of a vocabulary)
    is what its legs already see best, and is left alone.
    """
    moments = (metric.left, metric.right)
    if any(moment is not None and moment.ndim == 1 for moment in moments):
        return network
    shape = seen.matrices[0].shape
    left = _left_over(metric.left, seen.out, shape[0])
    right = _left_over(metric.right, seen.into, shape[1])
    if left is None and right is None:
        return network
    left, right = (None if side is None else side.to(dtype) for side in (left, right))
    local, target = Metric(metric.kind, left, right), seen.matrices[0].to(dtype)
    network = _cast(network, dtype)
    for _ in range(sweeps):
        for position in range(len(network.cores)):
            if hasattr(network, "canonicalize"):
                network = network.canonicalize(position)
            network = solved(network, position, target, local)
    return _cast(network, torch.float64)


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
    core = network.cores[position].detach().clone()

    def matrix(value: Tensor) -> Tensor:
        cores = (*network.cores[:position], value, *network.cores[position + 1 :])
        return replace(network, cores=cores).to_matrix()

    # linear in the core, so one graph gives the gradient at every value of it
    with torch.enable_grad():
        variable = core.clone().requires_grad_()
        graph = matrix(variable)

    def gradient(error: Tensor) -> Tensor:
        return torch.autograd.grad(graph, variable, error, retain_graph=True)[0]

    residual = gradient(metric.weighted(target - graph.detach()))
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
    missing = 0 if moment is None else size - len(moment)
    dims = [1 if leg is None else len(leg.root) for leg in legs]
    if moment is None or (missing == 0 and max(dims) == size):
        return None  # one leg is the whole index: nothing is left over
    padded = torch.nn.functional.pad(moment, (0, missing, 0, missing))
    inverses = [None if leg is None else Factor(leg.inverse_transposed, leg.root) for leg in legs]
    return apply_roots(inverses, padded, inverses)


def _cast(network: MatrixNetwork, dtype: torch.dtype) -> MatrixNetwork:
    return replace(network, cores=tuple(core.to(dtype) for core in network.cores))
