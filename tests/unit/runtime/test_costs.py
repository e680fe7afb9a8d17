"""Measured costs are remembered, damaged ones measured again, and they choose the cheapest form."""

from __future__ import annotations

import json

import pytest
import torch
from torch.testing import assert_close

from qll.runtime import DeviceCosts, Line, costs
from qll.runtime.costs import arranged, device_costs, measure
from qll.runtime.forms import Factors, Pivoted, Whole, seconds
from qll.runtime.kernels import CODED, Packed, Plain, available, coded_kernel, coded_kernels
from qll.runtime.program import Program, Site, choose
from qll.tn.gauge import interpolative, row_order
from qll.tn.packed import Packing, dequantise, pack
from tests.unit.runtime.conftest import flat


def small_measure(device, dtype):
    return measure(device, dtype, cold_bytes=1, repeats=1)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLL_CACHE", str(tmp_path))
    monkeypatch.setattr(costs, "measure", small_measure)
    monkeypatch.setattr(costs, "TOKENS", (1, 4))
    return tmp_path


def test_costs_are_measured_once(cache, monkeypatch):
    first = device_costs("cpu", torch.float32)
    assert first.product(1, 512, 512) > 0
    # larger is dearer by the same kernel; one measurement is too noisy to compare two
    for lines in first.products.values():
        assert all(line.start >= 0 and line.at(1_000_000) > line.at(10_000) for line in lines)
    monkeypatch.setattr(costs, "measure", None)
    assert device_costs("cpu", torch.float32) == first
    monkeypatch.setattr(costs, "measure", small_measure)
    device_costs("cpu", torch.bfloat16)
    assert len(list(cache.iterdir())) == 2
    torch.set_num_threads(1 + torch.get_num_threads())
    try:
        device_costs("cpu", torch.float32)
    finally:
        torch.set_num_threads(torch.get_num_threads() - 1)
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("text", ["", "[]", '{"tokens": [1]}', "damaged"])
def test_a_damaged_cache_is_measured_again(cache, text):
    first = device_costs("cpu", torch.float32)
    (path,) = cache.iterdir()
    path.write_text(text)
    again = device_costs("cpu", torch.float32)
    assert again.tokens == first.tokens
    assert json.loads(path.read_text())["tokens"] == [1, 4]


def pivoted(out=48, into=40, rank=16, seed=0):
    draw = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(*s, generator=draw).double() for s in ((out, rank), (rank, into)))
    rest, pivots = interpolative(left)
    return Pivoted(rest, left[pivots] @ right, row_order(pivots, out)), left @ right


def test_permuted_forms_are_the_permuted_matrix():
    form, matrix = pivoted()
    rows, columns = torch.randperm(48), torch.randperm(40)
    x = torch.randn(3, 40).double()
    left = torch.linalg.qr(matrix).Q
    for other in (form, Whole(matrix), Factors(left, left.mT @ matrix)):
        found = Program((other.permuted(rows, columns),), "plain")(x)
        assert_close(found, x @ matrix[rows][:, columns].mT)
    placed = form.permuted(form.stored_rows(), None)
    assert placed.order is None
    assert_close(Program((placed,), "plain")(x), x @ matrix[form.stored_rows()].mT)


def test_the_cheapest_form_is_chosen_for_few_and_for_many_tokens():
    form, matrix = pivoted()
    candidates = [[form, Whole(matrix)]]
    # moving numbers is free: the fewest numbers win everywhere
    assert choose(candidates, flat()) == ([(form,)], 16)
    # it costs more than it saves
    assert choose(candidates, flat(gather=100.0)) == ([(candidates[0][1],)], 16)
    # it costs much for many tokens alone
    lines = tuple(Line(0.0, float(count)) for count in (1, 16))
    moves = (Line(0.0, 0.0), Line(0.0, 1e4))
    mixed = DeviceCosts((1, 16), {"plain": lines}, moves, moves)
    chosen, few = choose(candidates, mixed)
    assert chosen == [(form,), (candidates[0][1],)]
    assert few == 1
    site = Site([Program(forms, "plain") for forms in chosen], few)
    x = torch.randn(5, 40).double()
    assert_close(site(x), x @ matrix.mT)
    assert_close(site(x[:1]), x[:1] @ matrix.mT)


@pytest.mark.parametrize("start", [0.0, 50.0, 1e3, 1e5])
@pytest.mark.parametrize("gather", [0.0, 3.0, 30.0])
def test_no_choice_is_slower_than_dense_by_the_measured_costs(start, gather):
    costs = flat(start=start, gather=gather)
    candidates = [[pivoted(seed=i)[0], Whole(pivoted(seed=i)[1])] for i in range(3)]
    chosen, few = choose(candidates, costs)
    dense = tuple(forms[-1] for forms in candidates)
    for tokens in costs.tokens:
        forms = chosen[0] if tokens <= few else chosen[-1]
        assert seconds(forms, tokens, costs) <= 1.03 * seconds(dense, tokens, costs)


@pytest.mark.parametrize("tokens", [1, 6])
def test_pieces_are_put_in_order(tokens):
    pieces = [torch.randn(tokens, n) for n in (3, 4)]
    order = torch.randperm(7)
    assert torch.equal(arranged(pieces, order), torch.cat(pieces, 1)[:, order])
    assert torch.equal(arranged(pieces), torch.cat(pieces, 1))


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_kernels_compute_the_product(tokens):
    x, matrix = torch.randn(tokens, 64), torch.randn(48, 64)
    exact = x @ matrix.mT
    assert_close(Plain(matrix)(x), exact)
    half = Plain(matrix.half())(x)
    assert half.dtype == torch.float32
    assert (half - exact).norm() < 0.003 * exact.norm()
    assert available(torch.float16, torch.device("cpu")) == ["plain"]
    if "packed" in available(torch.float32, torch.device("cpu")):
        assert_close(Packed(matrix)(x), exact)
    if "packed" in available(torch.bfloat16, torch.device("cpu")):
        low = matrix.bfloat16()
        expected = x.bfloat16().float() @ low.float().mT
        assert (Packed(low)(x) - expected).norm() < 0.004 * expected.norm()


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 64)])
def test_the_kernels_for_codes_read_ours(bits, group):
    packing, shape = Packing(bits, group), (32, 64)
    name = coded_kernel(packing, shape)
    assert name == f"int{bits}"
    assert name in coded_kernels(torch.bfloat16, torch.device("cpu"))
    codes = torch.randint(-8, 8, shape, dtype=torch.int8)
    scales = (torch.randn(32, 64 // group) / 10).bfloat16()
    matrix = dequantise(pack(codes, bits), scales.float(), shape, packing)
    x = torch.randn(3, 64)
    expected = x.bfloat16().float() @ matrix.mT
    found = CODED[name](codes, scales, group)(x)
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_other_codes_have_no_kernel():
    assert coded_kernel(Packing(8, 32), (32, 64)) is None
    assert coded_kernel(Packing(4, 32), (30, 64)) is None
    assert coded_kernel(Packing(3, 32), (32, 64)) is None
    assert coded_kernel(Packing(4, 64), (64, 32)) is None  # its groups run along columns
    for dtype in (torch.float32, torch.float16):
        assert coded_kernels(dtype, torch.device("cpu")) == []
