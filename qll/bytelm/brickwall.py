"""An orthogonal map of the channels made of two-site gates, as in a circuit on a chain.

The d channels are read as the joint states of a chain of sites of 2 to 4 levels (256 = 4 x 4 x 4 x
4), and layers of gates act on neighbouring sites, even bonds and odd bonds in turn. A gate is
orthogonal because it is the Cayley transform (1 - A)^-1 (1 + A) or the exponential of a skew matrix
A; the real twin, 1 + A with the same parameters, is not. Gates start near the identity.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qll.bytelm.config import ModelConfig

LEVELS = 4  # of a site at most, unless the size has a larger prime factor
START = 0.01  # spread of the entries of A before training


def sites(channels: int) -> tuple[int, ...]:
    """Factors of `channels`, at most LEVELS each unless prime, largest first.

    >>> sites(256), sites(768), sites(14)
    ((4, 4, 4, 4), (4, 4, 4, 4, 3), (7, 2))
    """
    found, factor = [], 2
    while channels > 1:
        while channels % factor:
            factor += 1
        if factor == 2 and channels % 4 == 0:
            found.append(4)
            channels //= 4
        else:
            found.append(factor)
            channels //= factor
    return tuple(sorted(found, reverse=True))


class Brickwall(nn.Module):
    """x -> U x for every position, U from `depth` layers of gates.

    >>> from qll.bytelm.config import StreamConfig
    >>> wall = Brickwall(ModelConfig(d_model=32, stream=StreamConfig(brickwall=2)))
    >>> u = wall.matrix(); (u @ u.T).allclose(torch.eye(32), atol=1e-5)
    True
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = config.stream.gates
        self.pairs = config.stream.numbers == "complex"  # parts of a number move together
        self.dims = sites(config.d_model // 2 if self.pairs else config.d_model)
        bonds = range(len(self.dims) - 1)
        self.bonds = [
            bond for layer in range(config.stream.brickwall) for bond in bonds[layer % 2 :: 2]
        ]
        sizes = [self.dims[bond] * self.dims[bond + 1] for bond in self.bonds]
        self.skew = nn.ParameterList(torch.randn(size * (size - 1) // 2) * START for size in sizes)

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        """U x, one matrix product."""
        with torch.autocast(x.device.type, enabled=False):
            matrix = self.matrix().to(x.dtype)
            if self.pairs:
                return torch.einsum("oi,bsic->bsoc", matrix, x.unflatten(-1, (-1, 2))).flatten(-2)
            return x @ matrix.T

    def matrix(self) -> Float[Tensor, "channels channels"]:
        """U, from the gates applied to the identity."""
        channels = math.prod(self.dims)
        like = self.skew[0] if len(self.skew) else torch.empty(0)
        matrix = torch.eye(channels, device=like.device, dtype=like.dtype)
        for bond, skew in zip(self.bonds, self.skew, strict=True):
            before = math.prod(self.dims[:bond])
            size = self.dims[bond] * self.dims[bond + 1]
            folded = matrix.reshape(before, size, -1)
            matrix = (gate(skew, size, self.kind) @ folded).reshape(channels, channels)
        return matrix


def gate(skew: Float[Tensor, " entries"], size: int, kind: str) -> Float[Tensor, "size size"]:
    """The gate of a skew matrix given by the entries above its diagonal.

    >>> g = gate(torch.tensor([0.5]), 2, "exponential")
    >>> g[0, 1].allclose(torch.tensor(0.5).sin())
    True
    """
    # small, and not every backend can solve or exponentiate: in float64 on the CPU
    row, column = torch.triu_indices(size, size, offset=1)
    exact = torch.float64
    upper = torch.zeros(size, size, dtype=exact).index_put((row, column), skew.cpu().to(exact))
    a, one = upper - upper.T, torch.eye(size, dtype=exact)
    if kind == "cayley":
        result = torch.linalg.solve(one - a, one + a)
    else:
        result = torch.linalg.matrix_exp(a) if kind == "exponential" else one + a
    return result.to(skew)
