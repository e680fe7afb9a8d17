"""Low-rank factors: best possible, cheapest storage, cheapest application."""

from __future__ import annotations

import pytest
import torch

from qll.errors import NonFiniteError, UsageError
from qll.tn.lowrank import LowRank
from qll.tn.network import NetworkSpec


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(matrix: torch.Tensor, rank: int) -> LowRank:
    return LowRank.decompose(matrix, NetworkSpec("lowrank", tuple(matrix.shape), (rank,)))


def test_error_is_the_tail_of_the_spectrum():
    matrix = noise(30, 50)
    s = torch.linalg.svdvals(matrix)
    error = (network(matrix, 11).to_matrix() - matrix).norm()
    assert float(error) == pytest.approx(float(s[11:].square().sum().sqrt()))
    torch.testing.assert_close(LowRank.cut_spectra(matrix, network(matrix, 1).spec)[0], s)


def test_left_factor_is_orthonormal():
    left = network(noise(30, 20), 7).cores[0]
    torch.testing.assert_close(left.mT @ left, torch.eye(7).double())


@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (16, 16)])
def test_full_rank_costs_exactly_the_dense_matrix(shape):
    matrix = noise(*shape)
    stored = network(matrix, 99).interpolate()
    assert sum(core.numel() for core in stored.cores) == matrix.numel()
    torch.testing.assert_close(stored.to_matrix(), matrix, rtol=0, atol=1e-12)


def test_the_gauge_stores_rows_of_the_matrix_itself():
    plain = network(noise(30, 20), 6)
    stored = plain.interpolate()
    torch.testing.assert_close(stored.cores[1], plain.to_matrix()[stored.indices[0]])
    assert stored.interpolate() is stored
    assert plain.expand() is plain


@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize("rank", [3, 12, 20])
@pytest.mark.parametrize("gauge", ["none", "interpolative"])
def test_factored_is_rebuilt(gauge, rank, tokens):
    found = network(noise(30, 20), rank)
    found = found if gauge == "none" else found.interpolate()
    x = noise(tokens, 20, seed=1)
    torch.testing.assert_close(found.apply(x), x @ found.to_matrix().mT)
    torch.testing.assert_close(found.apply(x[None, :, None]), found.apply(x)[None, :, None])


def test_the_matrix_is_built_only_where_that_is_cheaper():
    low, high = network(noise(30, 20), 3), network(noise(30, 20), 20)
    dense = 2 * 30 * 20
    assert low.flops(1000) == 1000 * 2 * 3 * 50
    assert high.flops(1) == 2 * 20 * 50
    assert high.flops(1000) == 1000 * dense + 2 * 20 * 30 * 20
    assert high.interpolate().flops(1000) == 1000 * dense


@pytest.mark.parametrize("rank", [1, 6, 20])
def test_rows_are_looked_up_without_the_matrix(rank):
    ids = torch.tensor([[0, 29, 3], [3, 11, 0]])
    plain = network(noise(30, 20), rank)
    for found in (plain, plain.interpolate()):
        torch.testing.assert_close(found.rows(ids), plain.to_matrix()[ids])


def test_rows_of_a_square_interpolative_factor():
    found = network(noise(5, 20), 5).interpolate()
    torch.testing.assert_close(found.rows(torch.tensor([4, 1])), found.to_matrix()[[4, 1]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_cores_work(dtype):
    exact = network(noise(30, 20), 6).interpolate()
    cores = tuple(core.to(dtype) for core in exact.cores)
    found = LowRank(exact.spec, cores, tuple(index.int() for index in exact.indices))
    x = noise(5, 20).to(dtype)
    assert found.apply(x).dtype == dtype
    error = (found.apply(x).double() - exact.apply(x.double())).norm()
    assert error < 0.02 * exact.apply(x.double()).norm()
    assert LowRank.decompose(x, found.spec.with_gauge("none")).cores[0].dtype == dtype


@pytest.mark.parametrize("gauge", ["none", "interpolative"])
def test_gradients(gauge):
    found = network(noise(7, 5), 3)
    found = found if gauge == "none" else found.interpolate()
    cores = [core.detach().requires_grad_() for core in found.cores]
    x, ids = noise(2, 5).requires_grad_(), torch.tensor([0, 6, 2])

    def run(x, *cores):
        built = LowRank(found.spec, cores, found.indices)
        return built.apply(x), built.rows(ids), built.to_matrix()

    assert torch.autograd.gradcheck(run, (x, *cores))


def test_legs_and_rounding_keep_the_gauge():
    matrix, left, right = noise(9, 8), noise(9, 9, seed=1), noise(8, 8, seed=2)
    for found in (network(matrix, 5), network(matrix, 5).interpolate()):
        moved = found.transform_legs([left], [right])
        torch.testing.assert_close(moved.to_matrix(), left @ found.to_matrix() @ right)
        assert moved.spec.gauge == found.spec.gauge
        smaller = found.round(ranks=[2])
        assert smaller.spec == found.spec.with_ranks([2])
        torch.testing.assert_close(smaller.to_matrix(), network(matrix, 2).to_matrix())
    with pytest.raises(UsageError):
        network(matrix, 2).transform_legs([None, None], [None])


def test_the_bond_spectrum_is_that_of_the_matrix():
    found = network(noise(30, 20), 6).interpolate()
    torch.testing.assert_close(found.bond_spectrum(0), torch.linalg.svdvals(found.to_matrix())[:6])
    eye = LowRank.decompose(torch.eye(8), NetworkSpec("lowrank", (8, 8), (8,)))
    assert eye.entropy(0) == pytest.approx(torch.tensor(8.0).log().item())


def test_ranks_are_clamped():
    spec = NetworkSpec("lowrank", (6, 4), (100,))
    assert LowRank.clamp(spec).ranks == LowRank.max_ranks(spec) == (4,)
    assert LowRank.clamp(spec.with_ranks([0])).ranks == (1,)


def test_nan_is_refused():
    with pytest.raises(NonFiniteError):
        network(torch.full((3, 3), float("nan")), 2)
