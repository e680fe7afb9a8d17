"""Packed tensors: what is on the grid comes back exactly, and bytes follow from shapes alone."""

import pytest
import torch

from qll.errors import ConfigError, NonFiniteError
from qll.tn.packed import Packing, as_rows, dequantise, from_rows, group_axis, pack
from qll.tn.rounding import round_in_metric, round_nearest

SHAPES = [(576, 64), (7, 40), (40, 3), (5, 5), (48, 9, 9, 1), (1, 8, 8, 33), (3, 1, 2), (1, 1)]


def stored(rounded, shape, packing):
    return dequantise(pack(rounded.codes, packing.bits), rounded.scales.double(), shape, packing)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_bytes_are_the_closed_form(shape, bits):
    packing = Packing(bits, 32)
    tensor = torch.randn(shape, dtype=torch.float64)
    rounded = round_nearest(as_rows(tensor, 32), packing)
    codes, sizes = pack(rounded.codes, bits), packing.shapes(shape)
    assert (tuple(codes.shape), codes.dtype) == (sizes["packed"], torch.uint8)
    assert (tuple(rounded.scales.shape), rounded.scales.dtype) == (sizes["scales"], torch.bfloat16)
    assert codes.nbytes + rounded.scales.nbytes == packing.num_bytes(shape)
    length = shape[group_axis(shape, 32)]
    groups = tensor.numel() // length * -(-length // 32)
    assert packing.num_bytes(shape) == (tensor.numel() * bits + 7) // 8 + 2 * groups
    assert stored(rounded, shape, packing).shape == shape


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_on_the_grid_are_exact(shape, bits):
    packing = Packing(bits, 32)
    low, high = packing.levels
    hand = torch.Generator().manual_seed(0)
    rows = as_rows(torch.empty(shape), 32)
    codes = torch.randint(low, high + 1, rows.shape, generator=hand)
    codes[:, ::32] = low  # so that the group's own scale is the one that made it
    scales = torch.tensor([0.5, -2.0, 0.0078125], dtype=torch.float64)
    groups = -(-rows.shape[1] // 32)
    scales = scales[torch.randint(0, 3, (len(rows), groups), generator=hand)]
    rows = codes.double() * scales.repeat_interleave(32, dim=1)[:, : rows.shape[1]]
    tensor = from_rows(rows, shape, 32)
    for rounded in (
        round_nearest(as_rows(tensor, 32), packing, search=False),
        round_nearest(as_rows(tensor, 32), packing),
        round_in_metric(as_rows(tensor, 32), packing, None, torch.eye(rows.shape[1])),
    ):
        assert torch.equal(stored(rounded, shape, packing), tensor)
        assert torch.equal(rounded.values, rows)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_an_error_is_at_most_half_a_scale_inside_the_grid(bits):
    packing = Packing(bits, 32)
    rows = torch.randn(50, 100, dtype=torch.float64)
    rounded = round_nearest(rows, packing)
    scale = rounded.scales.double().repeat_interleave(32, dim=1)[:, :100]
    low, high = packing.levels
    inside = (rows / scale > low - 0.5) & (rows / scale < high + 0.5)
    assert inside.double().mean() > 0.9
    assert bool(((rows - rounded.values).abs() <= scale.abs() / 2 + 1e-15)[inside].all())
    # and what lies outside gets the last level
    assert bool(((rounded.codes == low) | (rounded.codes == high))[~inside].all())


def test_zeros_stay_zeros():
    rounded = round_in_metric(torch.zeros(3, 40), Packing(4, 32), torch.eye(3), torch.eye(40))
    assert torch.equal(rounded.values, torch.zeros(3, 40, dtype=torch.float64))


def test_packed_order_does_not_depend_on_the_reader():
    packed = pack(torch.tensor([[-8, 7, 0], [1, -1, 2]], dtype=torch.int8), 4)
    assert packed.tolist() == [0xF0, 0x98, 0xA7]
    assert pack(torch.tensor([[-128, 127, 0]], dtype=torch.int8), 8).tolist() == [0, 255, 128]


@pytest.mark.parametrize(("bits", "group"), [(5, 32), (16, 32), (4, 0), (4, -1)])
def test_impossible_packings_are_refused(bits, group):
    with pytest.raises(ConfigError, match="not a packing"):
        Packing.from_json({"bits": bits, "group": group})


def test_what_is_not_finite_is_refused():
    with pytest.raises(NonFiniteError, match="not finite"):
        round_nearest(torch.tensor([[1.0, torch.nan]]), Packing(4, 32))
