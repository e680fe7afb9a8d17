"""Contraction plans: right result, least work, planned once."""

from __future__ import annotations

from math import prod

import opt_einsum
import pytest
import torch

from qll.tn import contract as room
from qll.tn.contract import bucket, chain, contract, plan


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sweep_flops(tokens, out, into, ranks, reverse=False):
    """The formula of a sweep: 2 B sum_k r_{k-1} r_k (m_1 .. m_k) (n_k .. n_d)."""
    if reverse:
        out, into, ranks = out[::-1], into[::-1], ranks[::-1]
    bonds = (1, *ranks, 1)
    return (
        2
        * tokens
        * sum(
            bonds[k] * bonds[k + 1] * prod(out[: k + 1]) * prod(into[k:]) for k in range(len(out))
        )
    )


def rebuild_flops(tokens, out, into, ranks):
    """Merge cores left to right, then a dense product."""
    sizes = [m * n for m, n in zip(out, into, strict=True)]
    bonds = (1, *ranks, 1)
    merges = sum(2 * prod(sizes[: k + 1]) * bonds[k] * bonds[k + 1] for k in range(1, len(sizes)))
    return merges + 2 * tokens * prod(sizes)


def shapes(tokens, out, into, ranks):
    cores = [
        (left, m, n, right)
        for left, m, n, right in zip((1, *ranks), out, into, (*ranks, 1), strict=True)
    ]
    return ((tokens, *into), cores[0][1:], *cores[1:-1], cores[-1][:-1])


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_contract_is_einsum(tokens):
    x, first, second = noise(tokens, 3, 4, 2), noise(5, 3, 6), noise(6, 2, 4, 3)
    third = noise(3, 4, 2)
    found = contract(chain(3, True), x, first, second, third, tokens="a")
    expected = torch.einsum("txyz,axp,pbyq,qcz->tabc", x, first, second, third)
    torch.testing.assert_close(found, expected)
    dense = contract(chain(3, False), first, second, third)
    torch.testing.assert_close(dense, torch.einsum("axp,pbyq,qcz->axbycz", first, second, third))


def test_one_and_two_operands():
    x, core = noise(5, 4), noise(3, 4)
    torch.testing.assert_close(contract(chain(1, True), x, core, tokens="a"), x @ core.mT)
    torch.testing.assert_close(contract(chain(1, False), core), core)
    torch.testing.assert_close(contract("ab->b", x), x.sum(0))


@pytest.mark.parametrize("tokens", [1, 16, 4096])
@pytest.mark.parametrize(
    ("out", "into", "ranks"),
    [
        ((16, 16, 56), (16, 16, 16), (16, 16)),
        ((4, 3584), (1024, 4), (256,)),
        ((3584, 4), (4, 1024), (256,)),
        ((8, 8, 9), (9, 8, 8), (60, 60)),
        ((8, 8, 8, 28), (8, 8, 8, 8), (16, 16, 16)),
    ],
)
def test_no_sweep_and_no_rebuild_is_cheaper(tokens, out, into, ranks):
    found = plan(chain(len(out), True), shapes(tokens, out, into, ranks), "a").flops()
    assert found <= sweep_flops(tokens, out, into, ranks)
    assert found <= sweep_flops(tokens, out, into, ranks, reverse=True)
    assert found <= rebuild_flops(tokens, out, into, ranks)


def test_the_direction_follows_the_shapes():
    """Two asymmetric cores: the wrong direction costs 400 times the right one."""
    good = plan(chain(2, True), shapes(1, (4, 3584), (1024, 4), (256,)), "a").flops()
    mirror = plan(chain(2, True), shapes(1, (3584, 4), (4, 1024), (256,)), "a").flops()
    assert good == mirror
    assert good == pytest.approx(0.32 * 2 * 14336 * 4096, rel=0.02)


def test_few_tokens_sweep_and_many_rebuild():
    out, into, ranks = (8, 8, 9), (9, 8, 8), (60, 60)
    few = plan(chain(3, True), shapes(1, out, into, ranks), "a")
    many = plan(chain(3, True), shapes(4096, out, into, ranks), "a")
    dense = 2 * 4096 * 576 * 576
    assert few.flops() < 0.5 * rebuild_flops(1, out, into, ranks)
    assert many.flops() == rebuild_flops(4096, out, into, ranks)
    assert dense < many.flops() < 1.1 * dense


def test_flops_count_multiplications_and_additions():
    assert plan("ab,bc->ac", ((3, 4), (4, 5))).flops() == 2 * 3 * 4 * 5
    assert plan("a,b->ab", ((3,), (4,))).flops() == 12
    assert plan("ab,bc->ac", ((6, 4), (4, 5)), "a").flops({"a": 6}) == 2 * 6 * 4 * 5


def test_a_shape_is_planned_once_per_power_of_two(monkeypatch):
    calls = []
    search = opt_einsum.contract_path
    monkeypatch.setattr(
        room.opt_einsum, "contract_path", lambda *a, **k: calls.append(a) or search(*a, **k)
    )
    cores = noise(11, 3, 4), noise(4, 13, 3)
    for tokens in (5, 6, 7, 8, 5):
        contract("tij,aib,bcj->tac", noise(tokens, 3, 3), *cores, tokens="t")
    assert len(calls) == 1
    contract("tij,aib,bcj->tac", noise(9, 3, 3), *cores, tokens="t")
    assert len(calls) == 2


def test_gradients_flow_through_a_plan():
    shapes = (3, 4, 2), (5, 4, 3), (3, 2, 2)
    x, first, second = (noise(*shape).requires_grad_() for shape in shapes)
    assert torch.autograd.gradcheck(
        lambda *tensors: contract(chain(2, True), *tensors, tokens="a"), (x, first, second)
    )


def test_bucket():
    assert [bucket(tokens) for tokens in (0, 1, 2, 3, 4, 1000)] == [1, 1, 2, 4, 4, 1024]
