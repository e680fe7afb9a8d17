"""One unit's weights -> one tensor network, as good as its ranks allow in the unit's metric.

Whiten, decompose, unwhiten, fix the gauge. A format whose legs are whole matrix indices (lowrank,
joint_tree) sees the metric exactly: the truncated singular values are the error. One whose legs
split an index (mpo, tree, kron, tucker) sees the nearest metric that splits the same way, a
Kronecker product of one moment per leg, because anything denser would glue its legs together;
sweeps over its cores then lower the error in the whole metric. Panels see the metric without what
couples one panel to another, and get it by sweeps as well. sparse is no decomposition: see
sparsify.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from qll.convert.candidates import format_of
from qll.convert.inner import INNER, fit_inner
from qll.convert.metric import Factor, Metric, factor, leg_moments
from qll.convert.panelling import swept_panels, whiten_panels
from qll.convert.short_side import short_spectrum, short_truncation
from qll.convert.sparsify import entry_losses, sparsify
from qll.convert.sweeps import swept_cores
from qll.convert.whitened import Whitened, apply_roots
from qll.errors import ConvergenceError
from qll.tn import JointNetwork, build
from qll.tn.network import MatrixNetwork, NetworkSpec

# formats whose closed form sees the metric leg by leg only
SWEPT = ("mpo", "tucker", "tree", "kron")
Weights = Sequence[Float[Tensor, "_ _"]]
Network = MatrixNetwork | JointNetwork


@dataclass(frozen=True)
class Fitted:
    """A network and how far it is from the weights (all relative, in [0, 1] or a little above)."""

    network: object
    rel_error: list[float]
    metric_error: list[float]
    discarded_weight: float


def fit(
    weights: Weights,
    spec: NetworkSpec,
    metrics: Sequence[Metric],
    dtype: torch.dtype,
    sweeps: int = 0,
) -> Fitted:
    """The network of `spec` nearest to `weights` (one matrix per member), cores in `dtype`.

    After the closed form, `sweeps` times over all cores (panels) of a format that does not see the
    whole metric, each solved for under it. The errors are those of the cores after the cast:
    rel_error ||W - W~||_F / ||W||_F and metric_error the same in the metric, per member. Raises
    ConvergenceError when the result is not finite.

    >>> from qll.convert.metric import plain
    >>> weight = torch.outer(torch.arange(1.0, 5), torch.ones(3))
    >>> fitted = fit([weight], NetworkSpec("lowrank", (4, 3), (1,)), [plain()], torch.float32)
    >>> fitted.rel_error[0] < 1e-6
    True
    """
    total = None
    if found := _short(weights, spec, metrics):
        network, discarded, total = found
    elif spec.format in INNER:
        network = fit_inner([weight.to(torch.float64) for weight in weights], spec, metrics)
        discarded = _discarded_inside(weights, network, metrics)
    elif spec.format == "sparse":
        network = _in_gauge(sparsify(weights[0].to(torch.float64), spec, metrics[0]), spec)
        discarded = relative_errors(weights[0], network.to_matrix(), metrics[0])[1] ** 2
    else:
        network, discarded = _decomposed(weights, spec, metrics, sweeps, dtype)
    cores = tuple(core.to(dtype) for core in network.cores)
    if not all(torch.isfinite(core).all() for core in cores):
        raise ConvergenceError(
            "the factorisation is not finite",
            where=f"{spec.format} of {spec.shape}",
            hint="try --metric activation or --dtype float32",
        )
    network = build(replace(network.spec, shape=spec.shape), cores, network.indices)
    # one member at a time, its matrix and its metric: in an MLP each is large
    errors = [
        relative_errors(weight, matrix, metrics[k], total)
        for k, (weight, matrix) in enumerate(
            zip(weights, _comparable(network, weights), strict=True)
        )
    ]
    return Fitted(network, [e[0] for e in errors], [e[1] for e in errors], discarded)


def _short(
    weights: Weights, spec: NetworkSpec, metrics: Sequence[Metric]
) -> tuple[Network, float, float] | None:
    """What `short_truncation` gives for a low-rank network, in the gauge of `spec`."""
    if spec.format != "lowrank":
        return None
    found = short_truncation(weights[0], format_of(spec).clamp(spec).ranks[0], metrics[0])
    return None if found is None else (_in_gauge(found[0], spec), *found[1:])


def _decomposed(
    weights: Weights, spec: NetworkSpec, metrics: Sequence[Metric], sweeps: int, dtype: torch.dtype
) -> tuple[Network, float]:
    """The network, and what the closed form discarded in the metric it saw."""
    seen = whiten(weights, spec, metrics)
    argument = _argument(seen.matrices, spec)
    network = format_of(spec).decompose(argument, seen.spec.with_gauge("none"))
    discarded = _discarded(seen.matrices, network)
    if sweeps and spec.format in SWEPT:
        wide = torch.promote_types(dtype, torch.float32)
        network = swept_cores(network, seen, metrics[0], sweeps, wide)
    network = network.transform_legs(
        [None if item is None else item.inverse_transposed for item in seen.out],
        [None if item is None else item.inverse for item in seen.into],
    )
    if seen.order is not None:
        network = network.reordered(seen.order)
    if sweeps and spec.format == "panels":
        network = swept_panels(network, weights[0].to(torch.float64), seen, metrics[0], sweeps)
    return _in_gauge(network, spec), discarded


def _in_gauge(network: Network, spec: NetworkSpec) -> Network:
    return network.interpolate() if spec.gauge == "interpolative" else network


def whiten(weights: Weights, spec: NetworkSpec, metrics: Sequence[Metric]) -> Whitened:
    """The weights in the metric, leg by leg, in float64."""
    matrices = [weight.to(torch.float64) for weight in weights]
    if spec.format == "panels":
        return whiten_panels(matrices[0], spec, metrics[0])
    if spec.format == "joint_tucker":
        return _whiten_joint_tucker(matrices, spec, metrics)
    if spec.format == "joint_tree":
        into = [_root(metrics[0].right)]
        out = [_root(metric.left) for metric in metrics]
        seen = [
            apply_roots([left], matrix, into) for left, matrix in zip(out, matrices, strict=True)
        ]
        return Whitened(seen, spec, out, into)
    out_dims, in_dims = legs(spec)
    padded = replace(spec, shape=(prod(out_dims), prod(in_dims)))
    out, into = _leg_roots(metrics[0].left, out_dims), _leg_roots(metrics[0].right, in_dims)
    matrix = matrices[0]
    if padded.shape != spec.shape:
        rows, columns = padded.shape[0] - spec.shape[0], padded.shape[1] - spec.shape[1]
        matrix = torch.nn.functional.pad(matrix, (0, columns, 0, rows))
    return Whitened([apply_roots(out, matrix, into)], padded, out, into)


def spectra(
    weights: Weights, spec: NetworkSpec, metrics: Sequence[Metric]
) -> list[Float[Tensor, "_"]]:
    """Singular values at every cut of `spec`, in the metric, descending; for sparse those numbers
    whose squares are the losses of single entries."""
    if spec.format == "sparse":
        return [entry_losses(weights[0].to(torch.float64), metrics[0])]
    if spec.format == "lowrank":
        values = short_spectrum(weights[0], metrics[0])
        if values is not None:
            return [values]
    seen = whiten(weights, spec, metrics)
    return format_of(spec).cut_spectra(_argument(seen.matrices, spec), seen.spec)


def legs(spec: NetworkSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The out legs and the in legs of a format of one matrix."""
    if spec.format == "lowrank":
        return (spec.shape[0],), (spec.shape[1],)
    if spec.format == "tucker":
        return spec.modes["stack"][:-1], spec.modes["stack"][-1:]
    return spec.modes["out"], spec.modes["in"]


def dense_members(network) -> list[Float[Tensor, "_ _"]]:
    """The matrices a network stands for, one per member."""
    return list(_dense(network))


def comparable_members(network, weights: Weights) -> list[Float[Tensor, "_ _"]]:
    """`dense_members`, in the basis of `weights` where the network is free to choose another."""
    return list(_comparable(network, weights))


def _dense(network) -> Iterator[Tensor]:
    members = network.spec.members
    if members:
        yield from (network.to_matrix(k) for k in range(len(members)))
    else:
        yield network.to_matrix()


def _comparable(network, weights: Weights) -> Iterator[Tensor]:
    if network.spec.format == "joint_value_output":
        yield from network.aligned(weights[0])
    else:
        yield from _dense(network)


def _argument(matrices: list[Tensor], spec: NetworkSpec) -> Tensor | list[Tensor]:
    return matrices if spec.members else matrices[0]


def _whiten_joint_tucker(
    matrices: list[Tensor], spec: NetworkSpec, metrics: Sequence[Metric]
) -> Whitened:
    """q, k, v and o^T share the model leg only: it carries the attention input's metric."""
    root = _root(metrics[0].right)
    if root is None:
        return Whitened(matrices, spec, [None, None], [None])
    *readers, writer = matrices
    seen = [matrix @ root.root for matrix in readers] + [root.root.T @ writer]
    return Whitened(seen, spec, [None, None], [root])


def _leg_roots(moment: Tensor | None, dims: Sequence[int]) -> list[Factor | None]:
    if moment is None:
        return [None] * len(dims)
    parts = leg_moments(moment, dims)
    # a split leg is small: its diagonal may as well be a matrix, which every format takes
    whole = len(parts) == 1
    return [factor(leg if whole or leg.ndim == 2 else torch.diag(leg)) for leg in parts]


def _root(moment: Tensor | None) -> Factor | None:
    return None if moment is None else factor(moment)


def _discarded_inside(weights: Weights, network, metrics: Sequence[Metric]) -> float:
    """What is lost in the metric of the members that read the inner channels: the last one, or
    both query and key."""
    first = 0 if network.spec.format == "joint_query_key" else len(weights) - 1
    lost = total = 0.0
    for place, matrix in enumerate(_comparable(network, weights)):
        if place >= first:
            metric, weight = metrics[place], weights[place].to(torch.float64)
            lost += metric.norm_squared(weight - matrix)
            total += metric.norm_squared(weight)
    return lost / max(total, 1e-300)


def _discarded(matrices: list[Tensor], network) -> float:
    lost = sum(
        float((matrix - member).square().sum())
        for matrix, member in zip(matrices, dense_members(network), strict=True)
    )
    return lost / max(sum(float(matrix.square().sum()) for matrix in matrices), 1e-300)


def relative_errors(
    weight: Float[Tensor, "out into"],
    matrix: Float[Tensor, "out into"],
    metric: Metric,
    total: float | None = None,
) -> tuple[float, float]:
    """||W - W~|| / ||W|| in the Frobenius norm and in the metric; `total`: ||W||^2 in the metric,
    where it is known.

    >>> from qll.convert.metric import plain
    >>> relative_errors(torch.full((1, 2), 2.0), torch.ones(1, 2), plain())
    (0.5, 0.5)
    """
    weight, matrix = weight.to(torch.float64), matrix.to(torch.float64)
    error = weight - matrix
    plain = float(error.norm()) / max(float(weight.norm()), 1e-300)
    total = max(metric.norm_squared(weight) if total is None else total, 1e-300)
    return plain, (metric.norm_squared(error) / total) ** 0.5
