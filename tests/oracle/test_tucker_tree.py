"""Tucker, Tree and the joint formats against tensorly, quimb and plain numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qll.tn.joint_tree import JointTree
from qll.tn.joint_tucker import JointTucker
from qll.tn.network import NetworkSpec
from qll.tn.tree import Tree
from qll.tn.tucker import Tucker

pytestmark = pytest.mark.oracle


def smooth(*shape: int, noise: float = 0.02) -> torch.Tensor:
    """A smooth kernel with noise: spectra decay, as those of a trained weight do."""
    grids = torch.meshgrid(*(torch.linspace(0, 1, n).double() for n in shape), indexing="ij")
    distance = sum((k + 1) * grid for k, grid in enumerate(grids))
    generator = torch.Generator().manual_seed(0)
    return (
        torch.cos(3 * distance)
        + torch.exp(-distance.square())
        + noise * torch.randn(shape, generator=generator, dtype=torch.float64)
    )


def numpy_hosvd(tensor: np.ndarray, ranks: tuple[int, ...]) -> np.ndarray:
    """Truncated multilinear SVD, every factor from the tensor itself."""
    result = tensor
    for leg, rank in enumerate(ranks):
        unfolded = np.moveaxis(tensor, leg, 0).reshape(tensor.shape[leg], -1)
        u = np.linalg.svd(unfolded, full_matrices=False)[0][:, :rank]
        result = np.moveaxis(np.tensordot(u @ u.T, result, axes=(1, leg)), 0, leg)
    return result


@pytest.mark.parametrize(
    ("stack", "ranks"), [((9, 8, 20), (3, 4, 5)), ((4, 6, 5, 7), (2, 3, 3, 2))]
)
def test_tucker_is_as_good_as_tensorly_hooi_and_better_than_hosvd(stack, ranks):
    from tensorly import set_backend, tucker_to_tensor
    from tensorly.decomposition import tucker

    set_backend("numpy")
    tensor = smooth(*stack, noise=0.3)
    rows = math.prod(stack[:2])
    spec = NetworkSpec("tucker", (rows, tensor.numel() // rows), ranks, {"stack": stack})
    network = Tucker.decompose(tensor.reshape(rows, -1), spec, sweeps=100)
    ours = (network.to_matrix().reshape(stack) - tensor).norm().item()
    theirs = tucker(tensor.numpy(), rank=list(ranks), n_iter_max=100, tol=1e-9, init="svd")
    error = np.linalg.norm(tucker_to_tensor(theirs) - tensor.numpy())
    hosvd = np.linalg.norm(numpy_hosvd(tensor.numpy(), ranks) - tensor.numpy())
    assert ours == pytest.approx(error, rel=1e-4)
    assert ours <= hosvd * (1 + 1e-12)


def test_tucker_cores_contract_as_tensorly_contracts_them():
    from tensorly import set_backend, tucker_to_tensor

    set_backend("numpy")
    spec = NetworkSpec("tucker", (12, 30), (2, 3, 4, 3), {"stack": (3, 4, 5, 6)})
    network = Tucker.decompose(smooth(12, 30), spec)
    core, *factors = (part.numpy() for part in network.cores)
    dense = tucker_to_tensor((core, factors)).reshape(12, 30)
    np.testing.assert_allclose(network.to_matrix().numpy(), dense, atol=1e-12)


def quimb_tree(network: Tree):
    """The stored cores as a quimb network, its wiring written out for four sites."""
    import quimb.tensor as qtn

    wires = [
        ("o0", "i0", "b0"),
        ("o1", "i1", "b1"),
        ("b0", "b1", "b2"),
        ("o2", "i2", "b3"),
        ("o3", "i3", "b4"),
        ("b3", "b4", "b2"),
    ]
    tensors = [
        qtn.Tensor(core.numpy(), inds=inds) for core, inds in zip(network.cores, wires, strict=True)
    ]
    return qtn.TensorNetwork(tensors)


def test_tree_contracts_and_entangles_as_quimb_says():
    modes = {"out": (3, 2, 4, 2), "in": (2, 4, 3, 2)}
    spec = NetworkSpec("tree", (48, 48), (4, 5, 6, 5, 3), modes)
    network = Tree.decompose(smooth(48, 48, noise=0.3), spec)
    tensor = quimb_tree(network).contract(
        output_inds=[f"{side}{site}" for side in "oi" for site in range(4)]
    )
    np.testing.assert_allclose(network.to_matrix().numpy(), tensor.data.reshape(48, 48), atol=1e-11)
    below = [(0,), (1,), (0, 1), (2,), (3,)]
    for k, sites in enumerate(below):
        left = [f"{side}{site}" for site in sites for side in "oi"]
        found = tensor.singular_values(left_inds=left)[: spec.ranks[k]]
        np.testing.assert_allclose(network.bond_spectrum(k).numpy(), found, atol=1e-7)
        weights = found**2 / np.sum(found**2)
        entropy = -np.sum(weights * np.log(weights))
        assert network.entropy(k) == pytest.approx(entropy, abs=1e-8)


def test_star_is_the_truncated_svd_of_the_stack():
    outs, into, rank = (14, 9, 12), 20, 6
    matrices = [smooth(out, into, noise=0.2 + j) for j, out in enumerate(outs)]
    members = tuple((out, into) for out in outs)
    ranks = (rank, rank, rank, rank)
    spec = NetworkSpec("joint_tree", (sum(outs), into), ranks, members=members)
    tree = JointTree.decompose(matrices, spec)
    u, s, vh = np.linalg.svd(torch.cat(matrices).numpy(), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    ours = np.concatenate([tree.to_matrix(j).numpy() for j in range(3)])
    np.testing.assert_allclose(ours, best, atol=1e-9)


def test_joint_tucker_is_tensorly_partial_tucker_of_the_stacked_heads():
    from tensorly import set_backend
    from tensorly.decomposition import partial_tucker
    from tensorly.tenalg import multi_mode_dot

    set_backend("numpy")
    heads, size, model = (3, 1, 1, 3), 4, 16
    stack = smooth(8, size, model, noise=0.3)
    pieces = stack.split(heads)
    matrices = [piece.reshape(-1, model) for piece in pieces]
    matrices[3] = matrices[3].mT
    spec = NetworkSpec(
        "joint_tucker",
        (12 + 4 + 4 + 16, model),
        (8, 3, 5),  # heads untouched, so that tensorly may leave that leg alone
        {"heads": heads, "d_head": (size,), "d_model": (model,)},
        members=((12, 16), (4, 16), (4, 16), (16, 12)),
    )
    network = JointTucker.decompose(matrices, spec, sweeps=100)
    (core, factors), _ = partial_tucker(
        stack.numpy(), rank=[3, 5], modes=[1, 2], n_iter_max=100, tol=1e-9
    )
    dense = multi_mode_dot(core, factors, modes=[1, 2])
    ours = [network.to_matrix(j) for j in range(4)]
    ours[3] = ours[3].mT
    error = (torch.cat(ours).reshape(stack.shape) - stack).norm().item()
    assert error == pytest.approx(np.linalg.norm(dense - stack.numpy()), rel=1e-4)
