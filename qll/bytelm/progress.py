"""How far a run is, and the best it has been; what its log lines are made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import psutil
import torch


@dataclass
class Progress:
    """Counters that a checkpoint keeps as JSON (`vars` of it)."""

    step: int = 0
    bytes: int = 0
    """Trained on so far, repeated ones counted again."""
    seconds: float = 0.0
    """Of training and validation, over all attempts."""
    stage: int = 0
    validated: int = 0
    """Validations so far that were due, not counting the last."""
    best_bits: float | None = None
    best_step: int = 0
    best_bytes: int = 0
    best_seconds: float = 0.0
    stale: int = 0
    """Validations since the best."""

    def better(self, bits: float) -> bool:
        """Note a validation; whether it is the best so far.

        >>> progress = Progress(step=5); progress.better(2.0), progress.better(2.5), progress.stale
        (True, False, 1)
        """
        if self.best_bits is not None and bits >= self.best_bits:
            self.stale += 1
            return False
        self.best_bits, self.stale = bits, 0
        self.best_step, self.best_bytes, self.best_seconds = self.step, self.bytes, self.seconds
        return True


def train_line(
    progress: Progress,
    terms: dict[str, float],
    speed: float,
    eta: float | None,
    **facts: Any,
) -> dict[str, Any]:
    """A line of metrics.jsonl about the steps since the line before.

    >>> line = train_line(Progress(step=10), {"cross_entropy": math.log(2)}, 1.0, None)
    >>> line["bits_per_byte"], line["step"], line["eta_seconds"]
    (1.0, 10, None)
    """
    nats = terms["cross_entropy"]
    others = {f"loss_{name}": terms[name] for name in terms if name != "cross_entropy"}
    device_bytes = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    return {
        "kind": "train",
        "step": progress.step,
        "bytes": progress.bytes,
        "loss": nats,
        "bits_per_byte": nats / math.log(2),
        **others,
        **facts,
        "tokens_per_second": round(speed, 1),
        "seconds": round(progress.seconds, 3),
        "eta_seconds": None if eta is None else round(eta, 1),
        "rss_bytes": psutil.Process().memory_info().rss,
        "device_bytes": device_bytes,
    }


def validation_line(progress: Progress, bits: float, stage: str) -> dict[str, Any]:
    """A line of metrics.jsonl about a validation."""
    return {
        "kind": "validation",
        "step": progress.step,
        "bytes": progress.bytes,
        "seconds": round(progress.seconds, 3),
        "stage": stage,
        "bits_per_byte": bits,
        "best_bits_per_byte": progress.best_bits,
        "best_step": progress.best_step,
    }
