"""Matrix product operators: canonical form, errors, gauges, application, padding."""

from __future__ import annotations

from math import log, prod

import pytest
import torch

from qll.errors import NonFiniteError, UsageError
from qll.tn import mpo
from qll.tn.entropy import site_spectra
from qll.tn.modes import split
from qll.tn.mpo import MPO
from qll.tn.network import NetworkSpec
from qll.tn.sweep import tensor_train

OUT, IN = (3, 4, 5), (4, 3, 2)
PADDED_OUT = (4, 4, 4)  # 64 rows for a matrix of 60


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spec(ranks=(7, 6), out=OUT, into=IN, shape=(60, 24)) -> NetworkSpec:
    return NetworkSpec("mpo", shape, tuple(ranks), {"out": out, "in": into})


def networks(matrix: torch.Tensor, chosen: NetworkSpec) -> list[MPO]:
    plain = MPO.decompose(matrix, chosen)
    return [plain, plain.interpolate()]


def test_all_cores_but_the_last_are_left_orthogonal():
    for core in MPO.decompose(noise(60, 24), spec()).cores[:-1]:
        left = core.flatten(0, 2)
        torch.testing.assert_close(left.mT @ left, torch.eye(left.shape[1]).double())


@pytest.mark.parametrize("center", [0, 1, 2])
def test_canonical_form_around_any_core(center):
    found = MPO.decompose(noise(60, 24), spec()).interpolate()
    moved = found.canonicalize(center)
    torch.testing.assert_close(moved.to_matrix(), found.to_matrix())
    for k, core in enumerate(moved.cores):
        if k < center:
            left = core.flatten(0, 2)
            torch.testing.assert_close(left.mT @ left, torch.eye(left.shape[1]).double())
        if k > center:
            right = core.flatten(1)
            torch.testing.assert_close(right @ right.mT, torch.eye(right.shape[0]).double())
    norm = torch.linalg.vector_norm(moved.cores[center])
    torch.testing.assert_close(norm, found.to_matrix().norm())


def test_squared_error_is_the_sum_of_what_the_bonds_dropped():
    matrix = noise(60, 24)
    cores, dropped = tensor_train(split(matrix, OUT, IN), ranks=(5, 4))
    found = MPO(spec((5, 4)), tuple(cores)).to_matrix()
    error = float((found - matrix).square().sum() / matrix.square().sum())
    assert error == pytest.approx(sum(dropped), rel=1e-11)
    assert len(dropped) == 2


@pytest.mark.parametrize("rtol", [0.5, 0.1, 1e-3, 1e-8])
def test_tolerance_is_kept_by_decomposition_and_rounding(rtol):
    matrix = noise(60, 24)
    decay = torch.logspace(0, -9, 24).double()
    matrix = (torch.linalg.qr(matrix).Q * decay) @ torch.linalg.qr(noise(24, 24, seed=1)).Q
    cores, dropped = tensor_train(split(matrix, OUT, IN), rtol=rtol)
    ranks = [core.shape[0] for core in cores[1:]]
    found = MPO(spec(ranks), tuple(cores))
    assert (found.to_matrix() - matrix).norm() <= rtol * matrix.norm()
    assert sum(dropped) <= rtol**2
    rounded = MPO.decompose(matrix, spec((12, 10))).round(rtol=rtol)
    assert (rounded.to_matrix() - matrix).norm() <= rtol * matrix.norm()
    assert all(a <= b for a, b in zip(rounded.spec.ranks, (12, 10), strict=True))


def test_error_is_within_sqrt_two_of_the_best_possible():
    matrix = noise(60, 24)
    tails = [float(s[rank:].square().sum()) for s, rank in zip(
        MPO.cut_spectra(matrix, spec()), (7, 6), strict=True)]  # fmt: skip
    error = float((MPO.decompose(matrix, spec()).to_matrix() - matrix).square().sum())
    assert max(tails) <= error <= sum(tails) * (1 + 1e-12)


@pytest.mark.parametrize("tokens", [1, 7, 64, 1000])
@pytest.mark.parametrize("ranks", [(1, 1), (7, 6), (12, 10)])
def test_factored_is_rebuilt_in_every_gauge(ranks, tokens):
    x = noise(tokens, 24, seed=2)
    for found in networks(noise(60, 24), spec(ranks)):
        torch.testing.assert_close(found.apply(x), x @ found.to_matrix().mT)
    torch.testing.assert_close(found.apply(x.reshape(1, tokens, 1, 24))[0, :, 0], found.apply(x))


@pytest.mark.parametrize("sites", [1, 2, 4])
def test_any_number_of_cores(sites):
    out, into = (3, 2, 2, 5)[4 - sites :], (2, 3, 2, 2)[4 - sites :]
    matrix = noise(prod(out), prod(into))
    chosen = spec((99,) * (sites - 1), out, into, tuple(matrix.shape))
    for found in networks(matrix, chosen):
        torch.testing.assert_close(found.to_matrix(), matrix)
        x = noise(3, matrix.shape[1], seed=1)
        torch.testing.assert_close(found.apply(x), x @ matrix.mT)
        torch.testing.assert_close(found.rows(torch.tensor([2, 0])), matrix[[2, 0]])
        if sites == 1:
            assert found.flops(3) == 2 * 3 * matrix.numel()


def test_gauge_saves_the_squared_bonds_and_nothing_else():
    plain, stored = networks(noise(60, 24), spec())
    floats = [sum(core.numel() for core in found.cores) for found in (plain, stored)]
    assert floats[0] - floats[1] == 7**2 + 6**2
    torch.testing.assert_close(stored.to_matrix(), plain.to_matrix(), rtol=0, atol=1e-12)
    torch.testing.assert_close(stored.expand().to_matrix(), plain.to_matrix(), rtol=0, atol=1e-12)
    for coefficients in stored.cores[:-1]:
        assert coefficients.abs().max() <= 2


def test_last_stored_core_is_made_of_entries_of_the_matrix():
    """With pivots at every bond the last core is the matrix at the chosen multi-indices."""
    plain, stored = networks(noise(60, 24), spec())
    values = set(plain.to_matrix().flatten().mul(1e9).round().tolist())
    assert set(stored.cores[-1].flatten().mul(1e9).round().tolist()) <= values


def test_float32_gauge_is_exact_to_float32():
    plain, stored = networks(noise(60, 24).float(), spec((12, 10)))
    scale = plain.to_matrix().abs().max()
    assert (stored.to_matrix() - plain.to_matrix()).abs().max() < 3e-6 * scale
    assert stored.cores[0].dtype == torch.float32


@pytest.mark.parametrize("out", [OUT, PADDED_OUT])
@pytest.mark.parametrize("shape", [(60, 24), (60, 23)])
def test_padding_comes_off_again(out, shape):
    matrix = noise(*shape)
    full = MPO.max_ranks(spec(out=out, shape=shape))
    for found in networks(matrix, spec(full, out=out, shape=shape)):
        torch.testing.assert_close(found.to_matrix(), matrix)
        x = noise(5, shape[1], seed=1)
        torch.testing.assert_close(found.apply(x), x @ matrix.mT)
        torch.testing.assert_close(found.rows(torch.tensor([[59]])), matrix[None, [59]])


def test_a_vocabulary_of_128256_pads_and_unpads():
    first, second = torch.randn(128, 4), torch.randn(1005, 2)
    matrix = torch.kron(first, second)[:128256]
    chosen = spec((1,), (128, 1005), (4, 2), (128256, 8))
    found = MPO.decompose(matrix, chosen).round(rtol=0.5)
    assert found.to_matrix().shape == (128256, 8)
    assert found.apply(torch.randn(2, 8)).shape == (2, 128256)
    ids = torch.tensor([0, 128255])
    torch.testing.assert_close(found.rows(ids), found.to_matrix()[ids])


def test_rows_in_several_chunks(monkeypatch):
    monkeypatch.setattr(mpo, "_ROWS_CHUNK", 200)
    ids = torch.arange(60).flip(0)
    for found in networks(noise(60, 24), spec()):
        torch.testing.assert_close(found.rows(ids), found.to_matrix().flip(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_application(dtype):
    exact, stored = networks(noise(60, 24), spec())
    cast = MPO(stored.spec, tuple(core.to(dtype) for core in stored.cores), stored.indices)
    for tokens in (1, 64):
        x = noise(tokens, 24, seed=3).to(dtype)
        expected = exact.apply(x.double())
        assert cast.apply(x).dtype == dtype
        assert (cast.apply(x).double() - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("gauge", [0, 1])
def test_gradients(gauge):
    chosen = spec((3, 2), (2, 2, 3), (2, 3, 1), (11, 6))
    found = networks(noise(11, 6), chosen)[gauge]
    cores = [core.detach().requires_grad_() for core in found.cores]
    x, ids = noise(2, 6, seed=1).requires_grad_(), torch.tensor([10, 3])

    def run(x, *cores):
        built = MPO(found.spec, cores, found.indices)
        return built.apply(x), built.rows(ids), built.to_matrix()

    assert torch.autograd.gradcheck(run, (x, *cores))


def test_a_change_of_basis_on_a_bond_is_invisible():
    found = MPO.decompose(noise(60, 24), spec())
    mix = noise(7, 7, seed=5)
    first = torch.einsum("aoib,bc->aoic", found.cores[0], mix)
    second = torch.einsum("ab,boic->aoic", torch.linalg.inv(mix), found.cores[1])
    moved = MPO(found.spec, (first, second, found.cores[2]))
    torch.testing.assert_close(moved.to_matrix(), found.to_matrix())
    for k in (0, 1):
        torch.testing.assert_close(moved.bond_spectrum(k), found.bond_spectrum(k))
    stored, other = found.interpolate(), moved.interpolate()
    for mine, theirs in zip(stored.cores, other.cores, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)  # the gauge is fixed


def test_bond_spectra_are_the_site_cuts_of_the_matrix():
    for found in networks(noise(60, 24), spec()):
        for k, expected in enumerate(site_spectra(found.to_matrix(), OUT, IN)):
            rank = found.spec.ranks[k]
            torch.testing.assert_close(found.bond_spectrum(k), expected[:rank])
            assert expected[rank:].abs().max() < 1e-6


def test_entropies_of_operators_with_known_answers():
    eight = NetworkSpec("mpo", (8, 8), (4, 4), {"out": (2, 2, 2), "in": (2, 2, 2)})
    identity = MPO.decompose(torch.eye(8).double(), eight)
    assert identity.round(rtol=1e-9).spec.ranks == (1, 1)
    assert identity.entropy(0) == pytest.approx(0.0, abs=1e-9)
    swap = torch.eye(4).double()[[0, 2, 1, 3]]  # two qubits exchanged: four equal Schmidt weights
    found = MPO.decompose(swap, NetworkSpec("mpo", (4, 4), (4,), {"out": (2, 2), "in": (2, 2)}))
    assert found.entropy(0) == pytest.approx(log(4))


def test_transformed_legs_are_kronecker_products():
    out = [noise(m, m, seed=m) for m in OUT]
    into = [noise(n, n, seed=10 + n) for n in IN]
    into[1] = None
    left = torch.kron(torch.kron(out[0], out[1]), out[2])
    right = torch.kron(torch.kron(into[0], torch.eye(IN[1]).double()), into[2])
    for found in networks(noise(60, 24), spec()):
        moved = found.transform_legs(out, into)
        torch.testing.assert_close(moved.to_matrix(), left @ found.to_matrix() @ right)
        assert moved.spec == found.spec


def test_rounding_lowers_ranks_and_keeps_the_gauge():
    matrix = noise(60, 24)
    for found in networks(matrix, spec((12, 10))):
        smaller = found.round(ranks=(7, 6))
        assert smaller.spec == found.spec.with_ranks((7, 6))
        best = MPO.decompose(matrix, spec()).to_matrix()
        torch.testing.assert_close(smaller.to_matrix(), best)


def test_clamp_and_max_ranks():
    assert MPO.max_ranks(spec()) == (12, 10)
    assert MPO.clamp(spec((100, 100))).ranks == (12, 10)
    assert MPO.clamp(spec((0, 100))).ranks == (1, 10)
    assert MPO.clamp(spec((100, 1))).ranks == (12, 1)
    narrow = spec((9, 9, 9), (2, 2, 2, 2), (1, 1, 1, 1), (16, 1))
    assert MPO.clamp(narrow).ranks == (2, 4, 2)
    full = MPO.clamp(spec((100, 100))).with_gauge("interpolative")
    assert sum(prod(shape) for shape in MPO.tensor_shapes(full).cores) == 60 * 24


def test_refusals():
    with pytest.raises(UsageError, match="one rank per bond"):
        MPO.decompose(noise(60, 24), spec((3,)))
    with pytest.raises(UsageError, match="too small"):
        MPO.decompose(noise(60, 24), spec(out=(3, 4, 4)))
    with pytest.raises(UsageError):
        MPO.decompose(noise(60, 24), spec()).transform_legs([None], [None])
    with pytest.raises(NonFiniteError):
        MPO.decompose(torch.full((60, 24), float("inf")), spec())


@pytest.mark.parametrize("width", [12, 23, 25, 48])
def test_inputs_of_another_width_are_refused(width):
    for found in networks(noise(60, 24), spec()) + networks(noise(60, 23), spec(shape=(60, 23))):
        if width != found.spec.shape[1]:
            with pytest.raises(RuntimeError):
                found.apply(noise(2, width))


def test_ids_beyond_the_table_are_an_index_error():
    for found in networks(noise(60, 24), spec()):
        with pytest.raises(IndexError):
            found.rows(torch.tensor([60]))


def test_no_tokens_and_no_ids():
    for found in networks(noise(60, 24), spec()):
        assert found.apply(noise(0, 24)).shape == (0, 60)
        assert found.rows(torch.tensor([], dtype=torch.int64)).shape == (0, 24)
