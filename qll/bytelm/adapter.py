"""Low-rank adapters: W x + (alpha / rank) B A x with a frozen or a learning W (Hu et al. 2021).

B starts at zero, so an adapter changes nothing until it is trained. The adapter's numbers lie
beside the weight they adapt, under its own name: a model without adapters loads into one with.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class AdaptedLinear(nn.Linear):
    """A Linear without bias and its adapter, which `merge` adds to the weight and `unmerge` takes
    away again.

    >>> layer = AdaptedLinear(4, 3, rank=2, alpha=4.0)
    >>> _ = nn.init.normal_(layer.adapter_up); x = torch.randn(5, 4); before = layer(x)
    >>> layer.merge(); layer(x).allclose(before, atol=1e-5)
    True
    """

    def __init__(self, into: int, out: int, rank: int, alpha: float) -> None:
        super().__init__(into, out, bias=False)
        self.adapter_down = nn.Parameter(torch.randn(rank, into) * into**-0.5)
        self.adapter_up = nn.Parameter(torch.zeros(out, rank))
        self.scale, self.merged = alpha / rank, False

    def forward(self, x: Float[Tensor, "*batch into"]) -> Float[Tensor, "*batch out"]:
        """The adapted product."""
        y = functional.linear(x, self.weight)
        if self.merged:
            return y
        down = functional.linear(x, self.adapter_down)
        return y + self.scale * functional.linear(down, self.adapter_up)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapter to the weight; merging twice does nothing."""
        if not self.merged:
            self.weight += self.change()
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the adapter out of the weight again, up to rounding."""
        if self.merged:
            self.weight -= self.change()
        self.merged = False

    def change(self) -> Float[Tensor, "out into"]:
        """What the adapter adds to the weight."""
        return self.scale * self.adapter_up @ self.adapter_down


def freeze_base(model: nn.Module) -> None:
    """Let only the adapters of `model` learn."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("adapter_" in name)


def unmerged(model: nn.Module) -> dict[str, Tensor]:
    """The state of a ByteModel whose adapters are not (any more) part of its weights."""
    tensors = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear) and module.merged:
            tensors[f"{name}.weight"] = module.weight.detach() - module.change().detach()
    return tensors


def with_adapters(model: nn.Module, rank: int, alpha: float, train_only: bool = True) -> nn.Module:
    """A copy of a ByteModel with adapters on its block linears, computing the same function.

    Raises UsageError for a model whose linears are networks or complex.

    >>> from qll.bytelm.config import ModelConfig
    >>> from qll.bytelm.model import ByteModel
    >>> adapted = with_adapters(ByteModel(ModelConfig(d_model=32, n_layers=1)), rank=2, alpha=4.0)
    >>> sum(p.numel() for p in adapted.parameters() if p.requires_grad) < adapted.num_params() / 4
    True
    """
    weights = replace(
        model.config.weights, lora_rank=rank, lora_alpha=alpha, lora_train_only=train_only
    )
    adapted = type(model)(replace(model.config, weights=weights)).to(model.embedding.weight)
    adapted.load_state_dict(unmerged(model), strict=False)
    return adapted.train(model.training)


def without_adapters(model: nn.Module) -> nn.Module:
    """A copy of a ByteModel whose adapters are part of its weights.

    >>> from qll.bytelm.config import ModelConfig
    >>> from qll.bytelm.model import ByteModel
    >>> plain = ByteModel(ModelConfig(d_model=32, n_layers=1))
    >>> without_adapters(with_adapters(plain, 2, 4.0)).config == plain.config
    True
    """
    weights = replace(model.config.weights, lora_rank=0, lora_train_only=False)
    default = type(weights)()
    weights = replace(weights, lora_alpha=default.lora_alpha)
    plain = type(model)(replace(model.config, weights=weights)).to(model.embedding.weight)
    tensors = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear) and not module.merged:
            tensors[f"{name}.weight"] = module.weight + module.change()
    plain.load_state_dict(
        {name: value for name, value in tensors.items() if "adapter_" not in name}
    )
    return plain.train(model.training)
