"""Every linear layer of a block is made here: dense, adapted, complex, or a tensor network."""

from __future__ import annotations

from functools import lru_cache

from jaxtyping import Float
from torch import Tensor, nn

from qll.bytelm.adapter import AdaptedLinear
from qll.bytelm.adaptive_rank import AdaptiveRank
from qll.bytelm.complex_numbers import (
    ComplexLinear,
    ComplexRMSNorm,
    ModReluGate,
    ModulusGate,
    SiluGate,
)
from qll.bytelm.config import ModelConfig
from qll.bytelm.context import Context
from qll.bytelm.norm import RMSNorm
from qll.model.layers import TNLinear
from qll.tn import NETWORKS, default_modes, tensor_shapes
from qll.tn.network import NetworkSpec

SITES = {"mpo": 3, "tree": 3, "kron": 2}
HALVINGS = 20  # of the interval in which the ranks' common factor is sought


def linear(config: ModelConfig, into: int, out: int) -> nn.Module:
    """A layer without bias from `into` to `out` channels, of the kind the config asks for.

    >>> from qll.bytelm.config import WeightConfig
    >>> linear(ModelConfig(weights=WeightConfig(format="lowrank", keep=0.5)), 64, 64).spec.ranks
    (16,)
    """
    weights, complex_stream = config.weights, config.stream.numbers == "complex"
    if weights.format != "dense":
        # a network of a complex stream holds the real matrix: it is not phase equivariant
        spec = network_spec(weights.format, into, out, weights.keep)
        return AdaptiveRank(spec, config) if weights.rank_groups else TNLinear(spec)
    if complex_stream:
        return ComplexLinear(into, out)
    if weights.lora_rank:
        return AdaptedLinear(into, out, weights.lora_rank, weights.lora_alpha)
    return nn.Linear(into, out, bias=False)


def through(
    layer: nn.Module, x: Float[Tensor, "batch seq into"], context: Context
) -> Float[Tensor, "batch seq out"]:
    """What `layer`, made by `linear`, gives for `x`; one of adaptive rank leaves notes.

    >>> import torch
    >>> nowhere = Context(0, (torch.ones(1, 1), torch.zeros(1, 1)))
    >>> through(linear(ModelConfig(), 8, 6), torch.ones(1, 2, 8), nowhere).shape
    torch.Size([1, 2, 6])
    """
    return layer(x, context) if isinstance(layer, AdaptiveRank) else layer(x)


def norm(config: ModelConfig, width: int) -> nn.Module:
    """A root-mean-square norm for the config's numbers."""
    return ComplexRMSNorm(width) if config.stream.numbers == "complex" else RMSNorm(width)


def gate(config: ModelConfig, width: int) -> nn.Module:
    """What multiplies values by a gate, for the config's numbers."""
    if config.stream.numbers != "complex":
        return SiluGate()
    return ModReluGate(width) if config.stream.activation == "modrelu" else ModulusGate(width)


@lru_cache(maxsize=256)
def network_spec(format: str, into: int, out: int, keep: float) -> NetworkSpec:
    """The largest spec of a matrix [out, into] with at most `keep` of its parameters.

    All ranks are one share of the largest useful ones (1 at least, even where that exceeds keep).

    >>> network_spec("mpo", 64, 64, 0.25).ranks
    (7, 7)
    """
    modes = default_modes((out, into), SITES[format]) if format in SITES else {}
    spec = NetworkSpec(format, (out, into), modes=modes)
    network = NETWORKS[format]
    largest = network.max_ranks(spec)

    def at(share: float) -> NetworkSpec:
        return network.clamp(spec.with_ranks([max(1, int(share * rank)) for rank in largest]))

    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        fits = tensor_shapes(at(middle)).num_params <= keep * out * into
        low, high = (middle, high) if fits else (low, middle)
    return at(low)
