"""Sequential rounding: never worse than nearest rounding where the metric is far from round."""

import pytest
import torch

from qll.tn.packed import Packing
from qll.tn.rounding import ROW_BLOCK, round_in_metric, round_nearest


def moment(size: int, seed: int, diagonal: bool = False) -> torch.Tensor:
    """A second moment whose eigenvalues span three decades."""
    hand = torch.Generator().manual_seed(seed)
    values = torch.logspace(0, -3, size, dtype=torch.float64)
    if diagonal:
        return values[torch.randperm(size, generator=hand)]
    basis = torch.linalg.qr(torch.randn(size, size, generator=hand, dtype=torch.float64)).Q
    return basis * values @ basis.T


def matrix(value: torch.Tensor | None, size: int) -> torch.Tensor:
    if value is None:
        return torch.eye(size, dtype=torch.float64)
    return torch.diag(value) if value.ndim == 1 else value


def lost(error, left, right) -> float:
    left, right = matrix(left, len(error)), matrix(right, error.shape[1])
    return float((left @ error @ right * error).sum())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_both_factors_lower_the_error(seed, bits):
    hand = torch.Generator().manual_seed(seed)
    rows = torch.randn(ROW_BLOCK + 40, 90, generator=hand, dtype=torch.float64)
    packing = Packing(bits, 32)
    left, right = moment(len(rows), seed), moment(90, seed + 10)
    loss = {
        name: lost(rows - found.values, left, right)
        for name, found in {
            "nearest": round_nearest(rows, packing),
            "right": round_in_metric(rows, packing, None, right),
            "both": round_in_metric(rows, packing, left, right),
        }.items()
    }
    assert loss["right"] < 0.6 * loss["nearest"]
    assert loss["both"] < 0.9 * loss["right"]


def test_a_diagonal_metric_is_the_matrix_with_that_diagonal():
    rows, packing = torch.randn(20, 70, dtype=torch.float64), Packing(4, 32)
    right = moment(70, 3, diagonal=True)
    vector = round_in_metric(rows, packing, None, right)
    whole = round_in_metric(rows, packing, None, torch.diag(right))
    assert torch.equal(vector.codes, whole.codes)
    nearest = round_nearest(rows, packing)
    assert lost(rows - vector.values, None, right) <= lost(rows - nearest.values, None, right)


def test_without_a_metric_it_is_nearest_rounding():
    rows, packing = torch.randn(20, 70, dtype=torch.float64), Packing(4, 32)
    assert torch.equal(
        round_in_metric(rows, packing, None, None).values, round_nearest(rows, packing).values
    )


def test_the_order_of_rows_does_not_matter():
    """Rows are sorted by their weight, so a permuted problem has the permuted solution."""
    hand = torch.Generator().manual_seed(4)
    rows = torch.randn(80, 64, generator=hand, dtype=torch.float64)
    left, right = moment(80, 5), moment(64, 6)
    order = torch.randperm(80, generator=hand)
    found = round_in_metric(rows, Packing(4, 32), left, right)
    permuted = round_in_metric(rows[order], Packing(4, 32), left[order][:, order], right)
    assert torch.equal(found.codes[order], permuted.codes)


@pytest.mark.parametrize("seed", range(8))
def test_a_singular_moment_is_no_obstacle(seed):
    hand = torch.Generator().manual_seed(seed)
    rows = torch.randn(40, 40, generator=hand, dtype=torch.float64)
    thin = torch.randn(40, 3, generator=hand, dtype=torch.float64)
    both = (thin @ thin.T, thin @ thin.T)
    found = round_in_metric(rows, Packing(4, 32), *both)
    assert torch.isfinite(found.values).all()
    nearest = round_nearest(rows, Packing(4, 32))
    assert lost(rows - found.values, *both) < 0.5 * lost(rows - nearest.values, *both)
