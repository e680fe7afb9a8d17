"""JumpReLU and the count of what it lets through, with derivatives in the threshold.

Both are steps in the threshold, so their true derivative is zero almost everywhere. Near the step,
where |h - threshold| < bandwidth / 2, they get that of a step smeared over a rectangle:

    d/dthreshold  h [h > threshold]   ->  - threshold / bandwidth
    d/dthreshold    [h > threshold]   ->  - 1 / bandwidth

Source: Rajamanoharan et al. 2024, "Jumping Ahead", arXiv 2407.14435, equations 11 and 12.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def jump_relu(
    h: Float[Tensor, " n"], threshold: Float[Tensor, " n"], bandwidth: float
) -> Float[Tensor, " n"]:
    """h where it is above its threshold, else 0.

    >>> jump_relu(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]), 0.1).tolist()
    [0.0, 3.0]
    """
    return _JumpReLU.apply(h, threshold, bandwidth)


def fires(
    h: Float[Tensor, " n"], threshold: Float[Tensor, " n"], bandwidth: float
) -> Float[Tensor, " n"]:
    """1 where h is above its threshold, else 0; only the threshold gets a derivative.

    >>> fires(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]), 0.1).tolist()
    [0.0, 1.0]
    """
    return _Step.apply(h, threshold, bandwidth)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(h, threshold)
        ctx.bandwidth = bandwidth
        return h * (h > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        h, threshold = ctx.saved_tensors
        near = _rectangle(h, threshold, ctx.bandwidth)
        return grad * (h > threshold), -grad * near * threshold / ctx.bandwidth, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(h, threshold)
        ctx.bandwidth = bandwidth
        return (h > threshold).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        h, threshold = ctx.saved_tensors
        return None, -grad * _rectangle(h, threshold, ctx.bandwidth) / ctx.bandwidth, None


def _rectangle(h: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return ((h - threshold).abs() < bandwidth / 2).to(h.dtype)
