"""Work as counts of a few kinds of operation, and machines as rates of the same kinds.

A count is the leading term of the textbook algorithm (Golub and Van Loan, Matrix Computations), a
rate the same count over measured seconds; what an algorithm really does is thereby in the rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# kinds of operation and their counts for a square matrix of size n
COUNTS = {
    "product": lambda n: 2 * n**3,  # float64 matrix product
    "cholesky": lambda n: 4 / 3 * n**3,  # with the inverse of the triangle
    "eigenvalues": lambda n: 4 / 3 * n**3,
    "eigenvectors": lambda n: 9 * n**3,
    "pivots": lambda n: n**3 / 2,  # QR with pivoting of n rows and n / 2 columns
    "forward": lambda n: 2 * n**3,  # float32 matrix product
    "coarse": lambda n: 2 * n**3,  # bfloat16 matrix product, float32 where that is faster
    "vector": lambda n: 2 * n**2,  # float32 matrix times vector, from memory
}
# kinds that are no arithmetic: memory traffic, calls of a block (their overhead), plain seconds
OTHERS = ("bytes", "calls", "fixed")
Rates = Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Operation:
    """`count` elementary steps of one kind on matrices of `size`."""

    kind: str
    count: float
    size: int = 0

    def times(self, factor: float | int) -> Operation:
        """The same, `factor` times."""
        return Operation(self.kind, self.count * factor, self.size)


def flops(work: Iterable[Operation]) -> float:
    """Floating point operations in `work`."""
    return sum(item.count for item in work if item.kind not in OTHERS)


def seconds(work: Iterable[Operation], rates: Rates) -> float:
    """Time of `work`, one after the other.

    >>> rates = {"product": {100: 1e9, 10000: 3e9}, "bytes": {1: 1e10}}
    >>> seconds([Operation("product", 4e9, 1000), Operation("bytes", 1e10)], rates)
    3.0
    """
    return sum(item.count / rate(rates[item.kind], item.size) for item in work)


def rate(known: Mapping[int, float], size: int) -> float:
    """The rate at `size`, linear in log(size) between the sizes known, constant outside.

    >>> rate({100: 1.0, 10000: 3.0}, 1000)
    2.0
    """
    sizes = sorted(known)
    if size <= sizes[0]:
        return known[sizes[0]]
    if size >= sizes[-1]:
        return known[sizes[-1]]
    above = next(k for k, other in enumerate(sizes) if other >= size)
    low, high = sizes[above - 1], sizes[above]
    share = math.log(size / low) / math.log(high / low)
    return (1 - share) * known[low] + share * known[high]
