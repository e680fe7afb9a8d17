"""Our networks against quimb, tensorly and numpy, which share no code with them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import scipy.linalg.interpolative as scipy_id
import torch

from qll.tn.entropy import site_spectra, von_neumann
from qll.tn.gauge import interpolative
from qll.tn.kron import KroneckerSum
from qll.tn.lowrank import LowRank
from qll.tn.modes import split
from qll.tn.mpo import MPO
from qll.tn.network import NetworkSpec

pytestmark = pytest.mark.oracle

OUT, IN = (4, 3, 5), (3, 4, 2)
SPEC = NetworkSpec("mpo", (60, 24), (6, 5), {"out": OUT, "in": IN})


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def qtn():
    return pytest.importorskip("quimb.tensor")


@pytest.fixture(scope="module")
def tl():
    pytest.importorskip("tensorly")
    import tensorly

    return tensorly


def test_quimb_reads_our_cores_as_its_operator(qtn):
    """quimb's rectangular operator (bonds left, right; legs up = out, down = in) rebuilds W."""
    network = MPO.decompose(noise(60, 24), SPEC).interpolate().expand()
    arrays = [core.permute(0, 3, 1, 2).numpy() for core in network.cores]  # l r u d
    arrays[0], arrays[-1] = arrays[0][0], arrays[-1][:, 0]
    operator = qtn.MatrixProductOperator(arrays, shape="lrud")
    dense = operator.contract(all).transpose("k0", "k1", "k2", "b0", "b1", "b2").data
    np.testing.assert_allclose(dense.reshape(60, 24), network.to_matrix().numpy(), atol=1e-12)


def test_quimb_compresses_to_the_same_operator(qtn):
    """Sites fused to one leg make the operator a state: same TT-SVD, same bond entropies."""
    matrix = noise(60, 24)
    tensor = split(matrix, OUT, IN).reshape(12, 12, 10).numpy()
    state = qtn.MatrixProductState.from_dense(tensor, dims=(12, 12, 10))
    state.normalize()
    for cut, spectrum in enumerate(site_spectra(matrix, OUT, IN), start=1):
        bits = state.entropy(cut)  # quimb: log2, of the normalised state
        assert von_neumann(spectrum) == pytest.approx(bits * np.log(2), rel=1e-9)
    network = MPO.decompose(matrix, SPEC)
    state = qtn.MatrixProductState.from_dense(tensor, dims=(12, 12, 10))
    state.canonicalize_(0)
    state.left_compress_site(0, max_bond=6, cutoff=0.0)
    state.left_compress_site(1, max_bond=5, cutoff=0.0)
    theirs = torch.from_numpy(state.to_dense().reshape(4, 3, 3, 4, 5, 2))
    ours = split(network.to_matrix(), OUT, IN)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_quimb_bond_entropies_of_a_compressed_operator(qtn):
    network = MPO.decompose(noise(60, 24), SPEC)
    arrays = [core.flatten(1, 2).permute(0, 2, 1).numpy() for core in network.cores]  # l r p
    arrays[0], arrays[-1] = arrays[0][0], arrays[-1][:, 0]
    state = qtn.MatrixProductState(arrays, shape="lrp")
    state.normalize()
    for k in range(2):
        assert network.entropy(k) == pytest.approx(state.entropy(k + 1) * np.log(2), rel=1e-9)


def test_tensorly_tensor_train_matrix_is_ours(tl):
    from tensorly.decomposition import tensor_train_matrix

    matrix = noise(60, 24)
    factors = tensor_train_matrix(matrix.reshape(*OUT, *IN).numpy(), rank=[1, 6, 5, 1])
    theirs = tl.tt_matrix_to_matrix(factors)
    ours = MPO.decompose(matrix, SPEC)
    np.testing.assert_allclose(ours.to_matrix().numpy(), theirs, atol=1e-9)
    assert [tuple(core.shape) for core in ours.cores] == [factor.shape for factor in factors]


def test_tensorly_partial_svd_is_low_rank(tl):
    from tensorly.tenalg.svd import svd_interface

    matrix = noise(40, 30)
    u, s, vh = svd_interface(matrix.numpy(), method="truncated_svd", n_eigenvecs=7)
    ours = LowRank.decompose(matrix, NetworkSpec("lowrank", (40, 30), (7,)))
    np.testing.assert_allclose(ours.to_matrix().numpy(), (u * s) @ vh, atol=1e-9)


def test_numpy_rearrangement_is_the_kronecker_sum():
    """Van Loan and Pitsianis, block by block: R(W)[(i, j)] = vec(block i, j of W)."""
    matrix = noise(24, 15)
    rearranged = np.stack(
        [
            matrix[6 * i : 6 * i + 6, 3 * j : 3 * j + 3].numpy().reshape(-1)
            for i, j in product(range(4), range(5))
        ]
    )
    u, s, vh = np.linalg.svd(rearranged, full_matrices=False)
    expected = sum(s[t] * np.kron(u[:, t].reshape(4, 5), vh[t].reshape(6, 3)) for t in range(4))
    spec = NetworkSpec("kron", (24, 15), (4,), {"out": (4, 6), "in": (5, 3)})
    ours = KroneckerSum.decompose(matrix, spec)
    np.testing.assert_allclose(ours.to_matrix().numpy(), expected, atol=1e-10)
    np.testing.assert_allclose(KroneckerSum.cut_spectra(matrix, spec)[0].numpy(), s, rtol=1e-9)


def test_tensorly_kronecker_builds_the_same_matrix(tl):
    found = KroneckerSum.decompose(
        noise(24, 15), NetworkSpec("kron", (24, 15), (2,), {"out": (4, 6), "in": (5, 3)})
    )
    first, second = (core.numpy() for core in found.cores)
    theirs = sum(tl.tenalg.kronecker([first[t], second[t]]) for t in range(2))
    np.testing.assert_allclose(found.to_matrix().numpy(), theirs, atol=1e-12)


def test_the_gauge_is_at_least_as_well_conditioned_as_scipys():
    """scipy's interpolative decomposition bounds its coefficients by pivoting alone."""
    left = noise(80, 12)
    _, projection = scipy_id.interp_decomp(left.numpy().T.copy(), 12, rand=False)
    coefficients, pivots = interpolative(left)
    assert len(set(pivots.tolist())) == 12
    assert float(coefficients.abs().max()) <= max(2.0, float(np.abs(projection).max()))
    rows = coefficients @ left[pivots]
    rest = [row for row in range(80) if row not in pivots.tolist()]
    torch.testing.assert_close(rows, left[rest])
