"""A low-rank linear whose bond dimension each position chooses: y = A diag(w(x)) B x.

The weights w of the bond's components are 1, ..., 1, a fraction, 0, ..., 0 (qll/bytelm/opening.py):
a position of rank r uses the first r components alone, so components are nested as in Matryoshka
representations (Kusupati et al. 2022) and the first learn to be worth the most. Nothing is computed
sooner for it: what is closed is multiplied by 0.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from qll.bytelm.config import ModelConfig
from qll.bytelm.context import Context
from qll.bytelm.opening import Opening, nested
from qll.model.layers import TNLinear
from qll.tn.network import NetworkSpec


class AdaptiveRank(TNLinear):
    """A low-rank linear of `weights.rank_groups` groups of bond components.

    >>> import torch
    >>> from qll.bytelm.config import WeightConfig
    >>> config = ModelConfig(weights=WeightConfig(format="lowrank", rank_groups=4))
    >>> layer = AdaptiveRank(NetworkSpec("lowrank", (6, 8), (4,)), config)
    >>> _ = [torch.nn.init.ones_(core) for core in layer.cores]
    >>> layer.opened(torch.ones(8), torch.tensor([0.5])).tolist()  # two components, 8 of each
    [16.0, 16.0, 16.0, 16.0, 16.0, 16.0]
    """

    def __init__(self, spec: NetworkSpec, config: ModelConfig) -> None:
        super().__init__(spec)
        self.groups, (self.rank,) = config.weights.rank_groups, spec.ranks
        self.opening = Opening(config, spec.shape[1])

    def forward(
        self, x: Float[Tensor, "batch seq into"], context: Context
    ) -> Float[Tensor, "batch seq out"]:
        """The layer's output; the open share is noted for the losses."""
        share = self.opening.share(x)
        context.note("rank", share.float().mean())
        return self.opened(x, share)

    def opened(
        self, x: Float[Tensor, "*batch into"], share: Float[Tensor, "*batch 1"]
    ) -> Float[Tensor, "*batch out"]:
        """The output with so large a share of the bond open."""
        left, right = self.cores
        weights = nested(share, self.rank, self.groups)
        return functional.linear(functional.linear(x, right) * weights, left)

    def ranks(self, x: Float[Tensor, "*batch into"]) -> Float[Tensor, "*batch"]:
        """Components of the bond that are not closed, at each position."""
        weights = nested(self.opening.share(x), self.rank, self.groups)
        return (weights > 0).sum(dim=-1).to(x.dtype)
