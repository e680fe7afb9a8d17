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

from qll.errors import UsageError
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
from qll.tn.joint_tree import JointTree
from qll.tn.joint_tucker import JointTucker
from qll.tn.kron import KroneckerSum
from qll.tn.lowrank import LowRank
from qll.tn.modes import default_modes
from qll.tn.mpo import MPO
from qll.tn.network import GAUGES, MatrixNetwork, NetworkSpec, TensorShapes
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
    "JointTree",
    "JointTucker",
    "KroneckerSum",
    "LowRank",
    "MatrixNetwork",
    "NetworkSpec",
    "TensorShapes",
    "Tree",
    "Tucker",
    "build",
    "channel_spectrum",
    "default_modes",
    "discarded_weight",
    "max_entropy",
    "participation_ratio",
    "random_entropy",
    "random_purity",
    "rank_for",
    "renyi",
    "singular_values",
    "site_spectra",
    "stable_rank",
    "tensor_shapes",
    "tensor_train",
    "truncated_svd",
    "von_neumann",
]

NETWORKS: dict[str, type] = {
    network.name: network for network in (LowRank, MPO, Tucker, Tree, KroneckerSum)
}
JOINTS: dict[str, type] = {network.name: network for network in (JointTree, JointTucker)}
_ALL = NETWORKS | JOINTS


def build(
    spec: NetworkSpec, cores: Sequence[Tensor], indices: Sequence[Tensor] = ()
) -> MatrixNetwork | JointTree | JointTucker:
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


def _network(spec: NetworkSpec) -> type:
    try:
        return _ALL[spec.format]
    except KeyError:
        raise UsageError(
            "no such tensor network", expected=sorted(_ALL), found=spec.format
        ) from None
