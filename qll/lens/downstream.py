"""What an autoencoder costs the model: next-token loss with its output in place of the activation.

    CE score = (CE_zero - CE_sae) / (CE_zero - CE_clean)      1: nothing lost, 0: as bad as zeros
    KL score = (KL_zero - KL_sae) / KL_zero,  KL(clean || patched)

The three cross-entropies (nats per token) stand beside the score, since a weak zero baseline makes
any score good. Zero means the activation is replaced by zeros. Two variants: only ordinary tokens
are patched (`ordinary`), or every token (`all`), where sinks decide much.
Source: SAELens evals.py and dictionary_learning's loss_recovered.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from qll.lens.attach import attach
from qll.lens.hooks import capture, hooked, states_from
from qll.lens.intervals import bootstrap
from qll.lens.sae import SAE
from qll.lens.tokens import ORDINARY, token_kinds
from qll.load.sae_names import hookpoint_of, site_of

# Bytes of float32 logits held at a time, per model state
LOGIT_BYTES = 64 << 20
VARIANTS = ("ordinary", "all")
# the sums of one window, in this order
COLUMNS = ("tokens", "ce_clean", "ce_sae", "ce_zero", "kl_sae", "kl_zero")


@torch.no_grad()
def downstream(
    model: PreTrainedModel,
    sae: SAE,
    windows: Int[Tensor, "windows context"],
    *,
    special: Collection[int] = (),
    hookpoint: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Raw cross-entropies, KL divergences and both scores of `sae` in `model`, for both variants.

    Each window is a document of the bootstrap. hookpoint: where to put it, if not where the
    autoencoder says. Five passes over the windows, of which only the first runs the blocks before
    that place; logits exist a few tokens at a time.
    """
    place = hookpoint or sae.spec.writes
    block = site_of(place).block or 0
    stream = hookpoint_of(f"layers.{block}.input")
    rows: dict[str, list[Tensor]] = {name: [] for name in VARIANTS}
    for window in tqdm(windows, f"CE at {place}", unit="window", file=sys.stderr, disable=None):
        ids = window[None].to(model.device)
        seen = capture(model, ids, list(dict.fromkeys([stream, place])))
        ordinary = (token_kinds(window, seen[place][0], special) == ORDINARY)[None]
        states = partial(_states, model, ids, block, seen[stream])
        clean = states()
        for name in VARIANTS:
            positions = ordinary if name == "ordinary" else torch.ones_like(ordinary)
            with attach(model, {place: sae}, mode="replace", positions=positions):
                patched = states()
            with hooked(model, [(place, _zeros(positions))]):
                zeroed = states()
            rows[name].append(_sums(model, [clean, patched, zeroed], window))
    return {name: _scores(torch.stack(found)) for name, found in rows.items()}


def _states(model: PreTrainedModel, ids: Tensor, block: int, stream: Tensor) -> Tensor:
    # the embedding is no block: what hangs on it needs its ids
    if block == 0:
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    return states_from(model, block, stream)[0]


def _zeros(positions: Bool[Tensor, "batch seq"]) -> Any:
    def handler(value: Tensor) -> Tensor:
        return value.masked_fill(positions.to(value.device)[..., None], 0)

    return handler


def _sums(model: PreTrainedModel, states: list[Tensor], window: Tensor) -> Tensor:
    """Sums over the scored tokens of one window, float64, in the order of COLUMNS."""
    total = torch.zeros(len(COLUMNS), dtype=torch.float64)
    step = max(1, LOGIT_BYTES // (4 * model.config.vocab_size))
    targets = window.to(model.device).long()
    for start in range(0, len(window) - 1, step):
        stop = min(start + step, len(window) - 1)
        logs = [model.lm_head(part[start:stop]).float().log_softmax(-1) for part in states]
        wanted = targets[start + 1 : stop + 1, None]
        losses = [-log.gather(-1, wanted) for log in logs]
        clean = logs[0].exp()
        losses += [(clean * (logs[0] - log)).sum(-1) for log in logs[1:]]
        # float64 after the move to the CPU: not every device has it
        losses = [loss.cpu().double().sum() for loss in losses]
        total += torch.tensor([stop - start, *map(float, losses)], dtype=torch.float64)
    return total


def _scores(rows: Tensor) -> dict[str, Any]:
    total = rows.sum(0)
    means = total / total[0]
    found: dict[str, Any] = {
        name: float(means[number]) for number, name in enumerate(COLUMNS) if number
    }
    found |= {"tokens": int(total[0]), "ce_score": _number(_ce_score(total[None]))}
    found["kl_score"] = _number(_kl_score(total[None]))
    found["ce_score_interval"] = bootstrap(lambda weights: _ce_score(weights @ rows), len(rows))
    return found


def _ce_score(total: Tensor) -> Tensor:
    return (total[:, 3] - total[:, 2]) / (total[:, 3] - total[:, 1])


def _kl_score(total: Tensor) -> Tensor:
    return (total[:, 5] - total[:, 4]) / total[:, 5]


def _number(value: Tensor) -> float | None:
    """None where the baseline differs by nothing: the place has no effect."""
    return float(value[0]) if bool(torch.isfinite(value).all()) else None
