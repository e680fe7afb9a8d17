"""Gradients that make a conversion keep features apart, not only their sum.

K-FAC measures errors in E[g g^T], g the gradient of the loss: what a token's features do to the
loss together. To have each of them kept for itself, noise is added to g where an autoencoder sits,

    g' = g + sqrt(weight) sum_i e_i (d_i . g) d_i        i: features firing here, e_i = +1 or -1

with d_i unit decoder directions. Its cross terms vanish on average, so the moment becomes
E[g g^T] + weight E[sum_i (d_i . g)^2 d_i d_i^T]: decoder directions, weighted by how often they
fire and by the squared effect each has on the loss. Sent back through the blocks before, the noise
reaches every matrix that a feature is made of.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from qll.lens.sae import SAE

# firings whose directions are gathered at a time, in bytes of float32
CHUNK_BYTES = 64 << 20


def feature_gradient(
    sae: SAE, weight: float, seed: int = 0
) -> Callable[[int, Tensor, Tensor], Float[Tensor, "tokens d_model"]]:
    """What to add at the place of `sae`: (window, activations, gradients) -> [tokens, d_model].

    Signs depend on the seed and the window alone, so a resumed calibration draws them again.

    >>> from qll.load.sae_file import LatentMatrix, SAESpec, StoredSAE
    >>> eye, zeros = LatentMatrix(torch.eye(2)), {"b_enc": torch.zeros(2), "b_dec": torch.zeros(2)}
    >>> sae = SAE(StoredSAE(SAESpec("layers.0", 2, 2, 2, "topk", k=1), eye, eye, zeros))
    >>> feature_gradient(sae, 4.0)(0, torch.tensor([[3.0, 1.0]]), torch.tensor([[0.5, 7.0]])).abs()
    tensor([[1., 0.]])
    """

    def added(window: int, activations: Tensor, gradients: Tensor) -> Tensor:
        hand = torch.Generator().manual_seed(seed * 1_000_003 + window)
        tokens, features, _ = sae.encode(activations.float()).entries()
        signs = torch.randint(0, 2, (len(tokens),), generator=hand).to(sae.device) * 2.0 - 1
        slopes = gradients.to(sae.device, torch.float32)
        found = torch.zeros_like(slopes)
        step = max(1, CHUNK_BYTES // (4 * sae.spec.d_out))
        for start in range(0, len(tokens), step):
            part = slice(start, start + step)
            needed, places = torch.unique(features[part], return_inverse=True)
            unit = functional.normalize(sae.directions(needed), dim=1)[places]
            effect = (unit * slopes[tokens[part]]).sum(1) * signs[part]
            found.index_add_(0, tokens[part], unit * effect[:, None])
        return weight**0.5 * found

    return added
