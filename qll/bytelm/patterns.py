"""How the parts of a sum interfere: the cross terms of |psi_1 + ... + psi_m|^2.

|sum psi|^2 = sum |psi_i|^2 + sum over i < j of 2 Re <psi_i|psi_j>. In a model the parts are what
the embedding and each block write to the residual stream, whose sum the head reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Inexact, Int
from torch import Tensor

from qll.bytelm.coherence import streams
from qll.bytelm.model import ByteModel


@dataclass(frozen=True)
class Pattern:
    """The interference of m parts."""

    energies: Float[Tensor, " m"]
    """|psi_i|^2."""
    cross: Float[Tensor, "m m"]
    """2 Re <psi_i|psi_j> for i != j; 0 on the diagonal."""

    @property
    def visibility(self) -> float:
        """All cross terms over all energies: above 0 when the parts add up, below when they cancel.

        -1 is a sum of 0, m - 1 is m equal parts.
        """
        return float(self.cross.triu().sum() / self.energies.sum())


def pattern(parts: Inexact[Tensor, "m d"]) -> Pattern:
    """Energies and cross terms of real or complex vectors.

    >>> slits = torch.tensor([[1.0 + 0j], [0 + 1j], [-1.0 + 0j]])
    >>> found = pattern(slits)
    >>> found.cross[0].tolist(), round(found.visibility, 4)
    ([0.0, 0.0, -2.0], -0.6667)
    """
    overlaps = (parts.conj() @ parts.transpose(0, 1)).real
    return Pattern(overlaps.diagonal().clone(), 2 * (overlaps - overlaps.diagonal().diag()))


@torch.inference_mode()
def stream_pattern(model: ByteModel, ids: Int[Tensor, "batch seq"]) -> Pattern:
    """Interference of the embedding and the blocks in the stream, summed over `ids`.

    >>> from qll.bytelm.config import ModelConfig
    >>> model = ByteModel(ModelConfig(d_model=32, n_layers=2, context=8)).eval()
    >>> stream_pattern(model, torch.zeros(1, 8, dtype=torch.long)).cross.shape
    torch.Size([3, 3])
    """
    seen = torch.stack(streams(model, ids)).double()
    parts = torch.cat((seen[:1], seen.diff(dim=0)))
    return pattern(parts.flatten(1))
