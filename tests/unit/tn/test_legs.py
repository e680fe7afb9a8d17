"""The steps on one leg: subspaces against the SVD, stored factors against dense ones."""

from __future__ import annotations

import pytest
import torch

from qll.errors import NonFiniteError
from qll.tn.gauge import interpolative
from qll.tn.joint_tree import JointTree
from qll.tn.legs import leading_basis, lookup, multiply, onto_bond, onto_leg, unfold
from qll.tn.network import NetworkSpec
from qll.tn.topology import last_bond, leaves, nodes
from qll.tn.tree import Tree
from qll.tn.tucker import Tucker


@pytest.mark.parametrize("shape", [(7, 30), (30, 7), (9, 9)])
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_leading_basis_spans_the_leading_singular_vectors(shape, rank):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    basis = leading_basis(matrix, rank)
    u = torch.linalg.svd(matrix, full_matrices=False).U[:, :rank]
    torch.testing.assert_close(basis @ basis.mT, u @ u.mT)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(rank, dtype=torch.float64))


def test_leading_basis_of_a_deficient_matrix_stays_orthonormal():
    matrix = torch.ones(20, 6, dtype=torch.float64)
    basis = leading_basis(matrix, 5)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(basis @ basis.mT @ matrix, matrix)


@pytest.mark.parametrize("rows", [5, 12])
def test_a_stored_factor_acts_as_the_dense_one(rows):
    factor = torch.linalg.qr(torch.randn(rows, 5, dtype=torch.float64)).Q
    rest, pivots = interpolative(factor)
    dense = factor @ torch.linalg.inv(factor[pivots])
    x, bond = torch.randn(2, 3, rows).double(), torch.randn(2, 3, 5).double()
    ids = torch.tensor([[0, rows - 1], [2, 2]])
    for stored, index in ((rest, pivots), (dense, None)):
        torch.testing.assert_close(lookup(stored, index, ids), dense[ids])
        torch.testing.assert_close(onto_bond(x, stored, index), x @ dense)
        torch.testing.assert_close(onto_leg(bond, stored, index), bond @ dense.mT)


def test_multiply_acts_on_its_unfolding():
    tensor, matrix = torch.randn(2, 3, 4).double(), torch.randn(6, 3).double()
    torch.testing.assert_close(unfold(multiply(tensor, 1, matrix), 1), matrix @ unfold(tensor, 1))


@pytest.mark.parametrize("sites", range(2, 13))
def test_every_bond_of_a_tree_is_wired_once_and_leads_to_the_sink(sites):
    tree = nodes(sites)
    assert len(tree) == 2 * sites - 2
    assert [tree[position].first for position in leaves(sites)] == list(range(sites))
    ends = [(node.parent, node.leg) for node in tree[:-1]]
    assert len(set(ends)) == 2 * sites - 3
    assert all(parent > k for k, (parent, _) in enumerate(ends))
    assert ends[last_bond(sites, len(tree) - 1)] == (len(tree) - 1, 2)
    depth = max(node.last - node.first for node in tree[:-1])
    assert depth <= (sites + 1) // 2


def test_nan_is_refused_by_every_format():
    bad = torch.full((4, 4), float("nan"))
    with pytest.raises(NonFiniteError, match="NaN"):
        Tree.decompose(bad, NetworkSpec("tree", (4, 4), (2,), {"out": (2, 2), "in": (2, 2)}))
    with pytest.raises(NonFiniteError, match="NaN"):
        Tucker.decompose(bad, NetworkSpec("tucker", (4, 4), (2, 2, 2), {"stack": (2, 2, 4)}))
    spec = NetworkSpec("joint_tree", (4, 4), (4, 4), members=((4, 4),))
    with pytest.raises(NonFiniteError, match="NaN"):
        JointTree.decompose([bad], spec)
