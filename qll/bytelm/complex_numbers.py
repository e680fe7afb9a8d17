"""Complex layers on split-real numbers: channels 2j and 2j + 1 are the two parts of one number.

Nothing here has a complex dtype, so autocast has no imaginary part to lose: products are ordinary
real matrix products, norms and moduli are float32. Each layer f commutes with a global phase,
f(e^{ia} z) = e^{ia} f(z) (no biases on values; gates see moduli only).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from qll.bytelm.norm import EPSILON


def modulus(z: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch pairs"]:
    """|z| of every pair, with a gradient at 0 too; float32 or better.

    >>> modulus(torch.tensor([3.0, 4.0])).tolist()
    [5.0]
    """
    pairs = z.to(torch.promote_types(z.dtype, torch.float32)).unflatten(-1, (-1, 2))
    return (pairs.square().sum(dim=-1) + EPSILON**2).sqrt()


def times_i(z: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch channels"]:
    """i z: (x, y) -> (-y, x) for every pair.

    >>> times_i(torch.tensor([1.0, 2.0])).tolist()
    [-2.0, 1.0]
    """
    real, imaginary = z.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-imaginary, real), dim=-1).flatten(-2)


def conjugate_product(
    first: Float[Tensor, "*batch channels"], second: Float[Tensor, "*batch channels"]
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """(real, imaginary) part of sum_j conj(first_j) second_j.

    >>> conjugate_product(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]))
    (tensor(0.), tensor(-1.))
    """
    return (first * second).sum(dim=-1), (times_i(first) * second).sum(dim=-1)


def scale_pairs(
    z: Float[Tensor, "*batch channels"], scale: Float[Tensor, "*pairs"]
) -> Float[Tensor, "*batch channels"]:
    """Every pair times a real number of its own.

    >>> scale_pairs(torch.tensor([1.0, 2.0]), torch.tensor([3.0])).tolist()
    [3.0, 6.0]
    """
    return (z.unflatten(-1, (-1, 2)) * scale[..., None]).flatten(-2).to(z.dtype)


def mod_relu(
    z: Float[Tensor, "*batch channels"], bias: Float[Tensor, " pairs"]
) -> Float[Tensor, "*batch channels"]:
    """z relu(|z| + bias) / |z|: the modulus is cut, the phase kept (Arjovsky et al. 2016, eq. 8).

    >>> mod_relu(torch.tensor([3.0, 4.0]), torch.tensor([-2.5])).tolist()
    [1.5, 2.0]
    """
    size = modulus(z)
    return scale_pairs(z, functional.relu(size + bias) / size)


class ComplexLinear(nn.Module):
    """z -> W z without bias, W[out, into] complex, as one real product with [[a, -b], [b, a]].

    It has half the parameters of a real layer of as many channels.

    >>> layer = ComplexLinear(4, 6)
    >>> z = torch.randn(4)
    >>> layer(times_i(z)).allclose(times_i(layer(z)), atol=1e-6), layer.weight.shape
    (True, torch.Size([3, 2, 2]))
    """

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out // 2, into // 2, 2) * into**-0.5)

    def matrix(self) -> Float[Tensor, "out into"]:
        """The real matrix that does the same to split-real vectors."""
        real, imaginary = self.weight.unbind(-1)
        rows = torch.stack((real, -imaginary, imaginary, real), dim=-1)
        out, into = real.shape
        return rows.view(out, into, 2, 2).transpose(1, 2).reshape(2 * out, 2 * into)

    def forward(self, z: Float[Tensor, "*batch into"]) -> Float[Tensor, "*batch out"]:
        """W z."""
        return functional.linear(z, self.matrix())


class ComplexRMSNorm(nn.Module):
    """z / rms|z| times a real gain per complex channel; phases are left alone.

    >>> ComplexRMSNorm(2)(torch.tensor([3.0, 4.0])).round(decimals=3).tolist()
    [0.8489999..., 1.1310000...]
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width // 2))

    def forward(self, z: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """`z` with mean square 1 over its channels, times the gain."""
        full = z.to(torch.promote_types(z.dtype, torch.float32))
        normed = full * (full.square().mean(dim=-1, keepdim=True) + EPSILON).rsqrt()
        return scale_pairs(normed, self.gain)


class ModulusGate(nn.Module):
    """x relu(|g| + bias): what the real stream does by silu(g) x, without touching phases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width // 2))

    def forward(
        self, gate: Float[Tensor, "*batch width"], x: Float[Tensor, "*batch width"]
    ) -> Float[Tensor, "*batch width"]:
        """`x` with every pair scaled by the gate's modulus."""
        return scale_pairs(x, functional.relu(modulus(gate) + self.bias))


class ModReluGate(ModulusGate):
    """modReLU of x |g|: small products are cut to 0, and no phase is touched.

    >>> gate = ModReluGate(2); _ = gate.bias.data.fill_(-2.0)
    >>> gate(torch.tensor([0.0, 2.0]), torch.tensor([3.0, 4.0])).tolist()  # |x g| = 10, minus 2
    [4.800000190734863, 6.400000095367432]
    """

    def forward(
        self, gate: Float[Tensor, "*batch width"], x: Float[Tensor, "*batch width"]
    ) -> Float[Tensor, "*batch width"]:
        """The cut product."""
        return mod_relu(scale_pairs(x, modulus(gate)), self.bias)


class SiluGate(nn.Module):
    """silu(g) x, channel by channel: the gate of a real stream."""

    def forward(
        self, gate: Float[Tensor, "*batch width"], x: Float[Tensor, "*batch width"]
    ) -> Float[Tensor, "*batch width"]:
        """The gated values."""
        return functional.silu(gate) * x
