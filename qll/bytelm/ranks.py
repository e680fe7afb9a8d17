"""How many directions are in use: of a model's memories, and of linears of adaptive rank.

The effective rank of a state is exp of the entropy of its normalised singular values (Roy and
Vetterli 2007, "The effective rank"); the rank of a linear is what positions open of its bond.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Inexact, Int
from torch import Tensor

from qll.bytelm.adaptive_rank import AdaptiveRank
from qll.bytelm.model import ByteModel


@dataclass(frozen=True)
class StateRank:
    """One tensor of a block's state, as matrices over its last two axes."""

    block: int
    tensor: int
    shape: tuple[int, ...]
    """Without the batch."""
    effective_rank: float
    """Mean over batch and heads."""
    full_rank: int
    """What it could be."""


def effective_rank(matrix: Inexact[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch"]:
    """From 1, one direction, to min(rows, columns), all alike; 0 for a matrix of zeros.

    >>> effective_rank(torch.eye(4)).item(), effective_rank(torch.ones(4, 4)).item()
    (4.0, 1.0)
    """
    # no singular values on MPS; float64 keeps the small ones
    wide = torch.complex128 if matrix.is_complex() else torch.float64
    values = torch.linalg.svdvals(matrix.cpu().to(wide))
    total = values.sum(dim=-1, keepdim=True)
    shares = values / total.clamp(min=torch.finfo(torch.float64).tiny)
    entropy = torch.special.entr(shares).sum(dim=-1)
    ranks = torch.where(total[..., 0] > 0, entropy.exp(), torch.zeros_like(entropy))
    return ranks.round(decimals=9).float()


@torch.inference_mode()
def state_ranks(model: ByteModel, ids: Int[Tensor, "batch seq"]) -> list[StateRank]:
    """Effective rank of every matrix in the state after `ids`; vectors are left out.

    >>> from qll.bytelm.config import ModelConfig
    >>> model = ByteModel(ModelConfig(d_model=32, n_layers=1, context=8)).eval()
    >>> state_ranks(model, torch.arange(6)[None])[0].full_rank
    6
    """
    _, state = model.step(ids, model.initial_state(len(ids), ids.device))
    found = []
    for block, layer in enumerate(state.layers):
        for index, tensor in enumerate(layer):
            matrix = _complex(tensor)
            if matrix.ndim >= 3 and min(matrix.shape[-2:]) > 1:
                rank = float(effective_rank(matrix).mean())
                full = min(matrix.shape[-2:])
                found.append(StateRank(block, index, tuple(tensor.shape[1:]), rank, full))
    return found


@dataclass(frozen=True)
class BondRank:
    """The bond of one linear of adaptive rank."""

    linear: str
    mean_rank: float
    """Components that a position leaves open, on average."""
    full_rank: int
    """What it could be."""


@torch.inference_mode()
def bond_ranks(model: ByteModel, ids: Int[Tensor, "batch seq"]) -> list[BondRank]:
    """The mean rank of every linear of adaptive rank when the model reads `ids`; none without.

    >>> from qll.bytelm.config import ModelConfig, WeightConfig
    >>> weights = WeightConfig(format="lowrank", keep=0.5, rank_groups=4)
    >>> model = ByteModel(ModelConfig(d_model=32, n_layers=1, n_heads=2, weights=weights)).eval()
    >>> found = bond_ranks(model, torch.arange(6)[None])
    >>> found[1].linear, found[1].full_rank, found[1].mean_rank
    ('blocks.0.mixer.out', 8, 8.0)
    """
    linears = {name: item for name, item in model.named_modules() if isinstance(item, AdaptiveRank)}
    if not linears:
        return []
    seen: dict[str, list[Tensor]] = {name: [] for name in linears}
    hooks = [
        item.register_forward_pre_hook(
            lambda item, inputs, name=name: seen[name].append(item.ranks(inputs[0]).flatten())
        )
        for name, item in linears.items()
    ]
    try:
        model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    means = {name: float(torch.cat(ranks).double().mean()) for name, ranks in seen.items()}
    return [BondRank(name, means[name], item.rank) for name, item in linears.items()]


def _complex(tensor: Tensor) -> Tensor:
    """A last axis of two parts as complex numbers."""
    if tensor.shape[-1] == 2 and tensor.ndim >= 4:
        return torch.view_as_complex(tensor.float().contiguous())
    return tensor
