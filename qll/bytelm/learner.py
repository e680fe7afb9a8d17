"""A byte model and what makes it learn: objective, optimiser, average of the weights.

A step reads `accumulate_steps` micro-batches whose gradients are averaged, so it is the step of one
batch as large as all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from qll.bytelm.compiled import compiled_training
from qll.bytelm.config import LossConfig
from qll.bytelm.guard import raise_non_finite
from qll.bytelm.losses import Objective
from qll.bytelm.model import ByteModel
from qll.bytelm.settings import LearningSettings
from qll.errors import ConfigError
from qll.train.muon import MatrixOptimiser


@runtime_checkable
class Batches(Protocol):
    """Anything that gives batches for ever."""

    def next(self) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
        """Inputs and their next bytes."""


class Learner:
    """One model that learns with the given settings; `losses` may be exchanged between steps.

    >>> from qll.bytelm.config import ModelConfig
    >>> model = ByteModel(ModelConfig(d_model=32, n_layers=1, context=8))
    >>> settings = LearningSettings(lr=0.01, accumulate_steps=1, batch_size=2)
    >>> learner = Learner(model, LossConfig(), settings)
    >>> ids = torch.full((2, 8), 97)
    >>> class Same:
    ...     def next(self): return ids, ids
    >>> norms = [learner.step(Same(), number, 0.0, 1.0) for number in range(20)]
    >>> learner.take_terms()["cross_entropy"] < 5.5
    True
    """

    def __init__(
        self,
        model: ByteModel,
        losses: LossConfig,
        settings: LearningSettings,
        context: Callable[[], AbstractContextManager] | None = None,
        beginnings: Mapping[str, float] | None = None,
    ) -> None:
        self.model, self.settings = model, settings
        self.objective = Objective(losses, beginnings).to(model.embedding.weight.device)
        # made before the blocks are wrapped: the copy is never trained
        self.average = self._averaged() if settings.ema else None
        if settings.compile:
            for block in model.blocks:
                block.forward = compiled_training(block)
        if settings.use_checkpoint:
            for block in model.blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        named = [*model.named_parameters(), *self.objective.named_parameters(prefix="objective")]
        self.optimiser = MatrixOptimiser(
            named,
            matrix_names(model),
            settings.lr,
            settings.weight_decay,
            settings.optimizer,
        )
        self.parameters = list(self.optimiser.named.values())
        self.context = context
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    @property
    def measured(self) -> ByteModel:
        """The model that is validated and kept: the average when there is one."""
        return self.average.module if self.average is not None else self.model

    def step(
        self, loader: Batches, number: int, done: float, share: float, check: bool = True
    ) -> Float[Tensor, ""]:
        """One step at `share` of the learning rate; returns the norm of the gradient.

        Raises NonFiniteError, naming the place, when loss or gradient is not finite (`check`).
        """
        self.model.train()
        self.optimiser.set_share(share)
        accumulate = self.settings.accumulate_steps
        for _ in range(accumulate):
            ids, targets = loader.next()
            loss, terms = self._loss(ids, targets, done)
            (loss / accumulate).backward()
            self._add(terms)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if check and not bool(torch.isfinite(norm + loss.detach())):
            raise_non_finite(self.model, lambda: self._loss(ids, targets, done)[0], number)
        if self.settings.grad_clip:
            nn.utils.clip_grads_with_norm_(self.parameters, self.settings.grad_clip, norm)
        self.optimiser.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return norm

    def take_terms(self) -> dict[str, float]:
        """Means of the terms of the loss since they were taken last, each over where it was on."""
        found = {name: float(value) / self.counts[name] for name, value in self.sums.items()}
        self.sums, self.counts = {}, {}
        return found

    def weigh(self, losses: LossConfig) -> None:
        """Use the weights of `losses` from now on; what was learned of weights stays."""
        self.objective.config = losses

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """All tensors of its state, for a checkpoint."""
        found = {
            "model": self.model.state_dict(),
            "objective": self.objective.state_dict(),
            "optimiser": self.optimiser.tensors(),
            "sums": self.sums,
        }
        if self.average is not None:
            found["average"] = self.average.state_dict()
        return {name: dict(tensors) for name, tensors in found.items()}

    def restore(self, groups: dict[str, dict[str, Tensor]], counts: dict[str, int]) -> None:
        """Continue where `groups` were taken; raises ConfigError when they are of another model."""
        try:
            self.model.load_state_dict(groups.get("model", {}))
            self.objective.load_state_dict(groups.get("objective", {}))
            if self.average is not None:
                self.average.load_state_dict(groups.get("average", {}))
        except RuntimeError as error:
            raise ConfigError(
                "of another architecture",
                where="the checkpoint",
                found=str(error)[:300],
                hint="choose another --out, or delete the checkpoint to start over",
            ) from None
        self.optimiser.restore(groups.get("optimiser", {}))
        self.sums, self.counts = groups.get("sums", {}), counts

    def _loss(
        self, ids: Int[Tensor, "batch seq"], targets: Int[Tensor, "batch seq"], done: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.context is None:
            return self.objective(self.model, ids, targets, done)[:2]
        with self.context():
            return self.objective(self.model, ids, targets, done)[:2]

    def _add(self, terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            value = value.float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def _averaged(self) -> AveragedModel:
        average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(self.settings.ema))
        return average.requires_grad_(False)


def matrix_names(model: nn.Module) -> set[str]:
    """Weights of the linear layers inside the blocks, real [out, in] or complex [out, in, 2].

    >>> from qll.bytelm.config import ModelConfig
    >>> names = matrix_names(ByteModel(ModelConfig(d_model=32, n_layers=1)))
    >>> "head.weight" in names, "blocks.0.feed_forward.down.weight" in names
    (False, True)
    """
    return {
        name
        for name, parameter in model.named_parameters()
        if name.startswith("blocks.")
        and name.endswith(".weight")
        and (parameter.ndim == 2 or (parameter.ndim == 3 and parameter.shape[-1] == 2))
    }
