"""AdamW with a warm-up and a cosine to a tenth of the learning rate, over a known number of steps.

The steps are counted, not the seconds, so that a run ends with the same numbers on a slow machine
and after an interruption.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qll.errors import NonFiniteError

WARM_UP = 0.1  # share of the steps
LAST_SHARE = 0.1  # learning rate at the end, of that at the top
# batches are small, and a short memory of squares makes steps of their noise
BETAS = (0.9, 0.99)
CLIP_NORM = 1.0


class Optimiser:
    """One step at a time on `parameters`; gradients are clipped to norm 1.

    >>> weight = nn.Parameter(torch.ones(1)); optimiser = Optimiser([weight], 0.1, steps=50)
    >>> for _ in range(50):
    ...     loss = (weight ** 2).sum(); loss.backward(); optimiser.step(loss.item())
    >>> abs(weight.item()) < 0.1
    True
    """

    def __init__(self, parameters: Sequence[nn.Parameter], rate: float, steps: int) -> None:
        self.parameters, self.steps = list(parameters), steps
        # cores have no natural scale to decay to, and a few hundred steps need no regulariser
        fused = all(parameter.device.type in ("cpu", "cuda") for parameter in self.parameters)
        self.adam = torch.optim.AdamW(
            self.parameters, lr=rate, betas=BETAS, weight_decay=0.0, fused=fused
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.adam, lambda step: share_of_rate(step, steps)
        )

    def step(self, loss: float) -> None:
        """Move the parameters along their gradients and clear these.

        Raises NonFiniteError when the loss is not a number.
        """
        if not math.isfinite(loss):
            raise NonFiniteError(
                "the training loss is not finite",
                found=loss,
                hint="lower --learning_rate, or train with --precision float32",
            )
        nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.schedule.step()

    def tensors(self) -> dict[str, Tensor]:
        """Adam's moments by parameter number, for a checkpoint."""
        return {
            f"{number}.{key}": state[key]
            for number, state in self.adam.state_dict()["state"].items()
            for key in ("step", "exp_avg", "exp_avg_sq")
        }

    def restore(self, tensors: dict[str, Tensor], steps_done: int) -> None:
        """Continue where `tensors` were taken, after `steps_done` steps."""
        state: dict[int, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            number, key = name.split(".")
            state.setdefault(int(number), {})[key] = tensor
        settings = self.adam.state_dict()["param_groups"]
        self.adam.load_state_dict({"state": state, "param_groups": settings})
        self.schedule.last_epoch = steps_done
        for group in self.adam.param_groups:
            group["lr"] = group["initial_lr"] * share_of_rate(steps_done, self.steps)


def share_of_rate(step: int, steps: int) -> float:
    """Learning rate at `step` of `steps`, as a share of the highest.

    >>> [round(share_of_rate(step, 100), 2) for step in (0, 4, 52, 99)]
    [0.1, 0.5, 0.6, 0.1]
    """
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm if warm > 1 else 1.0
    done = min(1.0, (step - warm) / max(1, steps - warm))
    return LAST_SHARE + (1 - LAST_SHARE) * 0.5 * (1 + math.cos(math.pi * done))
