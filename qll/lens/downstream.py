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
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from qll.lens.hooks import hooked
from qll.lens.intervals import bootstrap
from qll.lens.readings import Encoded
from qll.lens.rest import Rest
from qll.lens.tokens import ORDINARY

# Bytes of float32 logits held at a time, per model state
LOGIT_BYTES = 64 << 20
VARIANTS = ("ordinary", "all")
# the sums of one window, in this order
COLUMNS = ("tokens", "ce_clean", "ce_sae", "ce_zero", "kl_sae", "kl_zero")


@torch.no_grad()
def downstream(encoded: Encoded, priced: int | None = None) -> dict[str, dict[str, Any]]:
    """Raw cross-entropies, KL divergences and both scores of an autoencoder, for both variants.

    Each window is a document of the bootstrap; priced: take so many windows at most, spread over
    all. Per window four passes from the autoencoder's block on; the clean pass is in the readings.
    Logits exist a few tokens at a time.
    """
    model, place = encoded.readings.model, encoded.sae.spec.writes
    rest, rows = Rest(encoded.readings, place), []
    chosen = spread(len(encoded.windows), priced)
    for number in tqdm(chosen, f"CE at {place}", unit="window", file=sys.stderr, disable=None):
        made, ordinary = encoded.decoded(number), encoded.kinds(number) == ORDINARY
        states = [encoded.readings.states(number)]
        for where in (ordinary, torch.ones_like(ordinary)):
            for value in (made, torch.zeros_like(made)):
                with hooked(model, [(place, partial(_replaced, value, where))]):
                    states.append(rest.states(number)[0])
        rows.append(_sums(model, states, encoded.readings.windows[number]))
    table = torch.stack(rows)
    return {name: _scores(table[:, line]) for line, name in enumerate(VARIANTS)}


def spread(count: int, most: int | None) -> list[int]:
    """At most `most` of the numbers below `count`, at even distances.

    >>> spread(5, 2), spread(2, None)
    ([0, 4], [0, 1])
    """
    most = count if most is None else min(most, count)
    return torch.linspace(0, count - 1, most).round().int().tolist()


def _replaced(
    made: Float[Tensor, "tokens d"], where: Bool[Tensor, " tokens"], value: Tensor
) -> Tensor:
    made = made.to(value.device, value.dtype)
    return torch.where(where.to(value.device)[:, None], made, value[0])[None]


def _sums(
    model: PreTrainedModel,
    states: list[Float[Tensor, "context d"]],
    window: Int[Tensor, " context"],
) -> Float[Tensor, "variants columns"]:
    """Sums over the scored tokens of one window, float64, in the order of VARIANTS and COLUMNS.

    states: clean, then two of each variant. With z the logits and n their logsumexp, CE = n -
    z_target and, where p = exp(z - n), KL(p || q) = sum p (z - z_q) - n + n_q: one exponential of
    the vocabulary per state.
    """
    total = torch.zeros(len(VARIANTS), len(COLUMNS), dtype=torch.float64)
    step = max(1, LOGIT_BYTES // (4 * model.config.vocab_size))
    targets = window.to(model.device).long()
    for start in range(0, len(window) - 1, step):
        stop = min(start + step, len(window) - 1)
        wanted = targets[start + 1 : stop + 1, None]
        clean = model.lm_head(states[0][start:stop]).float()
        norm = clean.logsumexp(-1)
        share = (clean - norm[:, None]).exp_()
        found = [norm - clean.gather(-1, wanted)[:, 0]]
        for state in states[1:]:
            logits = model.lm_head(state[start:stop]).float()
            own = logits.logsumexp(-1)
            found.append(own - logits.gather(-1, wanted)[:, 0])
            found.append(torch.linalg.vecdot(share, clean.sub(logits)) - norm + own)
        # float64 after the move to the CPU: not every device has it
        ce_clean, *others = [part.cpu().double().sum() for part in found]
        for line in range(len(VARIANTS)):
            ce_sae, kl_sae, ce_zero, kl_zero = others[4 * line : 4 * line + 4]
            values = (stop - start, ce_clean, ce_sae, ce_zero, kl_sae, kl_zero)
            total[line] += torch.tensor(values, dtype=torch.float64)
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
