"""Quantised matrices at their packed size: rounding to nearest, GPTQ, and what gguf can write.

Bits are counted from packed bytes, scales included; `params` stays that of the dense matrix.
"""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from jaxtyping import Float64, Int, UInt8
from torch import Tensor

from benchmarks.peers.case import (
    PANEL,
    Case,
    Method,
    Replacement,
    damped_hessian,
    inverse_root,
    weight_by_weight,
    weights,
)
from benchmarks.peers.stream import on_the_stream
from qll.calibrate import LinearMoments

# the types gguf.quants can write for rows of 576 numbers; its k- and i-quants it can only read
GGUF_TYPES = ("BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4")
GROUP = 32


def half(case: Case) -> Iterator[tuple[str, Replacement]]:
    """float16."""
    for name, weight in weights(case):
        yield name, Replacement(weight.half().float(), weight.numel(), 2 * weight.numel())


def by_gguf(kind: str) -> Method:
    """The packed type `kind` of llama.cpp, written and read by the gguf package."""
    quantisation = GGMLQuantizationType[kind]

    def convert(case: Case) -> Iterator[tuple[str, Replacement]]:
        for name, weight in weights(case):
            packed = gguf.quants.quantize(weight.float().numpy(), quantisation)
            matrix = torch.from_numpy(gguf.quants.dequantize(packed, quantisation).copy())
            yield name, Replacement(matrix.float(), weight.numel(), packed.nbytes)

    return convert


def rounded(bits: int, group: int = GROUP) -> Method:
    """Round to nearest: groups along the input, one float16 scale each, symmetric."""

    def replaced(weight: Tensor, moments: object, keep: float) -> Replacement:
        return _packed(*round_to_nearest(weight, bits, group), bits, group)

    return weight_by_weight(replaced)


def gptq(bits: int, group: int = GROUP) -> Method:
    """GPTQ (Frantar et al. 2022, arXiv 2210.17323) on the same grid and the compressed stream."""

    def replaced(weight: Tensor, moments: LinearMoments, keep: float) -> Replacement:
        return _packed(*gptq_codes(weight, moments, bits, group), bits, group)

    return on_the_stream(replaced)


Codes = tuple[Int[Tensor, "out into"], Float64[Tensor, "out groups"]]


def round_to_nearest(weight: Float64[Tensor, "out into"], bits: int, group: int) -> Codes:
    """(codes, scales): weight ~ scale code, -2^(bits - 1) <= code < 2^(bits - 1)."""
    pieces = weight.reshape(len(weight), -1, group)
    scales = grid_scales(pieces, bits)
    return _code(pieces, scales[..., None], bits).reshape(weight.shape), scales


def gptq_codes(
    weight: Float64[Tensor, "out into"], moments: LinearMoments, bits: int, group: int
) -> Codes:
    """Column after column, the rounding error of one spread over those to come.

    With H = mean x x^T + damping and U the upper Cholesky factor of H^-1, the error e of column j,
    divided by U_jj, times row j of U is taken from the later columns (the paper's algorithm 1).
    Columns by falling H_jj and scales of the weights as they were: the published code's
    --act-order --static-groups. In their own order int4 was worse than rounding to nearest here.
    """
    hessian = damped_hessian(moments)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    upper = inverse_root(hessian[order][:, order])
    scales = grid_scales(weight.reshape(len(weight), -1, group), bits)
    grid, work = scales.repeat_interleave(group, dim=1)[:, order], weight[:, order]
    codes = torch.empty(weight.shape, dtype=torch.int64)
    for start in range(0, weight.shape[1], PANEL):
        stop = min(start + PANEL, weight.shape[1])
        errors = torch.zeros(len(weight), stop - start, dtype=weight.dtype)
        for column in range(start, stop):
            code = _code(work[:, column], grid[:, column], bits)
            codes[:, order[column]] = code
            error = (work[:, column] - code * grid[:, column]) / upper[column, column]
            work[:, column:stop] -= error[:, None] * upper[column, column:stop]
            errors[:, column - start] = error
        work[:, stop:] -= errors @ upper[start:stop, stop:]
    return codes, scales


def pack(codes: Int[Tensor, "out into"], bits: int) -> UInt8[np.ndarray, "_"]:
    """The codes as a stream of `bits` bits each.

    >>> pack(torch.tensor([[-1, 1], [0, 1]]), 4).tolist()
    [121, 137]
    """
    unsigned = (codes + (1 << (bits - 1))).numpy().astype(np.uint8).reshape(-1, 1)
    return np.packbits(np.unpackbits(unsigned, axis=1)[:, 8 - bits :])


def unpack(packed: UInt8[np.ndarray, "_"], shape: tuple[int, int], bits: int) -> Tensor:
    """What `pack` packed."""
    streams = np.unpackbits(packed)[: shape[0] * shape[1] * bits].reshape(-1, bits)
    unsigned = np.packbits(np.pad(streams, ((0, 0), (8 - bits, 0))), axis=1)
    codes = torch.from_numpy(unsigned.astype(np.int64)).reshape(shape)
    return codes - (1 << (bits - 1))


def grid_scales(
    pieces: Float64[Tensor, "out groups group"], bits: int
) -> Float64[Tensor, "out groups"]:
    """The scale of each group, as float16 will hold it: GPTQ's published symmetric grid.

    All 2^bits codes are used: 2 amax / (2^bits - 1), or of 80 shares of it down to a fifth the one
    with the least sum of |error|^2.4 (the published code's `mse` search).
    """
    widest = 2 * pieces.abs().amax(-1) / ((1 << bits) - 1)
    best, scales = torch.full(widest.shape, torch.inf).double(), widest
    for step in range(80):
        tried = stored_scale(widest * (1 - step / 100))
        error = (pieces - tried[..., None] * _code(pieces, tried[..., None], bits)).abs()
        error = error.pow(2.4).sum(-1)
        scales = torch.where(error < best, tried, scales)
        best = torch.minimum(error, best)
    return scales


def stored_scale(scale: Float64[Tensor, "*any"]) -> Float64[Tensor, "*any"]:
    """As float16; its least positive number stands for a group of zeros."""
    return scale.half().clamp(min=2.0**-24).double()


def _packed(codes: Tensor, scales: Tensor, bits: int, group: int) -> Replacement:
    """The matrix that the packed bytes give back, and their number."""
    packed, halves = pack(codes, bits), scales.half()
    grid = unpack(packed, tuple(codes.shape), bits).float()
    matrix = grid * halves.float().repeat_interleave(group, dim=1)
    return Replacement(matrix, codes.numel(), packed.nbytes + 2 * halves.numel())


def _code(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    limit = 1 << (bits - 1)
    return (values / scales).round().clamp(-limit, limit - 1).long()


int8, int4, int3, int2 = rounded(8), rounded(4), rounded(3), rounded(2)
gptq4, gptq3, gptq2 = gptq(4), gptq(3), gptq(2)
bf16, q8_0, q5_1, q5_0, q4_1, q4_0, mxfp4 = map(by_gguf, GGUF_TYPES)
