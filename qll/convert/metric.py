"""In which norm a weight is truncated: a left and a right factor around the error.

The error of W~ is ||L_out^T (W - W~) L_in||_F. Plain: both factors are the identity. Activation:
L_in L_in^T = mean x x^T, so the error is that of the layer's output on the calibration text
(SVD-LLM). K-FAC: also L_out L_out^T = mean g g^T with g = dLoss/dOutput, so half the squared error
estimates the KL divergence from the dense model in nats per token, if the loss is that of labels
drawn from it (Martens and Grosse 2015; used for truncation, with the text's labels, by KFAC-SVD).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qll.calibrate import LinearMoments
from qll.errors import NonFiniteError

logger = logging.getLogger("qll.convert")

# Shrinkage towards a multiple of the identity, which a sample of few tokens needs. Perplexity over
# dense at --keep 0.8 on the embedded model, calibrated on 16,384 tokens of WikiText-2, on its other
# half and, out of domain, on the Python documentation: (0.002, 0.01) 1.355 and 2.008, (0.02, 0.05)
# 1.333 and 1.826, (0.1, 0.3) 1.339 and 1.701.
SHRINK_INPUT = 0.1
SHRINK_GRAD = 0.3
_LARGE = 1 << 23  # numbers of a matrix whose error is multiplied in float32
_PANEL = 1024  # rows of a moment that are rounded at a time for it


@dataclass(frozen=True)
class Factor:
    """A root of a second moment G = L L^T and its inverse; of a diagonal G only the diagonals."""

    root: Float[Tensor, "n n"] | Float[Tensor, " n"]
    inverse: Float[Tensor, "n n"] | Float[Tensor, " n"]

    @property
    def inverse_transposed(self) -> Tensor:
        """L^-T, or the diagonal again."""
        return self.inverse if self.inverse.ndim == 1 else self.inverse.mT


@dataclass(frozen=True)
class Metric:
    """The norm sqrt(tr(E^T left E right)) of an error E [out, in].

    left = L_out L_out^T and right = L_in L_in^T are positive definite second moments; one
    dimension means a diagonal, None the identity.
    """

    kind: str
    left: Float[Tensor, "out out"] | Float[Tensor, " out"] | None = None
    right: Float[Tensor, "in in"] | Float[Tensor, " in"] | None = None

    def weighted(self, error: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """G_out error G_in: half the gradient of `norm_squared`."""
        if self.left is not None:
            error = self.left[:, None] * error if self.left.ndim == 1 else self.left @ error
        if self.right is not None:
            error = error * self.right if self.right.ndim == 1 else error @ self.right
        return error

    def norm_squared(self, error: Float[Tensor, "out in"]) -> float:
        """||L_out^T error L_in||_F^2, from the second moments: tr(E^T G_out E G_in).

        Of a large matrix the products are float32, which is a relative 1e-6 of the result.
        """
        if error.numel() < _LARGE or error.device.type == "mps":
            return float((self.weighted(error) * error).sum().clamp(min=0))
        return max(self._norm_squared_in_panels(error.float()), 0.0)

    def _norm_squared_in_panels(self, error: Float[Tensor, "out in"]) -> float:
        """sum((G_out error) * (error G_in)), rounding a panel of a moment at a time: of 14336
        channels a rounded one is 0.8 GB."""
        image = error
        if self.right is not None and self.right.ndim == 2:
            panels = (error @ panel.float().mT for panel in self.right.split(_PANEL))
            image = torch.cat(list(panels), dim=1)
        elif self.right is not None:
            image = error * self.right.float()
        if self.left is None or self.left.ndim == 1:
            products = (image * error).sum(1, dtype=torch.float64)
            return float(products.sum() if self.left is None else self.left @ products)
        pairs = zip(self.left.split(_PANEL), image.split(_PANEL), strict=True)
        return sum(
            float(((panel.float() @ error) * part).sum(dtype=torch.float64))
            for panel, part in pairs
        )


def plain() -> Metric:
    """The Frobenius norm.

    >>> plain().norm_squared(torch.ones(2, 3, dtype=torch.float64))
    6.0
    """
    return Metric("plain")


def metric_of(moments: LinearMoments | None, kind: str) -> Metric:
    """The metric of `kind` (plain, activation or kfac) from the moments of one linear.

    >>> x = torch.eye(3, dtype=torch.float64) * 8
    >>> metric = metric_of(LinearMoments(input=x, grad=None, tokens=2), "activation")
    >>> round(metric.norm_squared(torch.ones(2, 3, dtype=torch.float64)), 6)
    24.0
    """
    if kind == "plain" or moments is None:
        return plain()
    right = _shrunk(moments.input, moments.tokens, SHRINK_INPUT)
    if kind == "activation":
        return Metric(kind, right=right)
    if moments.grad is None:
        raise ValueError("the K-FAC metric needs output gradients")
    return Metric(kind, _shrunk(moments.grad, moments.grad_tokens, SHRINK_GRAD), right)


def _shrunk(total: Tensor, tokens: int, share: float) -> Tensor:
    """`shrink` of the mean total / tokens, with one copy instead of two."""
    mixed = shrink(total, share)
    return mixed.div_(tokens)


def shrink(moment: Float[Tensor, "n n"], share: float) -> Float[Tensor, "n n"]:
    """(1 - share) G + share mean(diag G) I in float64: positive definite for any sample.

    A channel that never fired keeps a floor of 1e-12 of the mean, so that the root exists.
    Raises NonFiniteError when G is not finite.

    >>> shrink(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), 0.5)
    tensor([[1.5000, 0.0000],
            [0.0000, 0.5000]], dtype=torch.float64)
    """
    moment = moment.to(torch.float64)
    # a sum over all entries is finite only if each of them is
    if not torch.isfinite(moment.sum()):
        raise NonFiniteError(
            "a calibration moment is not finite",
            found="NaN or infinity in the sum of x x^T or g g^T",
            hint="check the checkpoint with `inspect` and the calibration text",
        )
    mean = moment.diagonal().mean().clamp(min=1e-30)
    mixed = moment * (1 - share)
    mixed.diagonal().add_(share * mean + 1e-12 * mean)
    return mixed


def factor(moment: Float[Tensor, "n n"] | Float[Tensor, " n"]) -> Factor:
    """A root of a positive definite G and its inverse: Cholesky, or eigenvectors where that fails.

    >>> result = factor(torch.tensor([[4.0, 0.0], [0.0, 9.0]], dtype=torch.float64))
    >>> result.root.diagonal().tolist(), result.inverse.diagonal().tolist()
    ([2.0, 3.0], [0.5, 0.3333333333333333])
    """
    if moment.ndim == 1:
        return Factor(moment.sqrt(), moment.rsqrt())
    root, info = torch.linalg.cholesky_ex(moment)
    if int(info) == 0:
        identity = torch.eye(len(root), dtype=root.dtype)
        return Factor(root, torch.linalg.solve_triangular(root, identity, upper=False))
    values, vectors = torch.linalg.eigh(moment)
    floor = values[-1].clamp(min=1e-30) * 1e-12
    if int((values < floor).sum()):
        logger.warning("a second moment is singular; its smallest eigenvalues were raised")
    values = values.clamp(min=floor).sqrt()
    return Factor(vectors * values, (vectors / values).T.contiguous())


def root_of(moment: Float[Tensor, "n n"] | Float[Tensor, " n"]) -> Tensor:
    """The root alone of `factor`.

    >>> root_of(torch.tensor([4.0, 9.0])).tolist()
    [2.0, 3.0]
    """
    if moment.ndim == 1:
        return moment.sqrt()
    root, info = torch.linalg.cholesky_ex(moment)
    return root if int(info) == 0 else factor(moment).root


def leg_moments(
    moment: Float[Tensor, "n n"] | Float[Tensor, " n"], dims: Sequence[int]
) -> list[Float[Tensor, "_ _"] | Float[Tensor, " _"]]:
    """One second moment per leg of a matrix index split into `dims`: G ~ G_1 x G_2 x ... .

    The partial traces over the other legs, scaled so that the product has G's trace. Exact when G
    is a Kronecker product. dims may multiply to more than n: the padding carries no weight.

    >>> one, two = torch.diag(torch.tensor([1.0, 2])), torch.diag(torch.tensor([3.0, 4, 5]))
    >>> legs = leg_moments(torch.kron(one, two), (2, 3))
    >>> torch.allclose(torch.kron(*legs), torch.kron(one, two))
    True
    """
    if len(dims) == 1:
        return [moment]
    padded = _pad(moment, _product(dims))
    diagonal = padded.ndim == 1
    trace = padded.sum() if diagonal else padded.diagonal().sum()
    legs = []
    for k, dim in enumerate(dims):
        before, after = _product(dims[:k]), _product(dims[k + 1 :])
        if diagonal:
            leg = padded.reshape(before, dim, after).sum(dim=(0, 2)) / trace
        else:
            blocks = padded.reshape(before, dim, after, before, dim, after)
            leg = torch.einsum("aibajb->ij", blocks) / trace
        legs.append(_lifted(leg))
    legs[0] = legs[0] * trace
    return legs


def _pad(moment: Tensor, total: int) -> Tensor:
    """The moment with zeros appended up to `total` along each dimension."""
    if len(moment) == total:
        return moment
    padded = moment.new_zeros((total,) * moment.ndim)
    padded[tuple(slice(len(moment)) for _ in range(moment.ndim))] = moment
    return padded


def _lifted(leg: Tensor) -> Tensor:
    """A leg's moment with a floor of 1e-9 of its mean, since a padded index carries no weight."""
    if leg.ndim == 1:
        return leg + 1e-9 * leg.mean()
    leg = leg.clone()
    leg.diagonal().add_(1e-9 * leg.diagonal().mean())
    return leg


def _product(dims: Sequence[int]) -> int:
    result = 1
    for dim in dims:
        result *= dim
    return result
