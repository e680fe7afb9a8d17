"""How a model knows where a byte stands: rotary angles, learned vectors, or not at all.

    rotary   keys and queries turn by angles of their position: qll/bytelm/rotary.py
    learned  a vector per position is added to the byte's (Vaswani et al. 2017, section 3.5)
    none     nothing but the causal order (Kazemnejad et al. 2023, "NoPE")

There are as many learned vectors as a window has bytes, and after the last comes the first again:
no two bytes of a window share one, and reading goes on beyond them. So that this is no surprise to
the model, a window of training begins at a random one of them (Kiyono et al. 2021, "SHAPE"). That
is paid for: a small model (64 channels, 2 blocks, 700 steps, one seed) needed 2.21 bits per byte in
the first window and 2.0 to 2.1 beyond it, 2.05 and 4.2 to 4.3 when every window of training began
at the first vector, and 1.96 and 1.8 with rotary angles. Only bytes take a vector: learned prefixes
and memory vectors have none, and use none up.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qll.bytelm.config import ModelConfig
from qll.bytelm.rotary import Angles, position_angles


class LearnedPositions(nn.Embedding):
    """The vectors of the positions of a window.

    >>> positions = LearnedPositions(ModelConfig(d_model=32, context=8))
    >>> vectors = positions(6, 4)
    >>> vectors.shape, vectors[2].equal(positions.weight[0])
    (torch.Size([4, 32]), True)
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.context, config.d_model)

    def forward(self, start: int, length: int) -> Float[Tensor, "length d_model"]:
        """The vectors of the positions start, start + 1, ..."""
        places = torch.arange(start, start + length, device=self.weight.device)
        return super().forward(places % self.num_embeddings)

    def random_start(self) -> int:
        """Where a window of training begins."""
        return int(torch.randint(self.num_embeddings, ()))


def mixer_angles(
    config: ModelConfig,
    start: int,
    length: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Angles:
    """(cos, sin)[length, width / 2] by which mixers turn keys and queries; 0 unless rotary.

    >>> config, cpu = ModelConfig(positions="none"), torch.device("cpu")
    >>> still = mixer_angles(config, 5, 2, 4, cpu, torch.float32)
    >>> still[0].tolist(), still[1].tolist()
    ([[1.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]])
    """
    if config.positions == "rotary":
        return position_angles(start, length, width, device, dtype)
    shape = (length, width // 2)
    still = torch.ones(shape, device=device, dtype=dtype)
    return still, torch.zeros_like(still)
