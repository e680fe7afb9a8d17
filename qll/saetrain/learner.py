"""One autoencoder and all that training it needs: optimiser, dead features, statistics.

Adam with a warm-up over 4 % of the run and a straight line to zero after it. What decides the next
step is in `tensors`, so that a run that continues from them takes the same steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qll.errors import NonFiniteError
from qll.saetrain.center import geometric_median, spread
from qll.saetrain.coder import Coder, CoderShape, Codes
from qll.saetrain.settings import LearningOptions

WARM_UP = 0.04  # share of the run
ADAM = ("step", "exp_avg", "exp_avg_sq")
# Chosen on 369k tokens of SmolLM2's block 9: held-out FVU after one pass (180 steps) 0.135 with
# torch's betas and 0.129 with these at a rate of 5e-3, 0.169 at 2e-3; after three (1,080 steps)
# 0.108 with torch's at 2e-3, 0.099 with these at 4e-3.
BETAS = (0.8, 0.99)


@dataclass
class Statistics:
    """Sums over some steps, and what they mean."""

    tokens: int = 0
    fired: int = 0
    sse: float = 0.0
    squares: float = 0.0
    total: Tensor | float = 0.0
    loss: float = 0.0
    steps: int = 0

    def add(self, y: Float[Tensor, "tokens d_out"], codes: Codes) -> None:
        """Add a step on targets `y`, both in the coder's units."""
        self.tokens += len(y)
        self.fired += int(codes.fires.sum())
        self.sse += codes.error.square().sum().item()
        self.squares += y.square().sum().item()
        self.total = self.total + y.sum(dim=0).double()
        self.loss += codes.loss.item()
        self.steps += 1

    def means(self) -> dict[str, float]:
        """FVU (pooled over these tokens), L0 and mean loss."""
        variance = self.squares - (self.total.square().sum() / self.tokens).item()
        return {
            "fvu": self.sse / variance,
            "l0": self.fired / self.tokens,
            "loss": self.loss / self.steps,
        }


@dataclass
class Learner:
    """An autoencoder at a place, in training.

    silent: tokens since each feature last fired, or was started anew. revived: features started
    anew since the last report. last: input and error of the last step, which `revive` draws from.
    """

    coder: Coder
    options: LearningOptions
    dead_after: int
    precision: torch.dtype
    adam: torch.optim.Adam = field(init=False)
    silent: Int[Tensor, " d_sae"] = field(init=False)
    revived: int = 0
    last: tuple[Tensor, Tensor] | None = None
    statistics: Statistics = field(default_factory=Statistics)

    def __post_init__(self) -> None:
        device = self.coder.W_enc.device
        parameters = list(self.coder.parameters())
        fused = device.type != "mps"
        self.adam = torch.optim.Adam(parameters, self.options.rate, BETAS, fused=fused)
        self.silent = torch.zeros(self.shape.d_sae, dtype=torch.int64, device=device)

    @property
    def shape(self) -> CoderShape:
        """What is trained, and where."""
        return self.coder.shape

    def start(self, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_out"]) -> None:
        """Take units, centre and thresholds from the first activations."""
        for values in (x, y):
            spread(values, self.shape.hookpoint)
        mean = self.options.center == "mean"
        self.coder.start(x, y, y.mean(dim=0) if mean else geometric_median(y))

    def step(
        self, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_out"], done: float
    ) -> None:
        """One step on activations x -> y, when a share `done` of the run lies behind.

        Raises NonFiniteError when the loss is not a number.
        """
        for group in self.adam.param_groups:
            group["lr"] = self.options.rate * share_of_rate(done)
        dead = self.silent > self.dead_after
        codes = self.coder(x, y, dead, self.options.auxk, self.precision)
        codes.loss.backward()
        self._require_finite(codes)
        self.coder.project_gradient()
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.coder.normalize_decoder()
        self.silent += len(x)
        self.silent[codes.fires > 0] = 0
        self.statistics.add(y / self.coder.scale_out, codes)
        self.last = (x, codes.error)

    def revive(self, generator: torch.Generator) -> None:
        """Start features anew that AuxK could not wake in as long a time as makes one dead."""
        features = (self.silent > 2 * self.dead_after).nonzero()[:, 0]
        if not len(features) or self.last is None:
            return
        self.coder.revive(features, *self.last, generator)
        for name, parameter in self.coder.named_parameters():
            if name in ("W_enc", "W_dec", "b_enc", "log_threshold"):
                for key in ("exp_avg", "exp_avg_sq"):
                    self.adam.state[parameter][key][features] = 0
        self.silent[features] = 0
        self.revived += len(features)

    def report(self) -> dict[str, float]:
        """FVU, L0, loss, dead share and how many were started anew, since the last report."""
        found = self.statistics.means()
        found["dead_share"] = (self.silent > self.dead_after).double().mean().item()
        found["revived"] = self.revived
        self.statistics, self.revived = Statistics(), 0
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on."""
        found = {f"coder.{name}": value for name, value in self.coder.state_dict().items()}
        for name, parameter in self.coder.named_parameters():
            state = self.adam.state[parameter]
            found |= {f"adam.{name}.{key}": state[key] for key in ADAM}
        return {**found, "silent": self.silent}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continue where `tensors` were taken."""
        prefix = "coder."
        weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        self.coder.load_state_dict(weights)
        for name, parameter in self.coder.named_parameters():
            self.adam.state[parameter] = {key: tensors[f"adam.{name}.{key}"] for key in ADAM}
        self.silent = tensors["silent"]

    def _require_finite(self, codes: Codes) -> None:
        if not math.isfinite(codes.loss.item()):
            raise NonFiniteError(
                "the training loss is not finite",
                where=self.shape.hookpoint,
                found=codes.loss.item(),
                hint="lower --rate, or train with --precision float32",
            )


def share_of_rate(done: float) -> float:
    """Learning rate as a share of the highest, when a share `done` of the run lies behind.

    >>> [round(share_of_rate(done), 3) for done in (0.0, 0.02, 0.04, 0.52, 1.0)]
    [0.01, 0.505, 1.0, 0.5, 0.0]
    """
    if done < WARM_UP:
        return 0.01 + 0.99 * done / WARM_UP
    return max(0.0, (1 - done) / (1 - WARM_UP))
