"""Tucker: exactness, gauge, counts, HOOI, spectra, application."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch

from qll.errors import ShapeError, UsageError
from qll.tn.legs import unfold
from qll.tn.network import NetworkSpec
from qll.tn.tucker import Tucker

# stack, matrix shape, ranks; rows are the leading legs
CASES = [
    ((3, 8, 10), (24, 10), (3, 8, 10)),
    ((3, 8, 10), (24, 10), (2, 5, 7)),
    ((10, 3, 8), (10, 24), (4, 3, 2)),  # heads on the columns
    ((4, 5, 3, 6), (20, 18), (3, 4, 2, 5)),
    ((4, 5, 3, 6), (20, 18), (1, 1, 1, 1)),
    ((40, 2, 3), (80, 3), (6, 2, 3)),  # the first leg is larger than all the others together
]


def spec_of(case) -> NetworkSpec:
    stack, shape, ranks = case
    return NetworkSpec("tucker", shape, ranks, {"stack": stack})


def matrix_of(case, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(case[1], generator=generator, dtype=torch.float64).to(dtype)


@functools.cache  # networks are immutable
def network_of(case, dtype=torch.float64, full: bool = False) -> Tucker:
    spec = spec_of(case)
    spec = spec.with_ranks(Tucker.max_ranks(spec)) if full else spec
    return Tucker.decompose(matrix_of(case, dtype), spec)


@pytest.mark.parametrize("case", CASES)
def test_full_ranks_are_exact_and_cost_what_the_dense_matrix_costs(case):
    matrix = matrix_of(case)
    network = network_of(case, full=True).interpolate()
    torch.testing.assert_close(network.to_matrix(), matrix, rtol=0, atol=1e-10)
    assert network.num_floats == matrix.numel()


@pytest.mark.parametrize("case", CASES)
def test_the_gauge_saves_the_square_of_every_rank_and_changes_nothing(case):
    network = network_of(case)
    fixed = network.interpolate()
    torch.testing.assert_close(fixed.to_matrix(), network.to_matrix(), rtol=0, atol=1e-10)
    torch.testing.assert_close(fixed.expand().to_matrix(), network.to_matrix(), rtol=0, atol=1e-10)
    assert network.num_params - fixed.num_floats == sum(rank**2 for rank in case[2])
    for member in (network, fixed):
        shapes = Tucker.tensor_shapes(member.spec)
        assert tuple(tuple(core.shape) for core in member.cores) == shapes.cores
        assert tuple(tuple(index.shape) for index in member.indices) == shapes.indices
        assert member.num_params == shapes.num_params


@pytest.mark.parametrize("case", CASES)
def test_the_error_is_what_the_core_lacks_and_within_the_hosvd_bound(case):
    matrix = matrix_of(case)
    network = Tucker.decompose(matrix, spec_of(case))
    error = (network.to_matrix() - matrix).square().sum()
    lost = matrix.square().sum() - network.cores[0].square().sum()
    torch.testing.assert_close(error, lost, rtol=1e-8, atol=1e-9)
    spectra = Tucker.cut_spectra(matrix, spec_of(case))
    tails = [s[r:].square().sum() for s, r in zip(spectra, case[2], strict=True)]
    assert max(tails) * (1 - 1e-9) - 1e-9 <= error <= sum(tails) * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[4]])
def test_every_sweep_lowers_the_error_or_keeps_it(case):
    matrix = matrix_of(case)
    errors = [
        (Tucker.decompose(matrix, spec_of(case), sweeps=n).to_matrix() - matrix).norm().item()
        for n in range(5)
    ]
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[3]])
def test_bond_spectra_are_those_of_the_dense_unfoldings(case):
    network = network_of(case)
    tensor = network.to_matrix().reshape(case[0])
    dense = Tucker.cut_spectra(network.to_matrix(), spec_of(case))
    for leg, rank in enumerate(case[2]):
        sigma = torch.linalg.svdvals(unfold(tensor, leg))
        torch.testing.assert_close(dense[leg], sigma, rtol=0, atol=1e-7)
        for member in (network, network.interpolate()):
            torch.testing.assert_close(
                member.bond_spectrum(leg)[:rank], sigma[:rank], rtol=0, atol=1e-7
            )
        weights = sigma[:rank].square() / sigma.square().sum()
        entropy = -(weights * weights.log()).sum().item()
        assert network.entropy(leg) == pytest.approx(entropy)


@pytest.mark.parametrize("case", CASES)
def test_apply_and_rows_are_those_of_the_matrix(case):
    network = network_of(case)
    inputs = [torch.randn(tokens, case[1][1], dtype=torch.float64) for tokens in (1, 7, 64)]
    ids = torch.randint(case[1][0], (2, 3))
    for member in (network, network.interpolate()):
        for x in inputs:
            torch.testing.assert_close(member.apply(x), x @ member.to_matrix().mT)
        torch.testing.assert_close(member.rows(ids), member.to_matrix()[ids], rtol=0, atol=1e-12)


def test_apply_keeps_leading_shapes():
    network = network_of(CASES[3])
    assert network.apply(torch.randn(2, 3, 18).double()).shape == (2, 3, 20)
    assert network.apply(torch.randn(18).double()).shape == (20,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_apply_in_storage_precision_has_gradients_everywhere(dtype):
    network = network_of(CASES[3], torch.float32).interpolate()
    cores = tuple(core.to(dtype).requires_grad_() for core in network.cores)
    stored = Tucker(network.spec, cores, tuple(index.int() for index in network.indices))
    x = torch.randn(5, 18).to(dtype)
    y = stored.apply(x)
    y.float().square().sum().backward()
    assert y.dtype == dtype
    assert all(core.grad is not None and core.grad.abs().sum() > 0 for core in cores)
    exact = x.double() @ network.to_matrix().double().mT
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}[dtype]
    assert (y - exact).abs().max() < tolerance * exact.abs().max()


def test_flops_follow_the_cheaper_order():
    case = CASES[1]
    network = network_of(case).interpolate()
    rows, columns = case[1]
    core = math.prod(case[2])
    # one token: input factor, core, then the two row factors, never the matrix
    by_token = 2 * (10 * 7 + core + min(3 * 2 * 5 + 3 * 8 * 5, 2 * 5 * 8 + 2 * 8 * 3))
    assert network.flops(1) == by_token
    rebuilt = 2 * rows * columns
    assert network.flops(1 << 16) <= (1 << 16) * min(by_token, rebuilt) + 4 * rows * columns * 7


def test_transform_legs_multiplies_each_leg():
    case = CASES[3]
    network = network_of(case)
    sides = [torch.randn(size, size).double() for size in case[0]]
    rows, columns = torch.kron(sides[0], sides[1]), torch.kron(sides[2], sides[3])
    for member in (network, network.interpolate()):
        moved = member.transform_legs(out=sides[:2], into=sides[2:])
        assert moved.spec == member.spec
        torch.testing.assert_close(moved.to_matrix(), rows @ network.to_matrix() @ columns)
        still = member.transform_legs(out=[None, None], into=[None, None])
        torch.testing.assert_close(still.to_matrix(), network.to_matrix())


@pytest.mark.parametrize("rtol", [1e-6, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_stays_within_its_tolerance(rtol, dtype):
    for case in (CASES[0], CASES[3], CASES[5]):
        network = network_of(case, dtype, full=True).interpolate()
        rounded = network.round(rtol=rtol)
        error = (rounded.to_matrix() - network.to_matrix()).norm()
        assert error <= (rtol * (1 + 1e-6) + 1e-6) * network.to_matrix().norm()
        assert rounded.spec.gauge == "interpolative"
        assert Tucker.clamp(rounded.spec) == rounded.spec


def test_rounding_finds_planted_ranks_and_never_raises_them():
    case = CASES[3]
    planted = network_of(case)
    full = spec_of(case).with_ranks(Tucker.max_ranks(spec_of(case)))
    network = Tucker.decompose(planted.to_matrix(), full)
    assert network.round(rtol=1e-7).spec.ranks == case[2]
    assert planted.round(ranks=case[0]).spec.ranks == case[2]
    assert network.round(ranks=(2, 2, 2, 2)).spec.ranks == (2, 2, 2, 2)


def test_clamp_respects_the_product_of_the_others():
    spec = spec_of(CASES[1])
    assert Tucker.clamp(spec.with_ranks((2, 2, 9))).ranks == (2, 2, 4)
    assert Tucker.clamp(spec.with_ranks((1, 8, 3))).ranks == (1, 3, 3)
    assert Tucker.clamp(spec.with_ranks((0, 99, 99))).ranks == (1, 8, 8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ranks": (2, 2, 9)}, "clamp"),
        ({"ranks": (2, 2)}, "one rank per leg"),
        ({"gauge": "left"}, "gauge"),
        ({"shape": (25, 10)}, "no cut of the stack"),
        ({"modes": {}}, "no cut of the stack"),
    ],
)
def test_specs_that_cannot_be_are_refused(change, words):
    with pytest.raises(UsageError, match=words):
        Tucker.tensor_shapes(replace(spec_of(CASES[1]), **change))


def test_other_matrices_and_aimless_rounding_are_refused():
    with pytest.raises(ShapeError, match="differs"):
        Tucker.decompose(torch.ones(10, 24), spec_of(CASES[1]))
    with pytest.raises(UsageError, match="tolerance or ranks"):
        network_of(CASES[1]).round()
