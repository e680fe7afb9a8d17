"""Nested cuts against cutting at every rank by hand, in any metric."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qll.convert.metric import Metric, factor
from qll.lens.critical import NestedCuts, rank_at
from qll.tn import LowRank, tensor_shapes
from qll.tn.network import NetworkSpec


def noise(*shape, seed=0):
    hand = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=hand, dtype=torch.float64)


def moment(size, seed):
    root = noise(size, size, seed=seed)
    return root @ root.mT + 0.1 * torch.eye(size, dtype=torch.float64)


METRICS = {
    "plain": Metric("plain"),
    "activation": Metric("activation", right=moment(7, 1)),
    "kfac": Metric("kfac", left=moment(9, 2), right=moment(7, 3)),
    "diagonal": Metric("activation", left=noise(9, seed=4).abs() + 0.1),
}


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize("side", ["read", "write"])
def test_every_rank_in_one_pass(metric, side):
    matrix, directions = noise(9, 7, seed=5), noise(4, 7 if side == "read" else 9, seed=6)
    cuts = NestedCuts(matrix, metric)
    found, critical = cuts.survival(directions, side), cuts.critical_bond(directions, side)
    seen, roots = (
        matrix,
        [None if part is None else factor(part) for part in (metric.left, metric.right)],
    )
    full = [torch.eye(size, dtype=torch.float64) for size in (9, 7)]
    left, right = (
        eye if root is None else (torch.diag(root.root) if root.root.ndim == 1 else root.root)
        for root, eye in zip(roots, full, strict=True)
    )
    u, s, vh = torch.linalg.svd(left.mT @ seen @ right, full_matrices=False)
    for rank in range(8):
        cut = u[:, :rank] * s[:rank] @ vh[:rank]
        cut = torch.linalg.inv(left.mT) @ cut @ torch.linalg.inv(right)
        before, after = (directions @ (w.mT if side == "read" else w) for w in (matrix, cut))
        expected = 1 - (after - before).square().sum(1) / before.square().sum(1)
        torch.testing.assert_close(found[:, rank], expected, rtol=1e-7, atol=1e-7)
    for rho, least in zip(found, critical.tolist(), strict=True):
        assert (rho[least:] >= 0.9).all()
        assert least == 0 or rho[least - 1] < 0.9


def test_directions_a_matrix_is_blind_to():
    matrix = torch.diag(torch.tensor([1.0, 0.0]))
    cuts = NestedCuts(matrix, Metric("plain"))
    assert cuts.critical_bond(torch.eye(2), "read").tolist() == [1, -1]


@settings(deadline=None, max_examples=30)
@given(st.floats(0.01, 0.99), st.integers(1, 40), st.integers(1, 40))
def test_rank_at_spends_what_the_network_stores(keep, out, into):
    def stored(rank):
        spec = NetworkSpec("lowrank", (out, into), (rank,), gauge="interpolative")
        return tensor_shapes(LowRank.clamp(spec)).num_params

    rank = rank_at(keep, out, into)
    assert rank == 0 or stored(rank) <= keep * out * into
    assert rank == min(out, into) or stored(rank + 1) > keep * out * into
