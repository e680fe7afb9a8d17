"""Where the cores of a tree stand: post-order numbering, wiring, shapes and einsum terms.

Pure integers and strings, shared by everything in `qll.tn.tree`; nothing here sees a tensor.

>>> [(node.first, node.last, node.parent) for node in nodes(3)]
[(0, 1, 2), (1, 2, 2), (0, 2, 3), (2, 3, -1)]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from string import ascii_lowercase, ascii_uppercase

TOKEN = "z"  # the einsum index of tokens; bonds and legs of 12 sites do not reach it


@dataclass(frozen=True)
class Node:
    """Sites first..last-1 below a core, its children's positions, and where its bond leads."""

    first: int
    last: int
    children: tuple[int, ...]
    parent: int
    leg: int


@lru_cache(maxsize=64)
def nodes(sites: int) -> tuple[Node, ...]:
    """The balanced tree over `sites` leaves in post-order; the last node is the sink.

    The sink takes the bond of the left half on leg 2, where other cores have their own bond.

    >>> nodes(2)[0]
    Node(first=0, last=1, children=(), parent=1, leg=2)
    """
    found: list[Node] = []

    def grow(first: int, last: int) -> int:
        children: tuple[int, ...] = ()
        if last - first > 1:
            middle = first + (last - first + 1) // 2
            children = (grow(first, middle), grow(middle, last))
        found.append(Node(first, last, children, -1, 2))
        for leg, child in enumerate(children):
            found[child] = replace(found[child], parent=len(found) - 1, leg=leg)
        return len(found) - 1

    left = grow(0, (sites + 1) // 2)
    sink = grow((sites + 1) // 2, sites)
    found[left] = replace(found[left], parent=sink, leg=2)
    return tuple(found)


@lru_cache(maxsize=64)
def leaves(sites: int) -> tuple[int, ...]:
    """Positions of the leaves among the cores, by site.

    >>> leaves(4)
    (0, 1, 3, 4)
    """
    return tuple(k for k, node in enumerate(nodes(sites)) if not node.children)


@lru_cache(maxsize=1024)
def last_bond(sites: int, position: int) -> int:
    """The bond on leg 2 of a core: its own, or for the sink that of the left half.

    >>> [last_bond(4, position) for position in range(6)]
    [0, 1, 2, 3, 4, 2]
    """
    tree = nodes(sites)
    if position < len(tree) - 1:
        return position
    return next(k for k, node in enumerate(tree[:-1]) if (node.parent, node.leg) == (position, 2))


@lru_cache(maxsize=1024)
def core_shapes(
    out: tuple[int, ...], into: tuple[int, ...], ranks: tuple[int, ...]
) -> tuple[tuple[int, int, int], ...]:
    """Shapes of all cores, nothing left out: [m, n, r] for a leaf, [r_left, r_right, r] above.

    >>> core_shapes((2, 3, 4), (5, 6, 7), (8, 9, 10))
    ((2, 5, 8), (3, 6, 9), (8, 9, 10), (4, 7, 10))
    """
    shapes = []
    for position, node in enumerate(nodes(len(out))):
        below = [ranks[child] for child in node.children] or [out[node.first], into[node.first]]
        shapes.append((below[0], below[1], ranks[last_bond(len(out), position)]))
    return tuple(shapes)


def lowered(out: Sequence[int], into: Sequence[int], ranks: Sequence[int]) -> list[int]:
    """Every rank lowered to the product of the other two legs, core after core, once.

    >>> lowered((2, 3), (2, 2), [9])
    [4]
    """
    result, sites = list(ranks), len(out)
    for position, node in enumerate(nodes(sites)):
        bond = last_bond(sites, position)
        if not node.children:
            result[bond] = min(result[bond], out[node.first] * into[node.first])
            continue
        bonds = (*node.children, bond)
        for own in bonds:
            others = math.prod(result[other] for other in bonds if other != own)
            result[own] = min(result[own], others)
    return result


def core_terms(sites: int) -> list[str]:
    """Einsum terms of the cores: bond k is the k-th small letter, site k has two capitals.

    >>> core_terms(3)
    ['ABa', 'CDb', 'abc', 'EFc']
    """
    terms = []
    for position, node in enumerate(nodes(sites)):
        below = [ascii_lowercase[child] for child in node.children]
        own = below or ascii_uppercase[2 * node.first : 2 * node.first + 2]
        terms.append("".join(own) + ascii_lowercase[last_bond(sites, position)])
    return terms


@lru_cache(maxsize=64)
def applied(sites: int) -> str:
    """The einsum equation of x [tokens, in legs] and the cores.

    >>> applied(2)
    'zBD,ABa,CDa->zAC'
    """
    terms = core_terms(sites)
    out, into = ("".join(terms[k][side] for k in leaves(sites)) for side in (0, 1))
    return f"{TOKEN}{into},{','.join(terms)}->{TOKEN}{out}"
