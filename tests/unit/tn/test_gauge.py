"""The interpolative gauge: exact, bounded on hard matrices, cheap to undo."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from qll.errors import NonFiniteError, UsageError
from qll.tn import gauge
from qll.tn.gauge import MAX_COEFFICIENT, complement, interpolative, row_order, write


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kahan(rank: int) -> torch.Tensor:
    """The matrix on which QR with column pivoting underestimates the smallest singular value."""
    cosine = 0.285
    sine = (1 - cosine**2) ** 0.5
    upper = torch.eye(rank) - cosine * torch.triu(torch.ones(rank, rank), 1)
    return (torch.diag(sine ** torch.arange(rank)) @ upper).double()


def lu_worst(rank: int) -> torch.Tensor:
    """The matrix on which LU with partial pivoting grows like 2^rank."""
    matrix = torch.eye(rank) - torch.tril(torch.ones(rank, rank), -1)
    matrix[:, -1] = 1
    return matrix.double()


def hard(name: str, rows: int = 90, rank: int = 30) -> torch.Tensor:
    rest = noise(rows - rank, rank)
    return {
        "gaussian": noise(rows, rank),
        "kahan": torch.cat((kahan(rank).mT, 0.01 * rest)),
        "lu_worst": torch.cat((lu_worst(rank), 0.5 * rest)),
        "heavy_rows": noise(rows, rank) * torch.logspace(0, 9, rows).double()[:, None],
        "scaled_columns": noise(rows, rank) * torch.logspace(0, -12, rank).double(),
        "duplicates": torch.cat((noise(rank, rank),) * 3),
        "deficient": noise(rows, 3) @ noise(3, rank),
        "zero": torch.zeros(rows, rank).double(),
    }[name]


HARD = ["gaussian", "kahan", "lu_worst", "heavy_rows", "scaled_columns", "duplicates",
        "deficient", "zero"]  # fmt: skip


@pytest.mark.parametrize("limit", [gauge._QR_LIMIT, 0], ids=["from_qr", "from_lu"])
@pytest.mark.parametrize("name", HARD)
def test_exact_and_bounded(name, limit, monkeypatch):
    monkeypatch.setattr(gauge, "_QR_LIMIT", limit)
    left = hard(name)
    coefficients, pivots = interpolative(left)
    assert coefficients.abs().max() <= MAX_COEFFICIENT
    assert torch.equal(pivots, pivots.unique())
    again = write(pivots, coefficients) @ left[pivots]
    assert (again - left).norm() <= 1e-12 * left.norm()


def test_swaps_repair_any_first_choice(monkeypatch):
    left = noise(80, 20)
    left[:20] *= 1e-6  # the first rows are terrible pivots
    monkeypatch.setattr(gauge, "_first_pivots", lambda basis: torch.arange(basis.shape[1]))
    coefficients, pivots = interpolative(left)
    assert coefficients.abs().max() <= MAX_COEFFICIENT
    assert not set(range(20)) & set(pivots.tolist())
    torch.testing.assert_close(write(pivots, coefficients) @ left[pivots], left)


@pytest.mark.parametrize("name", ["gaussian", "kahan", "heavy_rows"])
def test_pivot_rows_are_as_well_conditioned_as_promised(name):
    left = hard(name)
    rows, rank = left.shape
    _, pivots = interpolative(left)
    bound = (1 + MAX_COEFFICIENT**2 * rank * (rows - rank)) ** -0.5
    chosen, full = torch.linalg.svdvals(left[pivots]), torch.linalg.svdvals(left)
    assert (chosen >= bound * full * (1 - 1e-9)).all()


def test_the_choice_does_not_depend_on_the_basis_of_the_bond():
    left, mix = noise(60, 9), noise(9, 9, seed=1)
    coefficients, pivots = interpolative(left)
    mixed_coefficients, mixed_pivots = interpolative(left @ mix)
    assert torch.equal(pivots, mixed_pivots)
    torch.testing.assert_close(coefficients, mixed_coefficients, rtol=0, atol=1e-10)


def test_a_square_matrix_needs_no_coefficients():
    coefficients, pivots = interpolative(noise(5, 5))
    assert coefficients.shape == (0, 5)
    assert pivots.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(write(pivots, coefficients), torch.eye(5).double())


def test_refusals():
    with pytest.raises(UsageError, match="clamp"):
        interpolative(noise(3, 4))
    with pytest.raises(NonFiniteError):
        interpolative(torch.full((3, 2), float("nan")))


def test_half_precision_and_gradients_stay_outside():
    left = noise(12, 4).bfloat16().requires_grad_()
    coefficients, pivots = interpolative(left)
    assert coefficients.dtype == torch.float64
    assert not coefficients.requires_grad
    again = write(pivots, coefficients) @ left.detach().double()[pivots]
    torch.testing.assert_close(again, left.detach().double(), rtol=0, atol=1e-12)


def test_write_passes_gradients_to_the_coefficients():
    coefficients = noise(3, 2).requires_grad_()
    scale = noise(5, 2)
    (write(torch.tensor([1, 4]), coefficients) * scale).sum().backward()
    assert torch.equal(coefficients.grad, scale[[0, 2, 3]])


def test_row_order_inverts_pivots_then_complement():
    pivots = torch.tensor([6, 0, 3])
    stored = torch.cat((pivots, complement(pivots, 8)))
    assert torch.equal(stored.index_select(0, row_order(pivots, 8)), torch.arange(8))
    assert torch.equal(row_order(pivots.int(), 8), row_order(pivots, 8))


def test_row_order_notices_new_values_in_the_same_tensor():
    pivots = torch.tensor([0, 1])
    assert row_order(pivots, 3).tolist() == [0, 1, 2]
    pivots.copy_(torch.tensor([1, 2]))  # what load_state_dict does
    assert row_order(pivots, 3).tolist() == [2, 0, 1]


def test_row_order_in_inference_mode():
    with torch.inference_mode():
        assert row_order(torch.tensor([2]), 3).tolist() == [1, 2, 0]


@pytest.mark.slow
def test_a_vocabulary_sized_factor():
    left = noise(49152, 128).float()
    coefficients, pivots = interpolative(left)
    assert coefficients.abs().max() <= MAX_COEFFICIENT
    some = torch.arange(0, 49152, 97)
    rows = write(pivots, coefficients)[some] @ left[pivots].double()
    torch.testing.assert_close(rows, left[some].double(), rtol=0, atol=1e-10)


COMPILED = """
import warnings
import torch
warnings.simplefilter("error")
from qll.tn.lowrank import LowRank
from qll.tn.mpo import MPO
from qll.tn.network import NetworkSpec
modes = {"out": (4, 6), "in": (5, 4)}
for kind, spec in ((LowRank, NetworkSpec("lowrank", (24, 20), (5,))),
                   (MPO, NetworkSpec("mpo", (24, 20), (5,), modes))):
    for network in (kind.decompose(torch.randn(24, 20), spec),
                    kind.decompose(torch.randn(24, 20), spec).interpolate()):
        run = torch.compile(lambda x, cores, indices: kind(network.spec, cores, indices).apply(x),
                            fullgraph=True, backend="eager")
        torch.compiler.reset()
        for tokens in (3, 5, 40):
            x = torch.randn(tokens, 20)
            torch.testing.assert_close(run(x, network.cores, network.indices), network.apply(x))
print("whole")
"""


@pytest.mark.slow
def test_application_is_one_graph():
    """In a process of its own: the type checks of the test suite break graphs."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=200
    )
    assert done.stdout.strip() == "whole", done.stderr
