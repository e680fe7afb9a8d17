"""Quantised peers: packed bytes, rounding, GPTQ against rounding."""

from __future__ import annotations

import pytest
import torch

from benchmarks.peers import load_method, quantise
from benchmarks.peers.case import DAMPING

BITS = {
    "fp16": 16,
    "rtn_int8": 8.5,
    "rtn_int4": 4.5,
    "rtn_int3": 3.5,
    "rtn_int2": 2.5,
    "gguf_bf16": 16,
    "gguf_q8_0": 8.5,
    "gguf_q5_1": 6,
    "gguf_q5_0": 5.5,
    "gguf_q4_1": 5,
    "gguf_q4_0": 4.5,
    "gguf_mxfp4": 4.25,
    "gptq_int4": 4.5,
    "gptq_int3": 3.5,
    "gptq_int2": 2.5,
}


@pytest.mark.parametrize(("name", "bits"), BITS.items())
def test_bits_of_a_weight_are_those_of_the_packed_bytes(tiny_case, name, bits):
    case, total, size, error = tiny_case(), 0, 0, 0.0
    for path, item in load_method(name)(case):
        weight = case.source.read(f"{path}.weight")
        total, size = total + weight.numel(), size + item.bytes
        error = max(error, float((item.matrix - weight).norm() / weight.norm()))
    assert 8 * size / total == bits
    # GPTQ trades the weight's error for the output's
    assert error < 3 * 2.0 ** (1 - bits) + 0.01


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing_is_lossless(bits):
    limit = 1 << (bits - 1)
    codes = torch.randint(-limit, limit, (6, 32), generator=torch.Generator().manual_seed(0))
    packed = quantise.pack(codes, bits)
    assert packed.nbytes == 6 * 32 * bits // 8
    assert torch.equal(quantise.unpack(packed, (6, 32), bits), codes)


def test_rounding_is_to_the_nearest_of_the_grid():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).double()
    codes, scales = quantise.round_to_nearest(weight, 4, 32)
    grid = scales.repeat_interleave(32, dim=1)
    inside = (weight / grid > -8) & (weight / grid < 7)
    assert float(((weight - codes * grid).abs() / grid)[inside].max()) <= 0.5
    assert (int(codes.min()), int(codes.max())) == (-8, 7)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_scale_has_the_least_error_of_those_tried(bits):
    pieces = torch.randn(4, 3, 32, generator=torch.Generator().manual_seed(0)).double()
    scales, low, high = quantise.grid_scales(pieces, bits), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert len(set((pieces / scales[..., None]).round().clamp(low, high).flatten().tolist())) == (
        2**bits
    )

    def error(scale):
        scale = quantise.stored_scale(scale)[..., None]
        return (pieces - scale * (pieces / scale).round().clamp(low, high)).abs().pow(2.4).sum(-1)

    widest = 2 * pieces.abs().amax(-1) / (2**bits - 1)
    for step in range(80):
        assert (error(scales) <= error(widest * (1 - step / 100)) + 1e-12).all()


def test_gptq_is_rounding_when_inputs_are_uncorrelated(problem):
    moments = problem[2]
    white = type(moments)(400 * torch.eye(64).double(), None, 400)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(
        quantise.gptq_codes(weight, white, 3, 32)[0], quantise.round_to_nearest(weight, 3, 32)[0]
    )


def test_gptq_follows_the_recursion_and_lowers_the_output_error(problem):
    """Against optimal brain quantisation done plainly: quantise a column, solve for the rest."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(500, 64, generator=generator).double()
    inputs = inputs @ torch.randn(64, 64, generator=generator).double()
    moments = type(problem[2])(inputs.T @ inputs, None, 500)
    weight = torch.randn(6, 64, generator=generator).double()
    codes, scales = quantise.gptq_codes(weight, moments, 3, 32)
    grid = scales.repeat_interleave(32, dim=1)
    plain_codes, plain_scales = quantise.round_to_nearest(weight, 3, 32)
    plain = plain_codes * plain_scales.repeat_interleave(32, dim=1)
    assert ((weight - codes * grid) @ inputs.T).norm() < 0.8 * ((weight - plain) @ inputs.T).norm()

    hessian = moments.input / 500
    hessian = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(64).double()
    order = hessian.diagonal().argsort(descending=True)
    hessian, work = hessian[order][:, order], weight[:, order]
    codes, grid = codes[:, order], grid[:, order]
    for column in range(64):
        chosen = codes[:, column] * grid[:, column]
        later = slice(column + 1, 64)
        move = (work[:, column] - chosen)[:, None] * hessian[column, later]
        work[:, column] = chosen
        if column < 63:
            work[:, later] += torch.linalg.solve(hessian[later, later], move.T).T
            nearest = (work[:, column + 1] / grid[:, column + 1]).round().clamp(-4, 3)
            assert torch.equal(nearest.long(), codes[:, column + 1])
