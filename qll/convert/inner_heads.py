"""Value and output with fewer channels per head: which go, what is lost, and the refitted matrices.

The loss is that of o_proj in its own metric behind a basis of r channels per
key-value head. The basis is the best for the metric averaged over the query heads that read the
head, one eigenproblem each; o_proj is then refitted to all heads at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from qll.convert.candidates import format_of
from qll.convert.inner_parts import Options, eigenvalues, fit_part, menu_of
from qll.convert.metric import Metric, factor
from qll.tn import JointValueOutput
from qll.tn.joint_value_output import heads_of, output_part
from qll.tn.network import NetworkSpec


def fit_value_output(
    weights: Sequence[Tensor], spec: NetworkSpec, metrics: Sequence[Metric]
) -> JointValueOutput:
    heads, kv_heads, d_head = heads_of(spec)
    value, output = weights
    bases = _head_bases(spec, output, metrics[1])[:, : spec.ranks[0]]
    basis = torch.block_diag(*bases.repeat_interleave(heads // kv_heads, 0))
    values = (bases @ value.unflatten(0, (kv_heads, d_head))).flatten(0, 1)
    reduced, right = _behind(output, metrics[1].right, basis)
    part = fit_part(reduced, output_part(spec), Metric(metrics[1].kind, metrics[1].left, right))
    network = JointValueOutput.of_parts(spec, values, part)
    return network.interpolate() if spec.gauge == "interpolative" else network


def value_output_options(
    spec: NetworkSpec,
    weights: Sequence[Tensor],
    metrics: Sequence[Metric],
    scales: Sequence[float],
    step: int,
) -> Options:
    heads, kv_heads, d_head = heads_of(spec)
    output, metric = weights[1], metrics[1]
    bases = _head_bases(spec, output, metric)
    for rank in range(step, d_head, step):
        basis = torch.block_diag(*bases[:, :rank].repeat_interleave(heads // kv_heads, 0))
        reduced, _ = _behind(output, metric.right, basis)
        loss = metric.norm_squared(output - reduced @ basis) * scales[1]
        yield (rank, len(output)), loss
    full = format_of(spec).clamp(spec.with_ranks((d_head, len(output))))
    seen = output if metric.left is None else factor(metric.left).root.mT @ output
    seen = seen if metric.right is None else seen @ factor(metric.right).root
    menu = menu_of(output_part(full), eigenvalues(seen @ seen.mT) * scales[1], step)
    for rank, _, loss in menu:
        yield (d_head, rank), loss


def _head_bases(
    spec: NetworkSpec, output: Tensor, metric: Metric
) -> Float64[Tensor, "kv_heads d_head d_head"]:
    """Per key-value head the channels by importance: the first r rows are the basis of rank r.

    With C the moment of a head's channels and H = O^T G O, both averaged over the query heads,
    the rows are u^T R^-1 with C = R R^T and u the eigenvectors of R^T H R.
    """
    heads, kv_heads, _ = heads_of(spec)
    seen = output if metric.left is None else metric.left @ output
    curvature = _head_average(output.mT @ seen, heads, kv_heads)
    if metric.right is None:
        return torch.linalg.eigh(curvature).eigenvectors.flip(-1).mT
    roots = torch.linalg.cholesky(_head_average(metric.right, heads, kv_heads))
    vectors = torch.linalg.eigh(roots.mT @ curvature @ roots).eigenvectors.flip(-1)
    return torch.linalg.solve_triangular(roots, vectors.mT, upper=False, left=False)


def _head_average(matrix: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Mean of the diagonal blocks of the query heads of every key-value head."""
    blocks = matrix.unflatten(0, (heads, -1)).unflatten(2, (heads, -1))
    own = torch.stack([blocks[head, :, head] for head in range(heads)])
    return own.unflatten(0, (kv_heads, -1)).mean(1)


def _behind(
    output: Tensor, moment: Tensor | None, basis: Tensor
) -> tuple[Float64[Tensor, "out kept"], Float64[Tensor, "kept kept"]]:
    """(O' that reads basis @ z best, second moment of basis @ z)."""
    if basis.shape[0] == basis.shape[1]:
        right = basis @ (basis.mT if moment is None else moment @ basis.mT)
        return torch.linalg.solve(basis, output, left=False), right
    seen = basis if moment is None else basis @ moment
    right = seen @ basis.mT
    return torch.linalg.solve(right, seen @ output.mT).mT, right
