"""Tree: exactness, gauge, counts, error identity and bound, spectra, application, padding."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch

from qll.errors import ShapeError, UsageError
from qll.tn.network import NetworkSpec
from qll.tn.tree import Tree

# out modes, in modes, shape (None: exactly the modes), ranks
CASES = [
    ((4, 6), (3, 5), None, (7,)),
    ((2, 3, 4), (3, 2, 2), None, (4, 3, 5)),
    ((3, 2, 2, 2), (2, 2, 3, 2), None, (4, 3, 5, 4, 3)),
    ((3, 2, 2, 2), (2, 2, 3, 2), (23, 20), (5, 3, 6, 6, 4)),  # padded rows and columns
    ((2,) * 5, (2,) * 5, None, (3, 3, 4, 2, 5, 3, 3)),
    ((2,) * 5, (2,) * 5, None, (1,) * 7),
    ((10, 2, 1), (10, 1, 2), (20, 19), (4, 2, 4)),  # one leaf larger than all the others together
]


def spec_of(case) -> NetworkSpec:
    out, into, shape, ranks = case
    shape = shape or (math.prod(out), math.prod(into))
    return NetworkSpec("tree", shape, ranks, {"out": out, "in": into})


def matrix_of(case, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(spec_of(case).shape, generator=generator, dtype=torch.float64).to(dtype)


@functools.cache  # networks are immutable
def network_of(case, dtype=torch.float64, full: bool = False) -> Tree:
    spec = spec_of(case)
    spec = spec.with_ranks(Tree.max_ranks(spec)) if full else spec
    return Tree.decompose(matrix_of(case, dtype), spec)


def dense_cuts(matrix: torch.Tensor, spec: NetworkSpec) -> list[torch.Tensor]:
    """Unfoldings by the sites below every bond, written out by hand for 2 to 5 sites."""
    out, into = spec.modes["out"], spec.modes["in"]
    padded = torch.zeros(math.prod(out), math.prod(into), dtype=matrix.dtype)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    below = {
        2: [(0,)],
        3: [(0,), (1,), (0, 1)],
        4: [(0,), (1,), (0, 1), (2,), (3,)],
        5: [(0,), (1,), (0, 1), (2,), (0, 1, 2), (3,), (4,)],
    }[len(out)]
    tensor = padded.reshape(*out, *into)
    sites = len(out)
    cuts = []
    for inside in below:
        outside = [site for site in range(sites) if site not in inside]
        order = [leg for group in (inside, outside) for s in group for leg in (s, s + sites)]
        rows = math.prod(out[site] * into[site] for site in inside)
        cuts.append(tensor.permute(order).reshape(rows, -1))
    return cuts


@pytest.mark.parametrize("case", CASES)
def test_full_ranks_are_exact_and_cost_what_the_dense_matrix_costs(case):
    network = network_of(case, full=True).interpolate()
    torch.testing.assert_close(network.to_matrix(), matrix_of(case), rtol=0, atol=1e-10)
    assert network.num_floats == math.prod(case[0]) * math.prod(case[1])


@pytest.mark.parametrize("case", CASES)
def test_the_gauge_saves_the_square_of_every_rank_and_changes_nothing(case):
    network = network_of(case)
    fixed = network.interpolate()
    torch.testing.assert_close(fixed.to_matrix(), network.to_matrix(), rtol=0, atol=1e-10)
    torch.testing.assert_close(fixed.expand().to_matrix(), network.to_matrix(), rtol=0, atol=1e-10)
    assert network.num_params - fixed.num_floats == sum(rank**2 for rank in network.spec.ranks)
    assert all(core.abs().max() <= 2 + 1e-9 for core in fixed.cores[:-1] if core.numel())
    for member in (network, fixed):
        shapes = Tree.tensor_shapes(member.spec)
        assert tuple(tuple(core.shape) for core in member.cores) == shapes.cores
        assert tuple(tuple(index.shape) for index in member.indices) == shapes.indices
        assert member.num_params == shapes.num_params


@pytest.mark.parametrize("case", CASES)
def test_the_error_is_what_the_sink_lacks_and_within_the_bound(case):
    matrix = matrix_of(case)
    network = Tree.decompose(matrix, spec_of(case))
    whole = dense_cuts(network.to_matrix(), spec_of(case))[0]
    error = (whole - dense_cuts(matrix, spec_of(case))[0]).square().sum()
    for core in network.cores[:-1]:
        gram = core.flatten(0, 1).mT @ core.flatten(0, 1)
        torch.testing.assert_close(gram, torch.eye(core.shape[-1], dtype=torch.float64))
    if case[2] is None:  # unpadding drops the part of the error outside of the matrix
        lost = matrix.square().sum() - network.cores[-1].square().sum()
        torch.testing.assert_close(error, lost, rtol=1e-8, atol=1e-9)
    spectra = Tree.cut_spectra(matrix, spec_of(case))
    tails = [s[r:].square().sum() for s, r in zip(spectra, network.spec.ranks, strict=True)]
    assert error <= sum(tails) * (1 + 1e-9) + 1e-9
    if case[2] is None:  # max(tails) is what the best tree of these ranks must lose
        assert error >= max(tails) * (1 - 1e-9) - 1e-9
        assert error <= (2 * len(case[0]) - 3) * max(tails) * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("case", CASES)
def test_bond_spectra_are_those_of_the_dense_unfoldings(case):
    spec = spec_of(case)
    dense = Tree.cut_spectra(matrix_of(case), spec)
    for found, cut in zip(dense, dense_cuts(matrix_of(case), spec), strict=True):
        torch.testing.assert_close(found, torch.linalg.svdvals(cut), rtol=0, atol=1e-7)
    if case[2] is not None:
        return
    network = Tree.decompose(matrix_of(case), spec)
    for k, cut in enumerate(dense_cuts(network.to_matrix(), spec)):
        sigma = torch.linalg.svdvals(cut)[: network.spec.ranks[k]]
        for member in (network, network.interpolate()):
            found = member.bond_spectrum(k)[: len(sigma)]
            torch.testing.assert_close(found, sigma, rtol=0, atol=1e-7)
        weights = sigma.square() / sigma.square().sum()
        entropy = -(weights * weights.log()).sum().item()
        assert network.entropy(k) == pytest.approx(entropy, abs=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_apply_and_rows_are_those_of_the_matrix(case):
    network = network_of(case)
    inputs = [
        torch.randn(tokens, spec_of(case).shape[1], dtype=torch.float64) for tokens in (1, 7, 64)
    ]
    ids = torch.randint(spec_of(case).shape[0], (2, 3))
    for member in (network, network.interpolate()):
        for x in inputs:
            torch.testing.assert_close(member.apply(x), x @ member.to_matrix().mT)
        torch.testing.assert_close(member.rows(ids), member.to_matrix()[ids], rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_apply_in_storage_precision_has_gradients_everywhere(dtype):
    network = network_of(CASES[3], torch.float32).interpolate()
    cores = tuple(core.to(dtype).requires_grad_() for core in network.cores)
    stored = Tree(network.spec, cores, tuple(index.int() for index in network.indices))
    x = torch.randn(2, 5, 20).to(dtype)
    y = stored.apply(x)
    y.float().square().sum().backward()
    assert y.dtype == dtype
    assert y.shape == (2, 5, 23)
    for core in cores:
        assert core.numel() == 0 or core.grad.abs().sum() > 0
    exact = x.double() @ network.to_matrix().double().mT
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}[dtype]
    assert (y - exact).abs().max() < tolerance * exact.abs().max()


def test_identity_is_a_product_operator_and_its_permutation_is_not():
    spec = NetworkSpec("tree", (16, 16), (4, 4, 16, 4, 4), {"out": (2,) * 4, "in": (2,) * 4})
    network = Tree.decompose(torch.eye(16, dtype=torch.float64), spec)
    assert [network.entropy(k) for k in range(5)] == pytest.approx([0.0] * 5, abs=1e-9)
    assert network.round(rtol=1e-7).spec.ranks == (1,) * 5
    shuffled = torch.eye(16, dtype=torch.float64)[torch.randperm(16)]
    assert max(Tree.decompose(shuffled, spec).entropy(k) for k in range(5)) > 0.1


@pytest.mark.parametrize("case", [CASES[1], CASES[2]])
def test_transform_legs_multiplies_each_leg(case):
    network = network_of(case)
    generator = torch.Generator().manual_seed(1)
    sides = [
        [torch.randn(size, size, generator=generator, dtype=torch.float64) for size in sizes]
        for sizes in case[:2]
    ]
    left, right = (list(itertools.accumulate(side, torch.kron))[-1] for side in sides)
    for member in (network, network.interpolate()):
        moved = member.transform_legs(*sides)
        assert moved.spec == member.spec
        torch.testing.assert_close(moved.to_matrix(), left @ network.to_matrix() @ right)
        none = [None] * len(case[0])
        torch.testing.assert_close(
            member.transform_legs(out=none, into=none).to_matrix(), network.to_matrix()
        )


@pytest.mark.parametrize("rtol", [1e-6, 0.2, 0.6, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_stays_within_its_tolerance(rtol, dtype):
    for case in (CASES[0], CASES[2], CASES[4]):
        network = network_of(case, dtype, full=True).interpolate()
        rounded = network.round(rtol=rtol)
        error = (rounded.to_matrix() - network.to_matrix()).norm()
        assert error <= (rtol * (1 + 1e-6) + 1e-6) * network.to_matrix().norm()
        assert rounded.spec.gauge == "interpolative"
        assert Tree.clamp(rounded.spec) == rounded.spec


def test_rounding_finds_planted_ranks_and_never_raises_them():
    case = CASES[2]
    planted = network_of(case)
    full = spec_of(case).with_ranks(Tree.max_ranks(spec_of(case)))
    network = Tree.decompose(planted.to_matrix(), full)
    assert network.round(rtol=1e-7).spec.ranks == planted.spec.ranks
    direct = Tree.decompose(planted.to_matrix(), spec_of(case).with_ranks((2, 2, 3, 2, 2)))
    rounded = planted.round(ranks=(2, 2, 3, 2, 2))
    torch.testing.assert_close(rounded.to_matrix(), direct.to_matrix())
    assert planted.round(ranks=full.ranks).spec.ranks == planted.spec.ranks


def test_clamp_is_a_fixed_point_that_respects_every_core():
    spec = spec_of(CASES[2])
    assert Tree.clamp(spec.with_ranks((99,) * 5)).ranks == Tree.max_ranks(spec)
    assert Tree.clamp(spec.with_ranks((1, 4, 9, 6, 4))).ranks == (1, 4, 4, 6, 4)
    assert Tree.clamp(spec.with_ranks((6, 4, 1, 6, 1))).ranks == (4, 4, 1, 1, 1)
    assert Tree.clamp(spec.with_ranks((0, 0, 0, 0, 0))).ranks == (1,) * 5


def test_flops_are_below_the_dense_ones_where_the_ranks_are_low():
    case = CASES[4]
    network = Tree.decompose(matrix_of(case), spec_of(case).with_ranks((1,) * 7))
    assert network.flops(1) < 2 * 32 * 32
    assert network.flops(64) <= 64 * network.flops(1)
    # a full network costs no more than rebuilding the matrix and applying it
    full = spec_of(case).with_ranks(Tree.max_ranks(spec_of(case)))
    heavy = Tree.decompose(matrix_of(case), full)
    assert heavy.flops(1 << 14) < 1.1 * (1 << 14) * 2 * 32 * 32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ranks": (99, 3, 5, 4, 3)}, "clamp"),
        ({"ranks": (4, 3)}, "2 d - 3 ranks"),
        ({"gauge": "left"}, "gauge"),
        ({"shape": (25, 24)}, "too small"),
        ({"modes": {"out": (24,), "in": (24,)}}, "between 2 and 12"),
        ({"modes": {"out": (6, 4), "in": (24,)}}, "equally many"),
    ],
)
def test_specs_that_cannot_be_are_refused(change, words):
    with pytest.raises(UsageError, match=words):
        Tree.tensor_shapes(replace(spec_of(CASES[2]), **change))


def test_other_matrices_and_aimless_rounding_are_refused():
    with pytest.raises(ShapeError, match="differs"):
        Tree.decompose(torch.ones(3, 4), spec_of(CASES[2]))
    with pytest.raises(UsageError, match="tolerance or ranks"):
        network_of(CASES[2]).round()
