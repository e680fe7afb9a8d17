"""Three forms of a matrix state, against complex arithmetic and triangular solves of torch."""

from __future__ import annotations

import pytest
import torch

from qll.bytelm.complex_numbers import times_i
from qll.bytelm.matrix_state import Writes, chunked, recurrent, unit_lower_inverse

SEQ, D_KEY, D_VALUE = 21, 6, 4


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def writes(many: int, delta: bool, repeat: bool = False) -> Writes:
    """Random writes of unit keys; complex ones come in pairs (k, v) and (ik, iv)."""
    keys = random(2, 3, SEQ, D_KEY, seed=1)
    if repeat:
        keys = keys[:, :, :1].expand_as(keys)
    keys, values = keys / keys.norm(dim=-1, keepdim=True), random(2, 3, SEQ, D_VALUE, seed=2)
    keys, values = (
        torch.stack((x, times_i(x)), dim=-2) if many == 2 else x[..., None, :]
        for x in (keys, values)
    )
    rate = random(2, 3, SEQ, seed=4).sigmoid() if delta else None
    return Writes(random(2, 3, SEQ, D_KEY), keys, values, -random(2, 3, SEQ, seed=3).abs(), rate)


@pytest.mark.parametrize("many", [1, 2])
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 8, SEQ, 64])
def test_chunked_and_parallel_forms_are_the_recurrent_one(many, delta, chunk):
    state = random(2, 3, D_KEY, D_VALUE, seed=5)
    expected = recurrent(writes(many, delta), state)
    found = chunked(writes(many, delta), state, chunk)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("delta", [False, True])
def test_two_writes_are_complex_arithmetic(delta):
    def as_complex(x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())

    given = writes(2, delta)
    reads, _ = chunked(given, torch.zeros(2, 3, D_KEY, D_VALUE, dtype=torch.float64), 8)
    queries = as_complex(given.queries)
    keys, values = as_complex(given.keys[..., 0, :]), as_complex(given.values[..., 0, :])
    state = torch.zeros(2, 3, D_VALUE // 2, D_KEY // 2, dtype=torch.complex128)
    for t in range(SEQ):
        state = state * given.log_decay[:, :, t, None, None].exp()
        key, value = keys[:, :, t, :, None], values[:, :, t, :, None]
        if delta:
            value = (value - state @ key) * given.rate[:, :, t, None, None]
        state = state + value @ key.mH
        read = (state @ queries[:, :, t, :, None])[..., 0]
        torch.testing.assert_close(as_complex(reads[:, :, t]), read, rtol=0, atol=1e-12)


def test_a_key_written_twice_gives_the_last_value_of_the_delta_rule_and_the_sum_of_the_other():
    key = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 1, 2, 2)
    values = torch.tensor([[1.0], [5.0]], dtype=torch.float64)[None, None, :, None]
    start, still = torch.zeros(1, 1, 2, 1).double(), torch.zeros(1, 1, 2).double()
    for rate, read in ((still + 1, 5.0), (None, 6.0)):
        given = Writes(key, key[..., None, :], values, still, rate)
        assert chunked(given, start, 2)[0][0, 0, 1].item() == pytest.approx(read)


def test_repeated_keys_lose_no_digits_in_single_precision():
    given = writes(1, delta=True, repeat=True)
    single = Writes(
        *(getattr(given, name).float() for name in ("queries", "keys", "values", "log_decay")),
        torch.ones(2, 3, SEQ),
    )
    still = Writes(single.queries, single.keys, single.values, 0 * single.log_decay, single.rate)
    start = torch.zeros(2, 3, D_KEY, D_VALUE)
    expected = recurrent(still, start)[0]
    torch.testing.assert_close(chunked(still, start, 64)[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 5, 16, 33])
def test_the_inverse_of_a_unit_triangular_matrix(size):
    below = random(3, size, size).tril(-1)
    one = torch.eye(size, dtype=torch.float64)
    expected = torch.linalg.solve_triangular(
        one + below, one.expand_as(below), upper=False, unitriangular=True
    )
    torch.testing.assert_close(unit_lower_inverse(below), expected)


@pytest.mark.parametrize("many", [1, 2])
@pytest.mark.parametrize("delta", [False, True])
def test_gradients(many, delta):
    given = writes(many, delta)
    names = ["queries", "keys", "values", "log_decay"] + (["rate"] if delta else [])
    tensors = [
        getattr(given, name)[:1, :1, :5].clone().requires_grad_(name != "queries") for name in names
    ]
    start = random(1, 1, D_KEY, D_VALUE).requires_grad_()

    def reads(state, *parts):
        return chunked(Writes(*parts), state, 3)

    assert torch.autograd.gradcheck(reads, (start, *tensors))
