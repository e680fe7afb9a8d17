"""Symmetric matrices: products known to be one, and their eigenvalues.

Half of a symmetric product is enough. On the CPU, threads of an eigenvalue solver may wait for
each other beside other work: on two busy cores torch took 83 s for the eigenvectors of 1536 x 1536
where LAPACK by way of scipy took 3 s, and scipy 34 s for the eigenvalues of 4096 x 4096 where torch
took 6 s on one thread. Alone, one thread is about as fast (2048: 0.45 s, and 0.56 s by scipy).

>>> values, vectors = eigh_descending(torch.diag(torch.tensor([1.0, 4.0]).double()))
>>> values.tolist(), vectors.abs().tolist()
([4.0, 1.0], [[0.0, 1.0], [1.0, 0.0]])
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import scipy.linalg
import torch
from jaxtyping import Float
from torch import Tensor

from qll.errors import ConvergenceError

PANEL = 1024  # columns of a product that are multiplied at once
_SCIPY_FROM = 32


def symmetric_product(
    left: Float[Tensor, "k n"], right: Float[Tensor, "k n"]
) -> Float[Tensor, "n n"]:
    """left^T right where that is symmetric: the panels above the diagonal, mirrored.

    >>> a = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    >>> symmetric_product(a, a).tolist()
    [[1.0, 2.0], [2.0, 5.0]]
    """
    size = left.shape[1]
    if size <= PANEL:
        return left.mT @ right
    product = left.new_empty(size, size)
    for start in range(0, size, PANEL):
        stop = min(start + PANEL, size)
        panel = left[:, start:stop].mT @ right[:, start:]
        product[start:stop, start:] = panel
        product[stop:, start:stop] = panel[:, stop - start :].mT
    return product


def eigh_descending(gram: Float[Tensor, "n n"]) -> tuple[Float[Tensor, "n"], Float[Tensor, "n n"]]:
    """Eigenvalues of a symmetric matrix, descending, and eigenvectors in columns.

    Raises ConvergenceError. The matrix may be overwritten.
    """
    if gram.device.type != "cpu" or len(gram) < _SCIPY_FROM:
        values, vectors = _solved(torch.linalg.eigh, gram)
    else:
        # a symmetric matrix is its own transpose: the order LAPACK wants, without a copy
        found = _solved(_lapack_eigh, gram.mT.numpy())
        values, vectors = (torch.from_numpy(part) for part in found)
    return values.flip(0), vectors.flip(1)


def eigenvalues_descending(gram: Float[Tensor, "n n"]) -> Float[Tensor, "n"]:
    """Eigenvalues of a symmetric matrix, descending. Raises ConvergenceError.

    >>> eigenvalues_descending(torch.eye(2)).tolist()
    [1.0, 1.0]
    """
    with _one_thread():
        return _solved(torch.linalg.eigvalsh, gram).flip(0)


def _lapack_eigh(matrix):
    return scipy.linalg.eigh(matrix, driver="evd", check_finite=False, overwrite_a=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _solved(solver, matrix):
    try:
        return solver(matrix)
    except (torch.linalg.LinAlgError, scipy.linalg.LinAlgError) as error:
        raise ConvergenceError(
            "the eigenvalue solver did not converge", where="eigh", found=str(error)
        ) from None
