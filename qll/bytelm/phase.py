"""Phase rotation of the stream: each pair of channels turns by an angle of content and position.

    angle_t = C norm(x_t) + frequency * t / context + offset of the language of byte t
    (x, y) -> rotation by angle_t

A true rotation: lengths are kept exactly and minus the angle undoes it. A fixed angle right after
an embedding could be absorbed by the embedding; one that depends on the content cannot. Angles are
free, not squeezed by a tanh. The real twin scales the pair by 1 + tanh(angle) instead. Languages
start with an offset of 0; a text that is in none keeps it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from qll.bytelm.complex_numbers import modulus, scale_pairs
from qll.bytelm.config import ModelConfig
from qll.bytelm.context import Context
from qll.bytelm.linears import norm
from qll.bytelm.rotary import rotate


class Phase(nn.Module):
    """The rotation (or its twin, the scaling) at the entrance of a block.

    >>> from qll.bytelm.config import StreamConfig
    >>> phase = Phase(ModelConfig(d_model=8, stream=StreamConfig(phase="rotation")))
    >>> x, context = torch.randn(1, 3, 8), Context(0, (torch.ones(3, 1), torch.zeros(3, 1)))
    >>> phase(x, context).norm(dim=-1).allclose(x.norm(dim=-1))
    True
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.rotates, self.context = config.stream.phase == "rotation", config.context
        self.complex_stream = config.stream.numbers == "complex"
        pairs = config.d_model // 2
        self.norm = norm(config, config.d_model)
        self.content = nn.Linear(pairs if self.complex_stream else config.d_model, pairs)
        self.frequency = nn.Parameter(torch.zeros(pairs))
        languages = len(config.stream.languages)
        self.language = nn.Parameter(torch.zeros(languages, pairs)) if languages else None

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], context: Context
    ) -> Float[Tensor, "batch seq d_model"]:
        """The turned stream."""
        angle = self.angles(x, context.start, context.languages)
        if self.rotates:
            context.note("phases", angle)
            return rotate(x, (angle.cos(), angle.sin()))
        return scale_pairs(x, 1 + angle.tanh())

    def angles(
        self,
        x: Float[Tensor, "batch seq d_model"],
        start: int,
        languages: Int[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq pairs"]:
        """The angle of every pair, in radians, float32 or better."""
        seen = self.norm(x)
        content = self.content(modulus(seen).to(seen.dtype) if self.complex_stream else seen)
        content = content.to(torch.promote_types(content.dtype, torch.float32))
        places = torch.arange(start, start + x.shape[1], device=x.device, dtype=content.dtype)
        angle = content + torch.outer(places / self.context, self.frequency.to(content))
        if self.language is None or languages is None:
            return angle
        # number 0 is no language
        return angle + functional.pad(self.language, (0, 0, 1, 0)).to(content)[languages]
