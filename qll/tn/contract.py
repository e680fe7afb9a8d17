"""Contraction of a few tensors in the cheapest order, planned once per shape.

opt_einsum finds the order by dynamic programming over FLOPs; for a matrix product operator times
tokens that covers the sweep from the left, from the right, from both ends, and rebuilding the
matrix first (which costs about as much as `rank` tokens of the dense product, so it wins for
long batches). The plan is remembered, and running it is a handful of two-operand einsums, which
autograd, torch.compile and half precision all take. Token counts are planned in powers of two.

>>> x, left, right = torch.ones(3, 8), torch.ones(2, 8), torch.ones(6, 2)
>>> contract("bi,ri,or->bo", x, left, right, tokens="b").shape
torch.Size([3, 6])
>>> plan("bi,ri,or->bo", ((1, 8), (2, 8), (6, 2)), "b").flops({"b": 3})
168
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from string import ascii_letters

import opt_einsum
import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One product: take operands `left` > `right` off the list, append the result."""

    left: int
    right: int
    equation: str


@dataclass(frozen=True)
class Plan:
    """The order of products for one equation, and the sizes of its indices."""

    steps: tuple[Step, ...]
    sizes: Mapping[str, int]

    def flops(self, sizes: Mapping[str, int] | None = None) -> int:
        """Multiplications and additions of all steps, with some index sizes replaced."""
        actual = {**self.sizes, **(sizes or {})}
        total = 0
        for step in self.steps:
            inputs, output = step.equation.split("->")
            indices = set(inputs) - {","}
            factor = 2 if indices - set(output) else 1
            total += factor * prod(actual[index] for index in indices)
        return total


@torch.compiler.assume_constant_result
def plan(equation: str, shapes: tuple[tuple[int, ...], ...], tokens: str = "") -> Plan:
    """The cheapest order for `equation` at `shapes`; index `tokens` is planned in a power of two.

    Searched once per argument. To torch.compile it is a constant of the graph.

    >>> [step.equation for step in plan("ab,bc,c->a", ((9, 8), (8, 7), (7,))).steps]
    ['c,bc->b', 'b,ab->a']
    """
    return _search(equation, shapes, tokens)


def contract(
    equation: str, *tensors: Float[Tensor, "..."], tokens: str = ""
) -> Float[Tensor, "..."]:
    """einsum(equation, *tensors) in the planned order; `tokens` names the batch index, if any.

    >>> contract("ab,bc,cd->ad", *[torch.eye(2)] * 3).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    order = _plan_of(equation, tensors, tokens)
    operands = list(tensors)
    for step in order.steps:
        left = operands.pop(step.left)
        if step.right < 0:
            operands.append(torch.einsum(step.equation, left))
        else:
            operands.append(torch.einsum(step.equation, left, operands.pop(step.right)))
    return operands[0]


def bucket(tokens: int) -> int:
    """The power of two at or above `tokens`; work is planned for it.

    >>> bucket(1), bucket(5), bucket(64)
    (1, 8, 64)
    """
    return 1 << max(tokens - 1, 0).bit_length()


@torch.compiler.assume_constant_result
def chain(sites: int, with_tokens: bool) -> str:
    """The einsum equation of an MPO of `sites` cores, alone or times x [tokens, n_1 .. n_d].

    Boundary bonds are left out: the first core is [m, n, r], the last [r, m, n]. The token index,
    if any, is "a".

    >>> chain(2, True), chain(2, False)
    ('abc,dbe,efc->adf', 'abc,cde->abde')
    """
    return _chain(sites, with_tokens)


@lru_cache(maxsize=4096)
def _search(equation: str, shapes: tuple[tuple[int, ...], ...], tokens: str) -> Plan:
    terms = equation.split("->")[0].split(",")
    sizes = {
        index: bucket(size) if index == tokens else size
        for term, shape in zip(terms, shapes, strict=True)
        for index, size in zip(term, shape, strict=True)
    }
    planned = [tuple(sizes[index] for index in term) for term in terms]
    _, info = opt_einsum.contract_path(equation, *planned, shapes=True, optimize="dp")
    steps = tuple(Step(*_pair(places), pair) for places, _, pair, *_ in info.contraction_list)
    return Plan(steps, sizes)


@lru_cache(maxsize=64)
def _chain(sites: int, with_tokens: bool) -> str:
    letters = iter(ascii_letters)
    token = next(letters) if with_tokens else ""
    into = [next(letters) for _ in range(sites)] if with_tokens else []
    out, cores, bond = [], [], ""
    for site in range(sites):
        leg_out = next(letters)
        leg_in = into[site] if with_tokens else next(letters)
        new_bond = next(letters) if site < sites - 1 else ""
        cores.append(bond + leg_out + leg_in + new_bond)
        out.append(leg_out if with_tokens else leg_out + leg_in)
        bond = new_bond
    operands = [token + "".join(into), *cores] if with_tokens else cores
    return f"{','.join(operands)}->{token}{''.join(out)}"


def _plan_of(equation: str, tensors: tuple[Tensor, ...], tokens: str) -> Plan:
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if tokens:  # equal buckets share one entry of the cache
        terms = equation.split("->")[0].split(",")
        shapes = [
            tuple(bucket(n) if index == tokens else n for index, n in zip(term, shape, strict=True))
            for term, shape in zip(terms, shapes, strict=True)
        ]
    return plan(equation, tuple(shapes), tokens)


def _pair(places: tuple[int, ...]) -> tuple[int, int]:
    return (places[0], places[1]) if len(places) == 2 else (places[0], -1)
