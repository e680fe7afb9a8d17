"""What layers may look at beside the stream: where the bytes stand, and a place to leave notes.

Losses need more than logits. A layer that has something to say to them calls `note`; without a
listener (the usual case) that costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxtyping import Int
from torch import Tensor

from qll.bytelm.rotary import Angles

Notes = dict[str, list[Tensor]]


@dataclass(frozen=True)
class Context:
    """One pass over some bytes."""

    start: int
    """Position of the first of them."""
    angles: Angles
    """(cos, sin) of their rotary positions for one head."""
    languages: Int[Tensor, "batch seq"] | None = None
    """Number of the language of each, 0 for none; None when the model knows no languages."""
    notes: Notes | None = field(default=None, compare=False)
    """What layers left for the losses, by name; None when nobody listens."""

    def note(self, name: str, value: Tensor) -> None:
        """Leave `value` for the losses.

        >>> import torch
        >>> context = Context(0, (torch.ones(1, 1), torch.zeros(1, 1)), notes={})
        >>> context.note("codebook", torch.tensor(1.0)); context.notes
        {'codebook': [tensor(1.)]}
        """
        if self.notes is not None:
            self.notes.setdefault(name, []).append(value)
