"""Matrices learn by Muon, everything else by AdamW, both of torch, under one schedule.

Muon (Jordan et al. 2024) moves a matrix along the nearest orthogonal matrix of its momentum, scaled
here to the size of AdamW's steps (Liu et al. 2025, "Muon is scalable for LLM training", eq. 4), so
that one learning rate serves both. A complex matrix, a real tensor [out, in, 2], is the real matrix
[out, 2 in] to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qll.errors import IntegrityError

BETAS = (0.9, 0.99)  # batches are small, and a short memory of squares makes steps of their noise
MOMENTUM = 0.95


class MatrixOptimiser:
    """One step at a time on named parameters; `matrices` are the names of those that are matrices.

    kind "adamw" has no Muon. Vectors (norm gains, biases) and single numbers do not decay.

    >>> weight = nn.Parameter(torch.eye(3)); gain = nn.Parameter(torch.ones(3))
    >>> optimiser = MatrixOptimiser([("w", weight), ("g", gain)], {"w"}, rate=0.02)
    >>> for _ in range(100):
    ...     (weight @ gain).square().sum().backward(); optimiser.step()
    >>> bool((weight @ gain).square().sum() < 0.3)
    True
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        matrices: set[str],
        rate: float,
        weight_decay: float = 0.0,
        kind: Literal["muon", "adamw"] = "muon",
    ) -> None:
        self.named = {name: item for name, item in parameters if item.requires_grad}
        by_muon = [name for name in self.named if kind == "muon" and name in matrices]
        others = [name for name in self.named if name not in set(by_muon)]
        self.views = {name: _matrix(self.named[name]) for name in by_muon}
        decaying = [name for name in others if self.named[name].ndim > 1]
        still = [name for name in others if self.named[name].ndim <= 1]
        groups = [
            {"params": [self.named[name] for name in names], "weight_decay": decay}
            for names, decay in ((decaying, weight_decay), (still, 0.0))
            if names
        ]
        fused = all(item.device.type in ("cpu", "cuda") for item in self.named.values())
        self.order = [by_muon, decaying + still]
        self.optimisers: list[torch.optim.Optimizer | None] = [
            torch.optim.Muon(
                list(self.views.values()),
                lr=rate,
                weight_decay=weight_decay,
                momentum=MOMENTUM,
                adjust_lr_fn="match_rms_adamw",
            )
            if by_muon
            else None,
            torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=fused) if groups else None,
        ]
        self.rate = rate

    def set_share(self, share: float) -> float:
        """Use `share` of the highest learning rate from now on; returns that rate."""
        for optimiser in filter(None, self.optimisers):
            for group in optimiser.param_groups:
                group["lr"] = self.rate * share
        return self.rate * share

    def step(self) -> None:
        """Move the parameters along their gradients and clear these."""
        for name, view in self.views.items():
            gradient = self.named[name].grad
            view.grad = None if gradient is None else gradient.view(view.shape)
        for optimiser in filter(None, self.optimisers):
            optimiser.step()
        self.clear()

    def clear(self) -> None:
        """Forget the gradients."""
        for parameter in (*self.named.values(), *self.views.values()):
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """The optimisers' state as `<parameter>:<key>`, for a checkpoint."""
        found = {}
        for names, optimiser in zip(self.order, self.optimisers, strict=True):
            for number, state in (optimiser.state_dict()["state"] if optimiser else {}).items():
                found |= {f"{names[number]}:{key}": value for key, value in state.items()}
        return found

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continue where `tensors` were taken; raises IntegrityError for those of other parameters.

        None at all are fine: that is an optimiser which has not moved yet.
        """
        states: list[dict[int, dict[str, Any]]] = [{}, {}]
        places = {
            name: (which, number)
            for which, names in enumerate(self.order)
            for number, name in enumerate(names)
        }
        for full, value in tensors.items():
            name, _, key = full.rpartition(":")
            if name not in places:
                raise IntegrityError("state of an unknown parameter", where=name)
            which, number = places[name]
            states[which].setdefault(number, {})[key] = value
        for state, optimiser in zip(states, self.optimisers, strict=True):
            if optimiser is not None and state:
                groups = optimiser.state_dict()["param_groups"]
                optimiser.load_state_dict({"state": state, "param_groups": groups})


def _matrix(parameter: nn.Parameter) -> nn.Parameter:
    """The same numbers in memory, as a matrix."""
    return nn.Parameter(parameter.detach().view(len(parameter), -1))
