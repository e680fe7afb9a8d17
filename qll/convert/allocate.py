"""Which candidate each matrix gets: least predicted loss under one budget.

An integer programme (scipy's HiGHS): one binary per candidate; each matrix is covered exactly once,
by a candidate of its own or of a group it is in; the sizes (numbers, or stored bits) sum to at most
the budget. A Lagrangian relaxation (`lagrange`) first rules out what no best allocation holds, and
takes the place of HiGHS, with a warning, where that fails or runs out of time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from qll.convert.candidates import Candidate
from qll.convert.lagrange import contenders, lagrangian
from qll.errors import UsageError

GAP = 1e-4
SECONDS = 120.0  # thirty blocks take a fraction of one on an idle machine
INFEASIBLE = 2  # status of scipy.optimize.milp

logger = logging.getLogger("qll.convert")


def choose(
    candidates: Sequence[Candidate], budget: int, seconds: float = SECONDS
) -> list[Candidate]:
    """The candidates that cover every matrix once with least loss, sizes within `budget`.

    Exact to a relative gap of 1e-4 in the loss, or, when HiGHS takes more than `seconds` or fails,
    the better of what it has and the Lagrangian relaxation, with a warning. Raises UsageError when
    even the smallest candidates do not fit.

    >>> from qll.convert.units import Unit
    >>> a, b = Unit(("a",), ((2, 2),)), Unit(("b",), ((2, 2),))
    >>> menu = [Candidate(a, None, 4, 0.0), Candidate(a, None, 2, 3.0),
    ...         Candidate(b, None, 4, 0.0), Candidate(b, None, 2, 1.0)]
    >>> [item.size for item in choose(menu, budget=6)]
    [4, 2]
    """
    exact, status, why = _programme(contenders(candidates, budget), budget, seconds)
    if status != 0:
        relaxed = None if status == INFEASIBLE else lagrangian(candidates, budget)
        if exact is None and relaxed is None:
            flag, kind = (
                ("--bits_per_weight", "bits") if candidates[0].bits else ("--keep", "parameters")
            )
            raise UsageError(
                "the budget is too small for this format",
                where=flag,
                expected=f"at least {_least(candidates)} {kind}",
                found=budget,
                hint=f"raise {flag} or choose another --format",
            )
        exact = min(filter(None, (exact, relaxed)), key=_loss)
        logger.warning("the allocation is not proven optimal: HiGHS stopped (%s)", why)
    return sorted(exact, key=lambda item: (item.unit.block or 0, item.unit.name))


def _programme(
    candidates: Sequence[Candidate], budget: int, seconds: float
) -> tuple[list[Candidate] | None, int, str]:
    """(the choice of HiGHS or None, scipy's status, its message)."""
    matrices = sorted({member for item in candidates for member in item.unit.members})
    row = {matrix: k for k, matrix in enumerate(matrices)}
    pairs = [(row[member], k) for k, item in enumerate(candidates) for member in item.unit.members]
    rows, columns = zip(*pairs, strict=True)
    cover = csr_matrix(
        (np.ones(len(pairs)), (rows, columns)), shape=(len(matrices), len(candidates))
    )
    # sizes in units of the budget and losses in units of the largest keep HiGHS well scaled
    sizes = np.array([item.size for item in candidates]) / budget
    losses = np.array([item.loss for item in candidates])
    losses = losses / max(losses.max(), 1e-300)
    result = milp(
        losses,
        constraints=[
            LinearConstraint(cover, 1, 1),
            LinearConstraint(csr_matrix(sizes), 0, 1),
        ],
        integrality=np.ones(len(candidates)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": GAP, "time_limit": seconds},
    )
    if result.x is None:
        return None, result.status, result.message
    chosen = [item for item, taken in zip(candidates, result.x, strict=True) if taken > 0.5]
    return chosen, result.status, result.message


def _loss(chosen: Sequence[Candidate]) -> float:
    return sum(item.loss for item in chosen)


def _least(candidates: Sequence[Candidate]) -> int:
    """The size of the smallest candidate of every single matrix, summed."""
    smallest: dict[str, int] = {}
    for item in candidates:
        share = item.size / len(item.unit.members)
        for member in item.unit.members:
            smallest[member] = int(min(smallest.get(member, share), share))
    return sum(smallest.values())
