"""An allocation without an integer programme: one price of size, then what is left is spent.

Where the budget is relaxed into a price (Everett 1963, "Generalized Lagrange multiplier method"),
every unit takes the candidate of least loss + price * size by itself, and matrices choose between
their own candidates and those of their groups. A size is a number of parameters, or of stored bits.
The price at which all just fits is found by bisection. What it leaves unspent, less than one step
of one unit, goes to the exchanges that save most loss for their size. Optimal on the lower convex
hull of the candidates.

Its prices also bound every allocation from below, which spares the integer programme most
candidates: of the 17,758 of SmolLM2 at keep 0.8 764 were left, and HiGHS took 0.05 s instead of 29.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from qll.convert.candidates import Candidate

# bisections of the price: 2^-60 of the interval is below the spacing of float64
HALVINGS = 60
ROUNDING = 1e-9


@dataclass(frozen=True)
class Menu:
    """The candidates of one unit, as arrays."""

    items: tuple[Candidate, ...]
    sizes: Float64[np.ndarray, " items"]
    losses: Float64[np.ndarray, " items"]

    def at(self, price: float) -> tuple[float, Candidate]:
        """(cost, candidate) of least loss + price * size."""
        costs = self.losses + price * self.sizes
        best = int(costs.argmin())
        return float(costs[best]), self.items[best]


def lagrangian(candidates: Sequence[Candidate], budget: int) -> list[Candidate] | None:
    """The candidates that cover every matrix once within `budget`, or None when even
    the smallest do not fit. Near the least loss: see the module.

    >>> from qll.convert.units import Unit
    >>> a, b = Unit(("a",), ((2, 2),)), Unit(("b",), ((2, 2),))
    >>> menu = [Candidate(a, None, 4, 0.0), Candidate(a, None, 2, 3.0),
    ...         Candidate(b, None, 4, 0.0), Candidate(b, None, 2, 1.0)]
    >>> [item.size for item in lagrangian(menu, budget=6)]
    [4, 2]
    """
    families = list(_families(candidates))
    price = _price(families, candidates, budget)
    return None if price is None else _spent(families, _chosen(families, price), budget)


def contenders(candidates: Sequence[Candidate], budget: int) -> list[Candidate]:
    """Those that an allocation at least as good as `lagrangian`'s may hold; all, where it has none.

    At any price the least costs of all families, less the price of the budget, bound the loss from
    below, and a candidate raises that bound by what choosing it costs its family. Those that raise
    it above a loss that can be had are in no better allocation (fixing by reduced costs).

    >>> from qll.convert.units import Unit
    >>> a, b = Unit(("a",), ((2, 2),)), Unit(("b",), ((2, 2),))
    >>> menu = [Candidate(a, None, 4, 0.0), Candidate(a, None, 2, 3.0),
    ...         Candidate(b, None, 4, 0.0), Candidate(b, None, 2, 1.0)]
    >>> [(item.unit.name, item.size) for item in contenders(menu, budget=6)]
    [('a', 4), ('b', 4), ('b', 2)]
    """
    families = list(_families(candidates))
    price = _price(families, candidates, budget)
    if price is None:
        return list(candidates)
    known = sum(item.loss for item in _spent(families, _chosen(families, price), budget))
    costs = [_costs(family, price) for family in families]
    bound = sum(best for best, _ in costs) - price * budget
    spare = known - bound + ROUNDING * known
    return [
        item
        for best, dear in costs
        for menu, totals in dear
        for item, total in zip(menu.items, totals, strict=True)
        if total - best <= spare
    ]


def _price(
    families: Sequence[list[Menu]], candidates: Sequence[Candidate], budget: int
) -> float | None:
    """The least price of size at which the budget suffices; None where none does."""
    # at this price one unit of size outweighs every loss there is
    low, high = 0.0, sum(item.loss for item in candidates) + 1.0
    chosen = _chosen(families, high)
    matrices = {member for item in candidates for member in item.unit.members}
    covered = {member for item in chosen for member in item.unit.members}
    if covered != matrices or _size(chosen) > budget:
        return None
    for _ in range(HALVINGS):
        middle = (low + high) / 2 if low else high / 2**10
        if _size(_chosen(families, middle)) <= budget:
            high = middle
        else:
            low = middle
    return high


def _costs(family: list[Menu], price: float) -> tuple[float, list[tuple[Menu, np.ndarray]]]:
    """The least cost of a cover of `family`, and per menu that of a cover with each candidate."""
    offers = [menu.at(price) for menu in family]
    matrices = frozenset(member for _, item in offers for member in item.unit.members)
    found = []
    for menu in family:
        others, _ = _cover(offers, matrices - frozenset(menu.items[0].unit.members))
        found.append((menu, menu.losses + price * menu.sizes + others))
    return _cover(offers, matrices)[0], found


def _families(candidates: Sequence[Candidate]) -> Iterator[list[Menu]]:
    """Menus of the units that compete for the same matrices, one list per set of matrices."""
    by_unit: dict[tuple[str, ...], list[Candidate]] = {}
    for item in candidates:
        by_unit.setdefault(item.unit.members, []).append(item)
    family_of: dict[str, set[str]] = {}
    for members in by_unit:
        merged = set(members).union(*(family_of.get(member, set()) for member in members))
        family_of |= dict.fromkeys(merged, merged)
    grouped: dict[frozenset[str], list[Menu]] = {}
    for members, items in by_unit.items():
        menu = Menu(
            tuple(items),
            np.array([item.size for item in items], dtype=float),
            np.array([item.loss for item in items], dtype=float),
        )
        grouped.setdefault(frozenset(family_of[members[0]]), []).append(menu)
    yield from grouped.values()


def _chosen(families: Sequence[list[Menu]], price: float) -> list[Candidate]:
    """The cheapest cover of every family at `price`."""
    chosen: list[Candidate] = []
    for family in families:
        offers = [menu.at(price) for menu in family]
        matrices = {member for _, item in offers for member in item.unit.members}
        chosen += _cover(offers, frozenset(matrices))[1]
    return chosen


def _cover(
    offers: Sequence[tuple[float, Candidate]], open_: frozenset[str]
) -> tuple[float, list[Candidate]]:
    """The cheapest offers that cover the matrices of `open_`, each once; infinite without any."""
    if not open_:
        return 0.0, []
    first, best = min(open_), (float("inf"), [])
    for cost, item in offers:
        members = frozenset(item.unit.members)
        if first in members and members <= open_:
            rest, others = _cover(offers, open_ - members)
            best = min(best, (cost + rest, [item, *others]), key=lambda pair: pair[0])
    return best


def _spent(families: Sequence[list[Menu]], chosen: list[Candidate], budget: int) -> list[Candidate]:
    """`chosen` with candidates exchanged within their units while the budget lasts, the greatest
    saving of loss for its size first."""
    menus = {menu.items[0].unit.members: menu for family in families for menu in family}
    taken = {item.unit.members: item for item in chosen}
    left = budget - _size(chosen)
    while exchange := max(_exchanges(menus, taken, left), key=lambda pair: pair[0], default=None):
        item = exchange[1]
        left -= item.size - taken[item.unit.members].size
        taken[item.unit.members] = item
    return list(taken.values())


def _exchanges(
    menus: dict[tuple[str, ...], Menu], taken: dict[tuple[str, ...], Candidate], left: int
) -> Iterator[tuple[float, Candidate]]:
    """(loss saved for its size, candidate) of every better candidate that `left` pays for."""
    for members, now in taken.items():
        menu = menus[members]
        more = menu.sizes - now.size
        saved = now.loss - menu.losses
        fits = (more <= left) & (saved > 0)
        if fits.any():
            rates = np.where(fits, saved / np.maximum(more, 1e-9), -np.inf)
            best = int(rates.argmax())
            yield float(rates[best]), menu.items[best]


def _size(chosen: Sequence[Candidate]) -> int:
    return sum(item.size for item in chosen)
