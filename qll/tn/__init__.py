"""Matrices as tensor networks: plain mathematics on tensors, no Llama inside.

In: a matrix [out, in] (or several that share a leg) and a `NetworkSpec`. Out: a `MatrixNetwork`,
which multiplies, rebuilds, rounds and measures its own entanglement. Read mpo.py first; svd.py,
gauge.py and contract.py are what every format stands on.

>>> import torch
>>> spec = NetworkSpec("lowrank", shape=(6, 4), ranks=(2,))
>>> network = NETWORKS[spec.format].decompose(torch.randn(6, 4), spec).interpolate()
>>> same = build(network.spec, network.cores, network.indices)
>>> same.apply(torch.ones(3, 4)).shape, tensor_shapes(same.spec).cores
(torch.Size([3, 6]), ((4, 2), (2, 4)))
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qll.errors import ConfigError, QLLError, UsageError
from qll.tn.entropy import (
    channel_spectrum,
    max_entropy,
    participation_ratio,
    random_entropy,
    random_purity,
    renyi,
    site_spectra,
    stable_rank,
    von_neumann,
)
from qll.tn.joint_channels import JointChannels
from qll.tn.joint_query_key import JointQueryKey
from qll.tn.joint_tree import JointTree
from qll.tn.joint_tucker import JointTucker
from qll.tn.joint_value_output import JointValueOutput
from qll.tn.kron import KroneckerSum
from qll.tn.lowrank import LowRank
from qll.tn.modes import default_modes
from qll.tn.mpo import MPO
from qll.tn.network import GAUGES, MatrixNetwork, NetworkSpec, TensorShapes
from qll.tn.panels import Panels, default_panels
from qll.tn.sparse import Sparse
from qll.tn.svd import SVD, discarded_weight, rank_for, singular_values, truncated_svd
from qll.tn.sweep import tensor_train
from qll.tn.tree import Tree
from qll.tn.tucker import Tucker

__all__ = [
    "GAUGES",
    "JOINTS",
    "MPO",
    "NETWORKS",
    "SVD",
    "JointChannels",
    "JointNetwork",
    "JointQueryKey",
    "JointTree",
    "JointTucker",
    "JointValueOutput",
    "KroneckerSum",
    "LowRank",
    "MatrixNetwork",
    "NetworkSpec",
    "Panels",
    "Sparse",
    "TensorShapes",
    "Tree",
    "Tucker",
    "build",
    "channel_spectrum",
    "default_modes",
    "default_panels",
    "discarded_weight",
    "max_entropy",
    "participation_ratio",
    "random_entropy",
    "random_purity",
    "rank_for",
    "renyi",
    "require_valid",
    "singular_values",
    "site_spectra",
    "stable_rank",
    "tensor_shapes",
    "tensor_train",
    "truncated_svd",
    "von_neumann",
]

NETWORKS: dict[str, type] = {
    network.name: network for network in (LowRank, MPO, Tucker, Tree, KroneckerSum, Panels, Sparse)
}
JOINTS: dict[str, type] = {
    network.name: network
    for network in (JointTree, JointTucker, JointChannels, JointValueOutput, JointQueryKey)
}
_ALL = NETWORKS | JOINTS
JointNetwork = JointTree | JointTucker | JointChannels | JointValueOutput | JointQueryKey


def build(
    spec: NetworkSpec, cores: Sequence[Tensor], indices: Sequence[Tensor] = ()
) -> MatrixNetwork | JointNetwork:
    """The network of `spec` around these tensors, neither copied nor checked: cheap per forward.

    Raises UsageError for an unknown format.

    >>> import torch
    >>> spec = NetworkSpec("lowrank", (1, 1), (1,))
    >>> build(spec, [torch.ones(1, 1), torch.ones(1, 1)]).to_matrix().tolist()
    [[1.0]]
    """
    return _network(spec)(spec, tuple(cores), tuple(indices))


def tensor_shapes(spec: NetworkSpec) -> TensorShapes:
    """Shapes of the tensors that `spec` stores, from integers alone.

    >>> tensor_shapes(NetworkSpec("lowrank", (6, 4), (2,))).num_params
    20
    """
    return _network(spec).tensor_shapes(spec)


def require_valid(spec: NetworkSpec, where: object) -> None:
    """Raise ConfigError unless `spec`, read from a file, is one that can have tensors.

    Sizes must be positive integers and every rank at most what its neighbours allow, so that no
    spec asks for more memory than the matrix it stands for could need.

    >>> require_valid(NetworkSpec("lowrank", (6, 4), (5,)), "plan.json")
    Traceback (most recent call last):
    ...
    qll.errors.ConfigError: plan.json: impossible ranks (expected at most (4,), found (5,))
    """
    sizes = (spec.shape, spec.ranks, *spec.modes.values(), *spec.members)
    whole = all(type(size) is int and size > 0 for group in sizes for size in group)
    if not whole or len(spec.shape) != 2 or spec.gauge not in GAUGES:
        raise ConfigError(
            "not the spec of a tensor network",
            where=where,
            expected=f"positive sizes, two in shape, and a gauge of {', '.join(GAUGES)}",
            found=spec.to_json(),
        )
    try:
        possible = _network(spec).clamp(spec).ranks
    except (QLLError, KeyError, IndexError, TypeError, ValueError) as error:
        what = f"modes or ranks do not belong to the format {spec.format}"
        raise ConfigError(what, where=where, found=error) from None
    if possible != spec.ranks:
        raise ConfigError(
            "impossible ranks", where=where, expected=f"at most {possible}", found=spec.ranks
        )


def _network(spec: NetworkSpec) -> type:
    try:
        return _ALL[spec.format]
    except KeyError:
        raise UsageError(
            "no such tensor network", expected=sorted(_ALL), found=spec.format
        ) from None
