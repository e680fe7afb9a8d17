"""Rotation of channel pairs: (x, y) -> (x cos a - y sin a, x sin a + y cos a).

Channels 2j and 2j + 1 are the two parts of one complex number, and this multiplies it by e^{ia}
(in complex64 or complex128: half precision is widened first, since ComplexHalf loses digits): an
isometry whose inverse is minus the angle. With the angle position * frequency it is the rotary
position embedding (Su et al. 2021, RoFormer, eq. 15), after which a query and a key know only how
far apart they are.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

BASE = 10000.0  # of the frequencies, as in RoFormer

Angles = tuple[Float[Tensor, "*positions pairs"], Float[Tensor, "*positions pairs"]]


def rotate(x: Float[Tensor, "*batch channels"], angles: Angles) -> Float[Tensor, "*batch channels"]:
    """`x` with every pair of channels turned; `angles` is (cos, sin), which may broadcast.

    >>> quarter = (torch.tensor([0.0]), torch.tensor([1.0]))
    >>> rotate(torch.tensor([1.0, 0.0]), quarter).tolist()
    [0.0, 1.0]
    """
    full = x.to(torch.promote_types(x.dtype, torch.float32))
    numbers = torch.view_as_complex(full.unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(numbers * torch.complex(*angles))
    return turned.flatten(-2).to(x.dtype)


def position_angles(
    start: int, length: int, width: int, device: torch.device, dtype: torch.dtype
) -> Angles:
    """(cos, sin)[length, width / 2] of the positions start, start + 1, ...

    Angles are computed in float64 on the CPU: in float32 a position beyond 10^5 would be rounded.

    >>> cos, sin = position_angles(0, 3, 4, torch.device("cpu"), torch.float32)
    >>> cos.shape, cos[0].tolist(), sin[0].tolist()
    (torch.Size([3, 2]), [1.0, 1.0], [0.0, 0.0])
    """
    frequencies = BASE ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    positions = torch.arange(start, start + length, dtype=torch.float64)
    angles = torch.outer(positions, frequencies)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)
