"""JointTree: exactness, gauge, counts, error identities, application."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch

from qll.errors import ShapeError, UsageError
from qll.tn.joint_tree import JointTree
from qll.tn.network import NetworkSpec

SHAPES = {
    "wide": ((5, 24), (3, 24), (4, 24)),  # the outputs together are fewer than the input
    "tall": ((20, 12), (7, 12), (15, 12)),  # more
}
RANKS = {
    "wide": [(12, 5, 3, 4), (6, 4, 3, 2), (5, 5, 3, 4), (4, 1, 2, 1), (1, 1, 1, 1)],
    "tall": [(12, 12, 7, 12), (8, 8, 7, 8), (8, 3, 7, 5), (6, 2, 2, 2), (12, 4, 6, 2)],
}
CASES = [(name, ranks) for name, options in RANKS.items() for ranks in options]


def matrices_of(name: str, dtype: torch.dtype = torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in SHAPES[name]
    ]


def spec_of(name: str, ranks: tuple[int, ...]) -> NetworkSpec:
    members = SHAPES[name]
    shape = (sum(out for out, _ in members), members[0][1])
    return NetworkSpec("joint_tree", shape, ranks, members=members)


@functools.cache  # networks are immutable
def tree_of(name: str, ranks: tuple[int, ...], dtype: torch.dtype = torch.float64) -> JointTree:
    return JointTree.decompose(matrices_of(name, dtype), spec_of(name, ranks))


def dense(tree: JointTree) -> torch.Tensor:
    return torch.cat([tree.to_matrix(j) for j in range(tree.members)])


@pytest.mark.parametrize("name", SHAPES)
def test_full_ranks_are_exact_and_cost_what_the_dense_matrices_cost(name):
    matrices = matrices_of(name)
    spec = spec_of(name, JointTree.max_ranks(spec_of(name, ())))
    tree = JointTree.decompose(matrices, spec).interpolate()
    torch.testing.assert_close(dense(tree), torch.cat(matrices), rtol=0, atol=1e-10)
    assert tree.num_floats == sum(out * into for out, into in SHAPES[name])


@pytest.mark.parametrize(("name", "ranks"), CASES)
def test_the_gauge_saves_the_square_of_every_bond_and_changes_nothing(name, ranks):
    tree = tree_of(name, ranks)
    fixed = tree.interpolate()
    torch.testing.assert_close(dense(fixed), dense(tree), rtol=0, atol=1e-10)
    torch.testing.assert_close(dense(fixed.expand()), dense(tree), rtol=0, atol=1e-10)
    members = zip(SHAPES[name], ranks[1:], strict=True)
    bonds = [ranks[0], *(r for (out, _), r in members if r < min(out, ranks[0]))]
    assert tree.num_params - fixed.num_floats == sum(bond**2 for bond in bonds)
    assert fixed.num_params - fixed.num_floats == sum(bonds)
    assert all(core.abs().max() <= 2 + 1e-9 for core in fixed.cores[1:] if core.numel())


@pytest.mark.parametrize(("name", "ranks"), CASES)
@pytest.mark.parametrize("gauge", ["none", "interpolative"])
def test_shapes_are_known_before_the_data(name, ranks, gauge):
    for seed in range(3):
        tree = JointTree.decompose(matrices_of(name, seed=seed), spec_of(name, ranks))
        tree = tree.interpolate() if gauge == "interpolative" else tree
        shapes = JointTree.tensor_shapes(spec_of(name, ranks).with_gauge(gauge))
        assert tree.spec.gauge == gauge
        assert tuple(tuple(core.shape) for core in tree.cores) == shapes.cores
        assert tuple(tuple(index.shape) for index in tree.indices) == shapes.indices
        assert tree.num_params == shapes.num_params


def test_pivots_may_all_come_from_one_member():
    loud, silent = torch.randn(9, 6, dtype=torch.float64), torch.zeros(4, 6, dtype=torch.float64)
    for matrices in ([loud, silent], [silent, loud]):
        members = tuple(tuple(matrix.shape) for matrix in matrices)
        ranks = JointTree.clamp(NetworkSpec("joint_tree", (13, 6), (6, 9, 9), members=members))
        tree = JointTree.decompose(matrices, ranks).interpolate()
        for member, matrix in enumerate(matrices):
            torch.testing.assert_close(tree.to_matrix(member), matrix, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "ranks"), CASES)
def test_squared_error_is_the_sum_of_the_discarded_tails(name, ranks):
    matrices, spec = matrices_of(name), spec_of(name, ranks)
    tree = JointTree.decompose(matrices, spec)
    stacked = torch.cat(matrices)
    _, sigma, vh = torch.linalg.svd(stacked, full_matrices=False)
    lost = sigma[ranks[0] :].square().sum()
    for matrix, rank in zip(matrices, ranks[1:], strict=True):
        inner = torch.linalg.svdvals(matrix @ vh[: ranks[0]].mT)
        lost = lost + inner[rank:].square().sum()
    error = (dense(tree) - stacked).square().sum()
    torch.testing.assert_close(error, lost, rtol=1e-9, atol=1e-18 + 1e-20)
    spectra = JointTree.cut_spectra(matrices, spec)
    tails = [s[r:].square().sum() for s, r in zip(spectra, ranks, strict=True)]
    assert error <= sum(tails) * (1 + 1e-9) + 1e-18
    assert error >= max(tails) * (1 - 1e-9)


def test_bond_spectra_are_those_of_the_dense_unfoldings():
    name, ranks = "tall", (8, 3, 7, 5)
    tree = tree_of(name, ranks)
    for network in (tree, tree.interpolate()):
        matrices = [dense(tree), *(tree.to_matrix(j) for j in range(3))]
        for k, matrix in enumerate(matrices):
            found = network.bond_spectrum(k)
            sigma = torch.linalg.svdvals(matrix)[: len(found)]
            torch.testing.assert_close(found, sigma, rtol=0, atol=1e-7)
            weights = sigma[sigma > 1e-9].square() / sigma.square().sum()
            assert network.entropy(k) == pytest.approx(-(weights * weights.log()).sum().item())
    full = JointTree.cut_spectra(matrices_of(name), spec_of(name, ranks))
    torch.testing.assert_close(full[2], torch.linalg.svdvals(matrices_of(name)[1]))


@pytest.mark.parametrize(("name", "ranks"), CASES)
def test_apply_is_the_matrix_with_and_without_the_shared_part(name, ranks):
    tree = tree_of(name, ranks)
    for network in (tree, tree.interpolate()):
        for tokens in (1, 7, 64):
            x = torch.randn(tokens, SHAPES[name][0][1], dtype=torch.float64)
            shared = network.project(x)
            for member in range(3):
                expected = x @ network.to_matrix(member).mT
                torch.testing.assert_close(network.apply(x, member), expected)
                torch.testing.assert_close(network.apply(x, member, shared=shared), expected)
        for member in range(3):
            ids = torch.tensor([[0, 2], [1, 0]])
            torch.testing.assert_close(
                network.rows(ids, member), network.to_matrix(member)[ids], rtol=0, atol=1e-12
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_apply_in_storage_precision_has_gradients_everywhere(dtype):
    tree = tree_of("tall", (8, 3, 7, 5), torch.float32)
    fixed = tree.interpolate()
    cores = tuple(core.to(dtype).requires_grad_() for core in fixed.cores)
    network = JointTree(fixed.spec, cores, tuple(index.int() for index in fixed.indices))
    x = torch.randn(2, 5, 12).to(dtype)
    shared = network.project(x)
    outputs = [network.apply(x, member, shared=shared) for member in range(3)]
    assert [tuple(y.shape) for y in outputs] == [(2, 5, 20), (2, 5, 7), (2, 5, 15)]
    sum(y.float().square().sum() for y in outputs).backward()
    assert all(core.grad is not None and core.grad.abs().sum() > 0 for core in cores)
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}[dtype]
    for member, y in enumerate(outputs):
        exact = x.double() @ tree.to_matrix(member).double().mT
        assert (y - exact).abs().max() < tolerance * exact.abs().max()


def test_transform_legs_multiplies_members_and_input():
    tree = tree_of("tall", (8, 3, 7, 5))
    left, right = torch.randn(20, 20).double(), torch.randn(12, 12).double()
    for network in (tree, tree.interpolate()):
        moved = network.transform_legs(out=[left, None, None], into=[right])
        torch.testing.assert_close(moved.to_matrix(0), left @ tree.to_matrix(0) @ right)
        torch.testing.assert_close(moved.to_matrix(1), tree.to_matrix(1) @ right)
        still = network.transform_legs(out=[None] * 3, into=[None])
        torch.testing.assert_close(dense(still), dense(tree))


@pytest.mark.parametrize("rtol", [1e-6, 0.05, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gauge", ["none", "interpolative"])
def test_rounding_stays_within_its_tolerance(rtol, dtype, gauge):
    for name in SHAPES:
        full = JointTree.max_ranks(spec_of(name, ()))
        tree = tree_of(name, full, dtype)
        tree = tree.interpolate() if gauge == "interpolative" else tree
        rounded = tree.round(rtol=rtol)
        assert rounded.spec.gauge == gauge
        error = torch.linalg.vector_norm(dense(rounded) - dense(tree))
        assert error <= (rtol * (1 + 1e-6) + 1e-6) * torch.linalg.vector_norm(dense(tree))
        assert JointTree.clamp(rounded.spec).ranks == rounded.spec.ranks
        if rtol > 0.5:
            assert rounded.num_params < tree.num_params


def test_rounding_to_ranks_is_the_decomposition_at_those_ranks():
    matrices = matrices_of("tall")
    full = JointTree.decompose(matrices, spec_of("tall", (12, 12, 7, 12)))
    for ranks in RANKS["tall"]:
        direct = JointTree.decompose(matrices, spec_of("tall", ranks))
        torch.testing.assert_close(dense(full.round(ranks=ranks)), dense(direct))
    small = JointTree.decompose(matrices, spec_of("tall", (8, 3, 7, 5)))
    again = small.round(ranks=(12, 12, 7, 12))
    assert again.spec.ranks == (8, 3, 7, 5)
    torch.testing.assert_close(dense(again), dense(small))


def test_rounding_finds_a_planted_tree():
    generator = torch.Generator().manual_seed(1)
    basis = torch.randn(4, 12, generator=generator, dtype=torch.float64)
    planted = [
        torch.randn(20, 2, generator=generator, dtype=torch.float64)
        @ torch.randn(2, 4, generator=generator, dtype=torch.float64)
        @ basis,
        torch.randn(7, 4, generator=generator, dtype=torch.float64) @ basis,
        torch.randn(15, 1, generator=generator, dtype=torch.float64)
        @ torch.randn(1, 4, generator=generator, dtype=torch.float64)
        @ basis,
    ]
    tree = JointTree.decompose(planted, spec_of("tall", (12, 12, 7, 12))).round(rtol=1e-7)
    assert tree.spec.ranks == (4, 2, 4, 1)


def test_clamp_is_a_fixed_point_that_respects_the_neighbours():
    for asked in [(99, 99, 99, 99), (12, 1, 1, 1), (2, 9, 9, 9), (0, 0, -3, 5)]:
        spec = JointTree.clamp(spec_of("tall", asked))
        shared, *own = spec.ranks
        assert min(spec.ranks) >= 1
        assert shared <= min(12, sum(own))
        assert all(r <= min(out, shared) for r, (out, _) in zip(own, spec.members, strict=True))
        assert JointTree.clamp(spec) == spec


def test_flops_count_every_stored_number_once_per_token():
    tree = tree_of("tall", (8, 3, 7, 5)).interpolate()
    assert tree.flops(10) == 2 * 10 * sum(math.prod(core.shape) for core in tree.cores)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ranks": (12, 13, 7, 12)}, "clamp"),
        ({"ranks": (12, 1, 1, 1)}, "clamp"),
        ({"ranks": (12, 12)}, "one rank for the shared bond"),
        ({"gauge": "left"}, "gauge"),
        ({"shape": (41, 12)}, "outputs add up"),
        ({"members": ((20, 12), (7, 12), (15, 11))}, "share one input"),
        ({"members": ()}, "share one input"),
    ],
)
def test_specs_that_cannot_be_are_refused(change, words):
    spec = replace(spec_of("tall", (8, 8, 7, 8)), **change)
    with pytest.raises(UsageError, match=words):
        JointTree.tensor_shapes(spec)


def test_decompose_clamps_ranks_and_refuses_members_that_do_not_fit():
    tree = JointTree.decompose(matrices_of("tall"), spec_of("tall", (99, 2, 99, 1)))
    assert tree.spec.ranks == (10, 2, 7, 1)
    JointTree.tensor_shapes(tree.spec)
    spec = replace(spec_of("tall", (8, 8, 7, 8)), shape=(41, 12))
    with pytest.raises(UsageError, match="outputs add up"):
        JointTree.decompose(matrices_of("tall"), spec)


def test_matrices_that_are_not_the_members_are_refused():
    with pytest.raises(ShapeError, match="members"):
        JointTree.decompose(matrices_of("tall")[:2], spec_of("tall", (8, 8, 7, 8)))
    tree = JointTree.decompose(matrices_of("tall"), spec_of("tall", (8, 8, 7, 8)))
    with pytest.raises(UsageError, match="tolerance or ranks"):
        tree.round()
