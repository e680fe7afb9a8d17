"""Healing: the whole converted model trained to predict what the dense model predicts.

Every core, matrix left dense and norm gain of the blocks moves; embedding and head stay.
The loss is KL(dense || converted) per token (Hinton et al. 2015, temperature 1), which needs no
labels and so cannot learn the calibration text by heart as fast as its next tokens could be.
Windows are held out: they choose the learning rate, in short runs from the start, one rate after
the other, and a healing that makes them worse is thrown away.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, PreTrainedModel

from qll import store
from qll.errors import NonFiniteError, TextError
from qll.train.distill import distillation_loss
from qll.train.optimise import Optimiser
from qll.train.precision import autocast, prepare_training

logger = logging.getLogger("qll.train")

HELD_OUT = 16  # one window in so many is not trained on
MOST_HELD_OUT = 8
CHECKPOINT_TOKENS = 65536
# Which rate is best depends on how far the model is from the dense one. They rise: a short run that
# does worse than the one before it is the last.
RATES = (3e-6, 1e-5, 3e-5, 8e-5)
TRIAL_SHARE = 1 / 16  # of the steps, for each rate
# The noise of the gradients has more steps to average out in a long run. At keep 0.8 the best rate,
# by parabolas through what 1e-5 and 3e-5 gained, was 0.7e-5 for 24 steps and 1.5e-5 for 96.
LONG_RUN = 2.0  # rate of the long run, over the best of short ones
CHECKPOINT_NAME = "checkpoint.safetensors"
FROZEN = ("model.embed_tokens.", "lm_head.")


@dataclass(frozen=True)
class HealSettings:
    """How long and how fast."""

    tokens: int
    """Tokens to train on, over as many passes as that takes."""
    rates: tuple[float, ...] = RATES
    """Highest learning rates to try, rising; one alone is taken as it is."""
    name: str = "healing"
    """What it is called in progress and warnings."""
    batch_tokens: int = 1024
    """Tokens per step, at least one window."""
    precision: torch.dtype = torch.float32
    """Dtype of matrix products."""
    seed: int = 0
    """Order of the windows."""


def healing_bytes(
    config: LlamaConfig, params: int, context: int = 512, batch_tokens: int = 1024
) -> int:
    """Memory that `heal` needs at most, of a model of `params` on windows of `context` tokens.

    Two models; gradients, two moments and a copy of what moves; three arrays of logits; and what
    the backward pass reads again of every block, attention in plain products.

    >>> from qll.load import open_source
    >>> healing_bytes(open_source(None).config, 134_515_008) // 10**8
    59
    """
    tokens = max(batch_tokens, context)
    kept = 12 * config.hidden_size + 5 * config.intermediate_size
    # attention weights in bfloat16
    kept += config.num_attention_heads * context // 2
    kept *= config.num_hidden_layers
    return 4 * (6 * params + tokens * (3 * config.vocab_size + kept))


def heal(
    dense: PreTrainedModel,
    converted: PreTrainedModel,
    windows: Int[Tensor, "windows context"],
    work: Path,
    settings: HealSettings,
) -> dict[str, Any]:
    """Train `converted` in place towards `dense`; returns what it did.

    The result has `tokens`, `steps`, `rate`, `trials` ([rate, held-out KL after a short run, None
    if that was not finite] of several rates), `kl_before` and `kl_after` (held-out windows, nats
    per token) and `kept`: False when training did not help and the parameters were put back. When
    no short run helps there is no long one. A checkpoint in `work` every 65,536 tokens makes an
    interrupted call continue with the same numbers. Raises NonFiniteError when the loss of the long
    run is not a number.
    """
    school = _School(dense, converted, windows, settings)
    start = {name: p.detach().clone() for name, p in school.trained.items()}
    path = work / CHECKPOINT_NAME
    store.make_folder(work)
    facts = _known_facts(path) if path.is_file() else _first_facts(school, start)
    before, trials = facts["kl_before"], facts["trials"]
    best = best_rate(before, trials)
    rate = settings.rates[0] if best is None else LONG_RUN * best
    facts |= {"rate": rate, "precision": str(settings.precision)}
    if trials and best is None:
        logger.warning(
            "%s was left out: short runs at %s made held-out windows worse than KL %.4f",
            *(settings.name, ", ".join(f"{rate:g}" for rate, _ in trials), before),
        )
        return {**facts, "tokens": 0, "steps": 0, "kl_after": before, "kept": False}
    _train(school, path, facts)
    after = school.held_out_kl()
    if kept := after < before:
        logger.info("%s: held-out KL %.4f -> %.4f nats per token", settings.name, before, after)
    else:
        school.assign(start)
        logger.warning(
            "%s made held-out windows worse (KL %.4f -> %.4f) and was undone",
            *(settings.name, before, after),
        )
    tokens = school.steps * school.step_tokens
    return {**facts, "tokens": tokens, "steps": school.steps, "kl_after": after, "kept": kept}


def best_rate(before: float, trials: Sequence[Sequence[float | None]]) -> float | None:
    """The learning rate that would have been best for the short runs `trials`; None if none helped.

    trials: [rate, held-out KL or None] at rising rates. What a run at rate r gains is near a r -
    b r^2, descent less the noise of the gradients: the top of the parabola through the best run and
    the one above it.

    >>> best_rate(1.0, [[1.0, 0.9], [2.0, 0.9], [4.0, 1.1]])
    1.5
    >>> best_rate(1.0, [[1.0, 1.1]]) is None
    True
    """
    gains = [(rate, -math.inf if kl is None else before - kl) for rate, kl in trials]
    place = max(range(len(gains)), key=lambda i: gains[i][1], default=None)
    if place is None or gains[place][1] <= 0:
        return None
    low, gain = gains[place]
    if place + 1 == len(gains):
        return low
    high, above = gains[place + 1]
    if above == -math.inf:
        return low / 2
    return (gain * high**2 - above * low**2) / (2 * (gain * high - above * low))


def _first_facts(school: _School, start: dict[str, Tensor]) -> dict[str, Any]:
    """Held-out KL before training, and after a short run at each of several rates."""
    before, trials, lowest = school.held_out_kl(), [], math.inf
    rates = school.settings.rates if len(school.settings.rates) > 1 else ()
    for rate in rates:
        found = school.trial(rate)
        school.assign(start)
        trials.append([rate, found])
        if found is None or found > lowest:
            break
        lowest = found
    return {"kl_before": before, "trials": trials}


def _known_facts(path: Path) -> dict[str, Any]:
    """What `_first_facts` found before the checkpoint at `path` was saved."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["facts"])


def _train(school: _School, path: Path, facts: dict[str, Any]) -> None:
    """All steps at the rate in `facts`, or those that the checkpoint at `path` has not made."""
    school.prepare(facts["rate"], school.steps)
    done = school.restore(path) if path.is_file() else 0
    bar = tqdm(
        total=school.settings.tokens,
        initial=done * school.step_tokens,
        desc=school.settings.name,
        unit="token",
        unit_scale=True,
        file=sys.stderr,
        disable=None,
    )
    since = 0
    for number, batch in enumerate(school.batches()):
        if number < done:
            continue
        loss = school.step(batch)
        bar.update(school.step_tokens)
        bar.set_postfix_str(f"KL {loss:.4f}", refresh=False)
        since += school.step_tokens
        if since >= CHECKPOINT_TOKENS:
            school.save(path, number + 1, facts)
            since = 0
    bar.close()


class _School:
    """Teacher, student, windows and optimiser of one healing."""

    def __init__(
        self,
        dense: PreTrainedModel,
        converted: PreTrainedModel,
        windows: Tensor,
        settings: HealSettings,
    ) -> None:
        self.teacher, self.student, self.settings = dense, converted, settings
        self.device = next(converted.parameters()).device
        for model in (dense, converted):
            prepare_training(model, settings.precision, self.device)
        held = min(MOST_HELD_OUT, max(1, len(windows) // HELD_OUT))
        if len(windows) <= held:
            raise TextError(
                "too little text to heal on",
                expected="at least 2 windows",
                found=len(windows),
                hint="give a longer --calib_text or a shorter --train_context",
            )
        # spread, so that every one of several mixed texts is represented
        places = torch.linspace(0, len(windows) - 1, held).long()
        away = torch.zeros(len(windows), dtype=torch.bool).index_fill(0, places, True)
        self.held_out, self.windows = windows[away], windows[~away]
        self.batch = max(1, settings.batch_tokens // windows.shape[1])
        self.step_tokens = self.batch * windows.shape[1]
        self.steps = max(1, settings.tokens // self.step_tokens)
        frozen_gains = getattr(converted.config, "qll_folded_norms", False)
        self.trained = {}
        for name, parameter in converted.named_parameters():
            frozen = name.startswith(FROZEN) or (frozen_gains and "norm" in name)
            parameter.requires_grad_(not frozen)
            if not frozen:
                self.trained[name] = parameter
        kind = settings.precision
        self.heads = [_output_matrix(model).detach().to(kind) for model in (converted, dense)]
        self.known: dict[int, Tensor] = {}

    def prepare(self, rate: float, steps: int) -> None:
        """Begin a run of `steps` at `rate` from the parameters as they are."""
        for parameter in self.trained.values():
            parameter.grad = None  # of a run that broke off
        self.optimiser = Optimiser(list(self.trained.values()), rate, steps)

    def trial(self, rate: float) -> float | None:
        """Held-out KL after a short run at `rate`; None where the loss stops being a number."""
        steps = max(1, round(TRIAL_SHARE * self.steps))
        self.prepare(rate, steps)
        batches = islice(self.batches(), steps)
        words = {"desc": f"{self.settings.name} at {rate:g}", "unit": "step"}
        try:
            for batch in tqdm(batches, total=steps, file=sys.stderr, disable=None, **words):
                self.step(batch)
        except NonFiniteError:
            return None
        found = self.held_out_kl()
        return found if math.isfinite(found) else None

    def batches(self) -> Iterator[Tensor]:
        """Numbers of the windows of each step: every window once per pass, in a seeded order."""
        waiting, epoch = torch.empty(0, dtype=torch.long), 0
        for _ in range(self.steps):
            while len(waiting) < self.batch:
                order = torch.Generator().manual_seed(self.settings.seed * 1000 + epoch)
                waiting = torch.cat((waiting, torch.randperm(len(self.windows), generator=order)))
                epoch += 1
            yield waiting[: self.batch]
            waiting = waiting[self.batch :]

    def step(self, numbers: Tensor) -> float:
        """One step on the windows `numbers`; returns its loss in nats per token."""
        ids = self.windows[numbers].to(self.device)
        wanted = self._taught(numbers)
        with autocast(self.settings.precision, self.device):
            states = final_states(self.student, ids)
        loss = distillation_loss(states, wanted, *self.heads)
        loss.backward()
        value = loss.item()
        self.optimiser.step(value)
        return value

    @torch.no_grad()
    def held_out_kl(self) -> float:
        """Mean KL on the held-out windows, nats per token."""
        total = 0.0
        with autocast(self.settings.precision, self.device):
            for window in self.held_out.to(self.device):
                pair = [final_states(m, window[None]) for m in (self.student, self.teacher)]
                total += distillation_loss(*pair, *self.heads).item()
        return total / len(self.held_out)

    @torch.no_grad()
    def assign(self, parameters: dict[str, Tensor]) -> None:
        """Copy `parameters` into the student."""
        for name, value in parameters.items():
            self.trained[name].copy_(value)

    def save(self, path: Path, steps_done: int, facts: dict[str, Any]) -> None:
        """Write parameters, optimiser and what is known so far atomically."""
        tensors = {f"parameter:{name}": p.detach() for name, p in self.trained.items()}
        tensors |= {f"adam:{name}": value for name, value in self.optimiser.tensors().items()}
        known = {key: facts[key] for key in ("kl_before", "trials")}
        store.write_tensors(path, tensors, {"steps": str(steps_done), "facts": json.dumps(known)})

    def restore(self, path: Path) -> int:
        """Read what `save` wrote; returns the steps done."""
        with safe_open(path, framework="pt", device=str(self.device)) as file:
            done = int(file.metadata()["steps"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        split = {"parameter": {}, "adam": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(":")
            split[kind][rest] = tensor
        self.assign(split["parameter"])
        self.optimiser.restore(split["adam"], done)
        return done

    @torch.no_grad()
    def _taught(self, numbers: Tensor) -> Float[Tensor, "batch context d_model"]:
        """The teacher's final states; a later pass finds them where the first one left them."""
        missing = [number for number in numbers.tolist() if number not in self.known]
        if missing:
            with autocast(self.settings.precision, self.device):
                states = final_states(self.teacher, self.windows[missing].to(self.device))
            for number, state in zip(missing, states, strict=True):
                self.known[number] = state.to("cpu", self.settings.precision)
        return torch.stack([self.known[number] for number in numbers.tolist()]).to(self.device)


def final_states(
    model: PreTrainedModel, ids: Int[Tensor, "batch context"]
) -> Float[Tensor, "batch context d_model"]:
    """What the output matrix of `model` reads: the normed last hidden states."""
    return model.model(input_ids=ids, use_cache=False).last_hidden_state


def _output_matrix(model: PreTrainedModel) -> Tensor:
    return model.lm_head.weight
