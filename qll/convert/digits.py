"""Numbers as they are recorded: the last bits of a sum depend on where its terms lie in memory, and
a resumed run must leave the same bytes."""

from __future__ import annotations

# relative errors below this are roundings of zero
NOTHING = 1e-20


def significant(value: float) -> float:
    """`value` to six digits: of an error near rounding no more are its own.

    >>> significant(0.1 + 0.2), significant(2.6e-30)
    (0.3, 0.0)
    """
    return float(f"{value:.6g}") if abs(value) > NOTHING else 0.0
