"""The tensorly rows: budgets exact, and matrices that a second route gives as well."""

from __future__ import annotations

import pytest
import tensorly
import torch

from benchmarks.peers import tensorly_formats
from qll.tn.mpo import MPO
from qll.tn.network import NetworkSpec

pytestmark = pytest.mark.oracle
WEIGHT = torch.randn(24, 36, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("keep", [0.9, 0.5])
def test_tensor_trains_fit_and_are_those_of_our_mpo(keep):
    tensorly.set_backend("pytorch")  # as an import of tensorly-torch does
    out, into = tensorly_formats.modes((24, 36), 3)
    ranks = tensorly_formats.train_ranks(out, into, keep)
    found = tensorly_formats.tensor_train(WEIGHT, None, keep)
    spec = NetworkSpec("mpo", (24, 36), ranks[1:-1], {"out": out, "in": into})
    ours = MPO.decompose(WEIGHT, spec)
    assert tensorly.get_backend() == "pytorch"
    tensorly.set_backend("numpy")
    assert found.params == sum(core.numel() for core in ours.cores) <= keep * 24 * 36
    assert torch.allclose(found.matrix.double(), ours.to_matrix(), atol=1e-5)
    larger = (1, *(rank + 1 for rank in ranks[1:-1]), 1)
    assert tensorly_formats.train_params(out, into, larger) > keep * 24 * 36


@pytest.mark.parametrize("keep", [0.9, 0.5])
def test_tucker_fits_and_keeps_the_energy_of_its_core(keep):
    dims = tuple(dim for side in tensorly_formats.modes((24, 36), 2) for dim in side)
    ranks = tensorly_formats.tucker_ranks(dims, keep)
    found = tensorly_formats.tucker_matrix(WEIGHT, None, keep)
    assert found.params == tensorly_formats.tucker_params(dims, ranks) <= keep * 24 * 36
    for leg, dim in enumerate(dims):
        more = (*ranks[:leg], ranks[leg] + 1, *ranks[leg + 1 :])
        assert ranks[leg] == dim or tensorly_formats.tucker_params(dims, more) > keep * 24 * 36
    # an orthogonal projection: energy kept plus energy lost is all there was
    kept, lost = found.matrix.double().norm() ** 2, (WEIGHT - found.matrix.double()).norm() ** 2
    assert float(kept + lost) == pytest.approx(float(WEIGHT.norm() ** 2), rel=1e-4)
    assert float(lost / WEIGHT.norm() ** 2) < 1 - 0.7 * keep
