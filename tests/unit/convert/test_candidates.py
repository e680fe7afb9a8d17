"""Ladders: parameters are those of the spec, losses are tails, thresholds fill budgets."""

import itertools

import pytest
import torch

from qll.convert.candidates import dense, exact, ladder, tail_energies
from qll.convert.fit import fit, spectra
from qll.convert.metric import plain
from qll.convert.units import Unit
from qll.tn import default_modes, tensor_shapes
from qll.tn.network import NetworkSpec

SHAPE = (48, 36)
UNIT = Unit(("w",), (SHAPE,))


def weight() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(SHAPE, dtype=torch.float64) * torch.logspace(0, -2, SHAPE[1])


def spec_of(format: str) -> NetworkSpec:
    if format == "lowrank":
        return NetworkSpec(format, SHAPE, gauge="interpolative")
    if format == "tucker":
        return NetworkSpec(format, SHAPE, modes={"stack": (6, 8, 36)}, gauge="interpolative")
    sites = 2 if format == "kron" else 3
    return NetworkSpec(format, SHAPE, modes=default_modes(SHAPE, sites), gauge="interpolative")


def test_tails_end_at_zero_and_start_at_the_total():
    tails = tail_energies(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    assert tails.tolist() == [14.0, 5.0, 1.0, 0.0]


def test_lowrank_ladder_predicts_the_true_error():
    items = ladder(UNIT, spec_of("lowrank"), spectra([weight()], spec_of("lowrank"), [plain()]))
    assert [item.spec.ranks for item in items] == [(8,), (16,), (24,), (32,)]
    total = float(weight().square().sum())
    for item in items:
        assert item.params == tensor_shapes(item.spec).num_params < UNIT.dense_params
        error = fit([weight()], item.spec, [plain()], torch.float64).rel_error[0]
        assert error**2 * total == pytest.approx(item.loss, rel=1e-6)


@pytest.mark.parametrize("format", ["mpo", "tucker", "tree"])
def test_predicted_loss_bounds_the_error_of_several_bonds(format):
    spec = spec_of(format)
    items = ladder(UNIT, spec, spectra([weight()], spec, [plain()]))
    assert len(items) > 5
    total = float(weight().square().sum())
    for item in items[::4]:
        error = fit([weight()], item.spec, [plain()], torch.float64).rel_error[0]
        assert error**2 * total <= item.loss * (1 + 1e-9)
    sizes = [item.params for item in items]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("format", ["mpo", "tucker", "tree", "kron"])
def test_ladders_leave_no_wide_gap(format):
    spec = spec_of(format)
    items = ladder(UNIT, spec, spectra([weight()], spec, [plain()]))
    sizes = [0, *(item.params for item in items), UNIT.dense_params]
    steps = [after - before for before, after in itertools.pairwise(sizes)]
    assert max(steps) < 0.2 * UNIT.dense_params


@pytest.mark.parametrize("format", ["lowrank", "mpo", "tucker", "tree", "kron"])
def test_exact_candidate_loses_nothing(format):
    item = exact(UNIT, spec_of(format))
    fitted = fit([weight()], item.spec, [plain()], torch.float64)
    assert fitted.rel_error[0] < 1e-9


def test_dense_candidate():
    assert dense(UNIT).params == 48 * 36
    assert dense(UNIT).loss == 0
