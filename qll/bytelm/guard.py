"""Where a number that is not finite comes from: the first layer, weight or gradient that has one.

Asked only after the loss or the norm of the gradient was found not to be finite, so it costs
nothing before.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from qll.errors import NonFiniteError


def raise_non_finite(model: nn.Module, loss: Callable[[], Tensor], step: int) -> None:
    """Raise NonFiniteError that names the place; `loss` computes the loss of the batch again.

    Gradients of the failed step must still be there.

    >>> model = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    >>> raise_non_finite(model, lambda: model(torch.tensor([[float("nan")]])).sum(), step=3)
    Traceback (most recent call last):
    ...
    qll.errors.NonFiniteError: step 3: training is not finite (found layer 0); \
lower --lr, or train with --precision float32
    """
    raise NonFiniteError(
        "training is not finite",
        where=f"step {step}",
        found=_weight(model) or _layer(model, loss) or _gradient(model) or "the loss alone",
        hint="lower --lr, or train with --precision float32",
    )


def _weight(model: nn.Module) -> str | None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"weight {name}"
    return None


def _layer(model: nn.Module, loss: Callable[[], Tensor]) -> str | None:
    """The innermost layer that is the first to give a number which is not finite."""
    found: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if any(not torch.isfinite(tensor).all() for tensor in _tensors(output)):
                found.append(name or "the model")

        return look

    with ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(hook(name)).remove)
        loss()
    return f"layer {found[0]}" if found else None


def _gradient(model: nn.Module) -> str | None:
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"gradient of {name}"
    return None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
