"""Whether a model sees what it should predict: an exact test, and a verdict on numbers too good.

Two inputs that differ only from some byte on must give bit-identical logits before it. That is
asked before training; what it cannot find, such as held-out text that was trained on, shows as a
loss that no honest model of this size reaches.
"""

from __future__ import annotations

import bz2
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from qll.errors import LeakError


@torch.inference_mode()
def first_leak(model: nn.Module, context: int, seed: int = 0) -> int | None:
    """A position whose logits change with a later byte, or None for a causal model.

    >>> class Mean(nn.Module):
    ...     def forward(self, ids): return ids.double().mean(1, True).expand(ids.shape)[..., None]
    >>> first_leak(Mean(), context=8)
    0
    """
    generator = torch.Generator().manual_seed(seed)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    ids = torch.randint(1, 256, (1, context), generator=generator)
    training = model.training
    model.eval()
    before = model(ids.to(device))
    found = None
    for changed in sorted({context // 3, context - 1} - {0}):
        other = ids.clone()
        other[:, changed:] = (other[:, changed:] + 101) % 255 + 1
        same = (model(other.to(device)) == before)[0, :changed].flatten(1).all(1)
        if not same.all() and found is None:
            found = int((~same).nonzero()[0])
    model.train(training)
    return found


def require_causal(model: nn.Module, context: int) -> None:
    """Raise LeakError when logits of `model` depend on later bytes."""
    position = first_leak(model, context)
    if position is not None:
        raise LeakError(
            "the model sees the future",
            where=f"logits of byte {position}",
            expected="none that change with a later byte",
            hint="some part of the model mixes positions without a causal mask",
        )


def require_plausible(
    bits: float, least: float, model: nn.Module, context: int, held_out: Sequence[np.ndarray]
) -> None:
    """Raise LeakError when `bits` per byte are fewer than `least`, saying what may be the cause."""
    if bits >= least:
        return
    require_causal(model, context)
    text = b"".join(document.astype(np.uint8).tobytes() for document in held_out)
    packed = 8 * len(bz2.compress(text)) / max(1, len(text))
    raise LeakError(
        "suspected leak: validation is better than a model of this size can be",
        where="validation",
        expected=f"at least {least} bits per byte",
        found=f"{bits:.4f} (bz2 needs {packed:.2f} on the same text)",
        hint="the model is causal, so look for held-out text that is also trained on; for a text "
        "that really is this easy, run again with --leak_below 0",
    )
