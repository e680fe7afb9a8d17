"""The cores of one network -> packed cores, one after the other, each making up for the others.

The matrix is affine in every single core. So with the other cores fixed, the core of least metric
error is a linear least-squares problem (`refit`), and what rounding it costs is a quadratic form of
the core. That form is taken as the nearest pair (left, right) of second moments, one on each side
of the core as a matrix; for low rank it is exactly one: W = A B has (A^T G A, H) for B and
(G, B H B^T) for A. For other formats the pair is estimated from probes: errors of covariance G x H,
pulled back through the network, are errors of the core with the covariance that is wanted.
Rounding cores without regard to each other would let their errors multiply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from qll.convert.fit import dense_members
from qll.convert.metric import Metric, factor
from qll.tn import JointNetwork, build
from qll.tn.network import MatrixNetwork
from qll.tn.packed import Packing, as_rows, from_rows, group_axis
from qll.tn.rounding import Rounded, round_in_metric, round_nearest

SWEEPS = 4
LEAST_GAIN = 0.05
# With the pair of low rank, which is exact, one step is enough.
CG_STEPS = 8
CG_TOLERANCE = 1e-4
LEAST_PROBES, MOST_PROBES = 16, 64
MOST_COUPLED = 4096
MOST_NUMBERS = 1 << 23  # of probes at a time, so that one product adds up many
PROBE_SHRINK = 0.02

Pair = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class RoundedNetwork:
    """The codes of every core, the network they stand for, and what they cost."""

    rounded: tuple[Rounded, ...]
    network: MatrixNetwork | JointNetwork
    losses: tuple[float, ...]
    """Squared metric error after each sweep, relative to the network's own norm; never rising."""


def round_network(
    network: MatrixNetwork | JointNetwork, packing: Packing, metrics: Sequence[Metric]
) -> RoundedNetwork:
    """`network` with every core on the grid of `packing`, near in the metrics (one per member).

    A core is only exchanged for one of lower error. Deterministic.

    >>> from qll.convert.metric import plain
    >>> from qll.tn import NETWORKS
    >>> from qll.tn.network import NetworkSpec
    >>> _ = torch.manual_seed(0)
    >>> spec = NetworkSpec("lowrank", (40, 36), (8,))
    >>> found = round_network(
    ...     NETWORKS["lowrank"].decompose(torch.randn(40, 36), spec), Packing(8, 32), [plain()])
    >>> len(found.rounded), found.losses[-1] < 1e-3
    (2, True)
    """
    problem = Problem(network, metrics, packing)
    cores = [core.detach().to("cpu", torch.float64) for core in network.cores]
    rounded: list[Rounded | None] = [None] * len(cores)
    losses: list[float] = []
    loss = float("inf")
    while len(losses) < SWEEPS:
        for k in reversed(range(len(cores))):
            if cores[k].numel() == 0:  # an interpolative core at full rank
                rounded[k] = round_nearest(as_rows(cores[k], packing.group), packing)
                continue
            pair = problem.pair(cores, k)
            rows = as_rows(problem.refit(cores, k, pair), packing.group)
            tried = [round_in_metric(rows, packing, *pair)]
            if rounded[k] is None:
                # the pair may be a poor estimate: nearest rounding is the least to be had
                tried.append(round_nearest(rows, packing))
                loss = float("inf")
            for found in tried:
                changed = _with(cores, k, found.values, packing)
                if (lost := problem.loss(changed)) < loss:
                    loss, rounded[k], kept = lost, found, changed
            if rounded[k] is not None and loss < float("inf"):
                cores = kept
        losses.append(loss / problem.norm)
        if loss == 0 or (len(losses) > 1 and losses[-1] > (1 - LEAST_GAIN) * losses[-2]):
            break
    return RoundedNetwork(tuple(rounded), problem.network(cores), tuple(losses))


@dataclass(frozen=True)
class RoundedMatrix:
    """The codes of a dense matrix and the matrix they stand for."""

    rounded: Rounded
    matrix: Float64[Tensor, "out into"]


def round_matrix(
    weight: Float[Tensor, "out into"], packing: Packing, metric: Metric
) -> RoundedMatrix:
    """A dense matrix on the grid of `packing`, near in the metric.

    >>> from qll.convert.metric import plain
    >>> bool((round_matrix(torch.eye(3), Packing(4, 32), plain()).matrix == torch.eye(3)).all())
    True
    """
    shape, weight = tuple(weight.shape), weight.to("cpu", torch.float64)
    rows = as_rows(weight, packing.group)
    pair = oriented((metric.left, metric.right), shape, packing.group)
    tried = []
    for found in (round_in_metric(rows, packing, *pair), round_nearest(rows, packing)):
        matrix = from_rows(found.values, shape, packing.group)
        tried.append((metric.norm_squared(weight - matrix), RoundedMatrix(found, matrix)))
    return min(tried, key=lambda item: item[0])[1]


class Problem:
    """The error of a network's cores against the network itself, in the metrics of its members."""

    def __init__(
        self, network: MatrixNetwork | JointNetwork, metrics: Sequence[Metric], packing: Packing
    ) -> None:
        self.spec, self.indices, self.metrics = network.spec, network.indices, metrics
        self.group = packing.group
        cores = [core.detach().to("cpu", torch.float64) for core in network.cores]
        with torch.no_grad():
            self.wanted = self.matrices(cores)
        self.norm = max(self._squared(self.wanted), 1e-300)

    def network(self, cores: Sequence[Tensor]) -> MatrixNetwork | JointNetwork:
        """The network around these cores."""
        return build(self.spec, tuple(cores), self.indices)

    def matrices(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """The dense members."""
        return dense_members(self.network(cores))

    def loss(self, cores: Sequence[Tensor]) -> float:
        """Squared metric error, summed over members."""
        with torch.no_grad():
            return self._squared(self._errors(cores))

    def pair(self, cores: Sequence[Tensor], k: int) -> Pair:
        """(left, right) moments of core k as `as_rows` writes it; exact for low rank."""
        if self.spec.format != "lowrank":
            return self._probed_pair(cores, k)
        into, out = self.metrics[0].right, self.metrics[0].left
        first, second = self.network(cores).expand().cores
        if k == 1:
            pair = (_around(first.mT, out), into)
        else:
            pair = (_part(out, self._written_rows), _around(second, into))
        return oriented(pair, tuple(cores[k].shape), self.group)

    def refit(self, cores: Sequence[Tensor], k: int, pair: Pair) -> Tensor:
        """Core k of least error beside the other cores, by conjugate gradients from where it is.

        The pair is the preconditioner. Its inverse stands for the normal equations' own.
        """
        shape, solve = tuple(cores[k].shape), [_solver(moment) for moment in pair]
        core = cores[k].clone()
        with torch.no_grad():
            base, errors = self.matrices(cores), self._errors(cores)
        if self._squared(errors) <= 1e-20 * self.norm:
            return core

        def precondition(vector: Tensor) -> Tensor:
            rows = solve[1](solve[0](as_rows(vector, self.group)).mT).mT
            return from_rows(rows, shape, self.group)

        residual = self._pull_back(cores, k, errors)
        direction = step = precondition(residual)
        size = first = float((residual * step).sum())
        for _ in range(CG_STEPS):
            if size <= CG_TOLERANCE**2 * first or size <= 0:
                break
            with torch.no_grad():
                moved = self.matrices([*cores[:k], cores[k] + direction, *cores[k + 1 :]])
                change = [after - before for after, before in zip(moved, base, strict=True)]
            curvature = self._squared(change)
            if curvature <= 0:
                break
            core = core + size / curvature * direction
            residual = residual - size / curvature * self._pull_back(cores, k, change)
            step = precondition(residual)
            before, size = size, float((residual * step).sum())
            direction = step + size / before * direction
        return core

    def _errors(self, cores: Sequence[Tensor]) -> list[Tensor]:
        return [
            wanted - found for wanted, found in zip(self.wanted, self.matrices(cores), strict=True)
        ]

    def _squared(self, errors: Sequence[Tensor]) -> float:
        pairs = zip(self.metrics, errors, strict=True)
        return sum(metric.norm_squared(error) for metric, error in pairs)

    def _pull_back(self, cores: Sequence[Tensor], k: int, errors: Sequence[Tensor]) -> Tensor:
        """The gradient by core k of the inner product of the members with G E H."""
        weighted = [m.weighted(error) for m, error in zip(self.metrics, errors, strict=True)]
        return self._gradient(cores, k, weighted)

    def _gradient(self, cores: Sequence[Tensor], k: int, outer: Sequence[Tensor]) -> Tensor:
        core = cores[k].detach().requires_grad_()
        members = self.matrices([*cores[:k], core, *cores[k + 1 :]])
        # a member that does not see this core has no graph
        both = zip(members, outer, strict=True)
        seen = [(member, part) for member, part in both if member.requires_grad]
        return torch.autograd.grad([m for m, _ in seen], core, [part for _, part in seen])[0]

    def _probed_pair(self, cores: Sequence[Tensor], k: int) -> Pair:
        rows, length = as_rows(cores[k], self.group).shape
        count = max(LEAST_PROBES, 8 * max(rows, length) // min(rows, length))
        count = min(MOST_PROBES, count)
        hand = torch.Generator().manual_seed(k)
        # a side longer than the probes can tell apart gets its diagonal only
        left = cores[k].new_zeros((rows, rows) if rows <= MOST_COUPLED else (rows,))
        right = cores[k].new_zeros(length, length)
        for taken in torch.arange(count).split(max(1, MOST_NUMBERS // (rows * length))):
            probes = torch.stack([self._probe(cores, k, hand) for _ in taken])
            beside, below = probes.transpose(0, 1).flatten(1), probes.flatten(0, 1)
            left += beside @ beside.mT if left.ndim == 2 else beside.square().sum(1)
            right += below.mT @ below
        return _shrunk(left), _shrunk(right)

    def _probe(self, cores: Sequence[Tensor], k: int, hand: torch.Generator) -> Tensor:
        noise = [
            _coloured(torch.randn(wanted.shape, generator=hand, dtype=wanted.dtype), roots)
            for wanted, roots in zip(self.wanted, self._roots, strict=True)
        ]
        return as_rows(self._gradient(cores, k, noise), self.group)

    @cached_property
    def _roots(self) -> list[tuple[Tensor | None, Tensor | None]]:
        """Roots L with L L^T = G, and of H, per member."""
        sides = [(metric.left, metric.right) for metric in self.metrics]
        return [
            tuple(None if moment is None else factor(moment).root for moment in pair)
            for pair in sides
        ]

    @cached_property
    def _written_rows(self) -> Tensor | None:
        """Rows of the matrix that the first core of low rank writes; None: all of them."""
        if not self.indices:
            return None
        free = torch.ones(self.spec.shape[0], dtype=torch.bool)
        free[self.indices[0].long()] = False
        return free.nonzero()[:, 0]


def oriented(pair: Pair, shape: tuple[int, ...], group: int) -> Pair:
    """The moments of a matrix's two axes in the order that `as_rows` writes them.

    >>> oriented((None, torch.ones(2)), (40, 2), 32)[0].shape
    torch.Size([2])
    """
    return pair if group_axis(shape, group) == 1 else pair[::-1]


def _with(cores: Sequence[Tensor], k: int, values: Tensor, packing: Packing) -> list[Tensor]:
    core = from_rows(values, tuple(cores[k].shape), packing.group)
    return [*cores[:k], core, *cores[k + 1 :]]


def _around(matrix: Tensor, moment: Tensor | None) -> Tensor:
    """matrix moment matrix^T."""
    if moment is None:
        return matrix @ matrix.mT
    return (matrix * moment if moment.ndim == 1 else matrix @ moment) @ matrix.mT


def _part(moment: Tensor | None, kept: Tensor | None) -> Tensor | None:
    if moment is None or kept is None:
        return moment
    return moment[kept] if moment.ndim == 1 else moment[kept][:, kept]


def _coloured(noise: Tensor, roots: tuple[Tensor | None, Tensor | None]) -> Tensor:
    left, right = roots
    if left is not None:
        noise = left[:, None] * noise if left.ndim == 1 else left @ noise
    if right is not None:
        noise = noise * right if right.ndim == 1 else noise @ right.mT
    return noise


def _shrunk(moment: Tensor) -> Tensor:
    """An estimate from few probes, made positive definite; a moment of nothing is the identity."""
    mean = (moment if moment.ndim == 1 else moment.diagonal()).mean()
    identity = torch.ones_like(moment) if moment.ndim == 1 else torch.eye(len(moment)).to(moment)
    if not mean > 0:
        return identity
    return (1 - PROBE_SHRINK) * moment / mean + PROBE_SHRINK * identity


def _solver(moment: Tensor | None):
    """x -> moment^-1 x."""
    if moment is None:
        return lambda x: x
    if moment.ndim == 1:
        return lambda x: x / moment[:, None]
    root, info = torch.linalg.cholesky_ex(moment)
    if int(info):
        return lambda x: x / moment.diagonal().clamp(min=1e-300)[:, None]
    return lambda x: torch.cholesky_solve(x, root)
