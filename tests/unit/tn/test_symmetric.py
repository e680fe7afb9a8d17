"""Symmetric products by halves, eigenvalues by LAPACK."""

from __future__ import annotations

import pytest
import torch

from qll.errors import ConvergenceError
from qll.tn import symmetric
from qll.tn.symmetric import eigenvalues_descending, eigh_descending, symmetric_product


@pytest.mark.parametrize("panel", [7, 16, 100])
def test_product_by_panels_is_the_product(panel, monkeypatch):
    monkeypatch.setattr(symmetric, "PANEL", panel)
    left, root = torch.randn(20, 45, dtype=torch.float64), torch.randn(20, 20, dtype=torch.float64)
    right = root @ root.T @ left
    product = symmetric_product(left, right)
    assert torch.allclose(product, product.T, atol=1e-10)
    assert torch.allclose(product, left.T @ right, atol=1e-10)


@pytest.mark.parametrize("size", [8, 80])
def test_eigenvalues_descend(size):
    matrix = torch.randn(size, size, dtype=torch.float64)
    matrix = matrix + matrix.T
    values, vectors = eigh_descending(matrix.clone())
    assert (values.diff() <= 0).all()
    assert torch.allclose(vectors * values @ vectors.T, matrix, atol=1e-10)
    assert torch.allclose(eigenvalues_descending(matrix.clone()), values, atol=1e-10)


def test_what_lapack_refuses_is_ours(monkeypatch):
    def refuse(*_, **__):
        raise symmetric.scipy.linalg.LinAlgError("no")

    monkeypatch.setattr(symmetric.scipy.linalg, "eigh", refuse)
    with pytest.raises(ConvergenceError):
        eigh_descending(torch.eye(40))
