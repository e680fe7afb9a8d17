"""From logits to the next byte: each sampler a function from logits to logits.

What a sampler leaves out gets minus infinity; at least one byte always stays. `shape_logits`
applies them in the order that their definitions assume: penalties on the model's own logits, then
the temperature, then the cuts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from qll.bytelm.sampling import SamplingOptions
from qll.errors import UsageError

COOLING_BASE = 0.8
DRY_BASE = 1.75
DRY_WINDOW = 1024  # bytes back in which repetitions are looked for
DRY_LONGEST = 32  # bytes beyond the free ones after which the penalty no longer grows


def temperature(
    logits: Float[Tensor, "*batch vocab"], value: float
) -> Float[Tensor, "*batch vocab"]:
    """Logits over `value`, moved so that the largest is 0; temperature 0 keeps that one alone.

    Raises UsageError unless `value` is finite and at least 0.

    >>> temperature(torch.tensor([1.0, 3.0]), 0.5), temperature(torch.tensor([1.0, 3.0]), 0.0)
    (tensor([-4.,  0.]), tensor([-inf, 0.]))
    """
    if not 0 <= value < math.inf:
        raise UsageError(
            "not a temperature",
            where="temperature",
            expected="a finite number of at least 0",
            found=value,
        )
    moved = logits - logits.max(dim=-1, keepdim=True).values
    # below, a division would give 0 / 0
    if value < torch.finfo(logits.dtype).tiny:
        return _kept(moved, _one_hot(logits))
    return moved / value


def entropy_temperature(
    logits: Float[Tensor, "*batch vocab"], value: float, cooling: float
) -> Float[Tensor, "*batch 1"]:
    """A temperature of at most `value` that falls to 0 as the model becomes sure.

    value * 0.8^(cooling / H), H the entropy of the distribution in nats (Zhang, Bao and Huang 2024,
    "EDT", arXiv 2403.14541).

    >>> entropy_temperature(torch.tensor([[0.0, 0.0], [0.0, 99.0]]), 1.0, 0.5).flatten()
    tensor([0.8513, 0.0000])
    """
    log_probs = logits.log_softmax(dim=-1)
    entropy = -(log_probs.exp() * log_probs.clamp(min=-1e9)).sum(dim=-1, keepdim=True)
    return value * COOLING_BASE ** (cooling / entropy.clamp(min=1e-6))


def top_k(logits: Float[Tensor, "*batch vocab"], k: int) -> Float[Tensor, "*batch vocab"]:
    """The `k` largest logits; of equal ones the first. 0 keeps all.

    >>> top_k(torch.tensor([1.0, 3.0, 2.0]), 2)
    tensor([-inf, 3., 2.])
    """
    if not 0 < k < logits.shape[-1]:
        return logits
    places = logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return _kept(logits, torch.zeros_like(logits, dtype=torch.bool).scatter(-1, places, True))


def top_p(logits: Float[Tensor, "*batch vocab"], p: float) -> Float[Tensor, "*batch vocab"]:
    """The fewest most likely bytes whose probabilities sum to at least `p`.

    The byte that crosses `p` stays (Holtzman et al. 2020, arXiv 1904.09751). Raises UsageError
    unless 0 < p <= 1.

    >>> top_p(torch.tensor([0.5, 0.2, 0.3]).log(), 0.6).exp()
    tensor([0.5000, 0.0000, 0.3000])
    """
    if not 0 < p <= 1:
        raise UsageError("out of range", where="top_p", expected="above 0, at most 1", found=p)
    if p == 1:
        return logits
    ordered, places = logits.double().softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    return _kept(logits, torch.zeros_like(before, dtype=torch.bool).scatter(-1, places, before < p))


def min_p(logits: Float[Tensor, "*batch vocab"], share: float) -> Float[Tensor, "*batch vocab"]:
    """Bytes at least `share` as likely as the most likely one (Nguyen et al., arXiv 2407.01082).

    >>> min_p(torch.tensor([0.6, 0.1, 0.3]).log(), 0.4).exp()
    tensor([0.6000, 0.0000, 0.3000])
    """
    if share <= 0:
        return logits
    least = logits.max(dim=-1, keepdim=True).values + math.log(share)
    return _kept(logits, (logits >= least) | _one_hot(logits))


def repetition_penalty(
    logits: Float[Tensor, " vocab"], history: Sequence[int], penalty: float
) -> Float[Tensor, " vocab"]:
    """Lower the logits of bytes in `history`, each once: over `penalty` if positive, else times it.

    The rule of CTRL (Keskar et al. 2019, arXiv 1909.05858) with the sign that its text leaves out.

    >>> repetition_penalty(torch.tensor([2.0, -2.0, 2.0]), [0, 1, 1], 2.0)
    tensor([ 1., -4.,  2.])
    """
    seen = torch.tensor(sorted(set(history)), dtype=torch.long)
    changed = logits.clone()
    values = changed[seen]
    changed[seen] = torch.where(values > 0, values / penalty, values * penalty)
    return changed


def no_repeat_ngram(
    logits: Float[Tensor, " vocab"], history: Sequence[int], n: int
) -> Float[Tensor, " vocab"]:
    """Without the bytes that would write some `n` bytes of `history` again; all, if none is left.

    >>> no_repeat_ngram(torch.zeros(128), b"abcab", 3).argmin().item() == ord("c")
    True
    """
    past = bytes(history)
    if n < 1 or len(past) < n:
        return logits
    start = past[len(past) - n + 1 :]
    banned = sorted({past[place + n - 1] for place in _places(past[:-1], start)})
    kept = torch.ones_like(logits, dtype=torch.bool)
    kept[torch.tensor(banned, dtype=torch.long)] = False
    return _kept(logits, kept) if (kept & (logits > -math.inf)).any() else logits


def dry_penalty(
    logits: Float[Tensor, " vocab"], history: Sequence[int], strength: float, length: int
) -> Float[Tensor, " vocab"]:
    """Lower each byte that would lengthen a repetition, the more the longer the repetition is.

    By strength * 1.75^(m - length), where the last m >= `length` bytes stand earlier in the history
    before that byte, m as long as can be ("DRY", p-e-w 2024, text-generation-webui pull request
    5677). Only the last 1024 bytes of the history count.

    >>> lowered = dry_penalty(torch.zeros(128), b"one two, one two", 1.0, 4)
    >>> chr(lowered.argmin()), round(lowered.min().item(), 2)
    (',', -5.36)
    """
    past = bytes(history[-DRY_WINDOW:])
    changed = logits.clone()
    if strength <= 0 or len(past) <= length:
        return changed
    longest: dict[int, int] = {}
    for place in _places(past[:-1], past[-length:]):
        end = place + length
        match = length
        while match < min(end, length + DRY_LONGEST) and past[end - match - 1] == past[-match - 1]:
            match += 1
        longest[past[end]] = max(match, longest.get(past[end], 0))
    for byte, match in longest.items():
        changed[byte] -= strength * DRY_BASE ** (match - length)
    return changed


def shape_logits(
    logits: Float[Tensor, " vocab"], history: Sequence[int], options: SamplingOptions
) -> Float[Tensor, " vocab"]:
    """All samplers of `options` (resolved), in order: what is left is drawn from by `draw`.

    >>> options = SamplingOptions(temperature=0.0).resolved()
    >>> shape_logits(torch.tensor([0.0, 2.0, 1.0]), b"", options)
    tensor([-inf, 0., -inf])
    """
    if options.repetition_penalty > 1 and options.repetition_window:
        recent = history[-options.repetition_window :]
        logits = repetition_penalty(logits, recent, options.repetition_penalty)
    logits = dry_penalty(logits, history, options.dry, options.dry_length)
    logits = no_repeat_ngram(logits, history, options.no_repeat_ngram)
    value = options.temperature
    if options.entropy_cooling:
        value = float(entropy_temperature(logits, value, options.entropy_cooling))
    logits = temperature(logits, value)
    return min_p(top_p(top_k(logits, options.top_k), options.top_p), options.min_p)


def draw(logits: Float[Tensor, " vocab"], generator: torch.Generator) -> int:
    """A byte with the probabilities of `logits`.

    >>> draw(torch.tensor([-math.inf, 0.0]), torch.Generator().manual_seed(0))
    1
    """
    probabilities = logits.double().softmax(dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _kept(logits: Tensor, kept: Tensor) -> Tensor:
    return logits.masked_fill(~kept, -math.inf)


def _one_hot(logits: Tensor) -> Tensor:
    """True at the largest logit, the first of equal ones."""
    places = logits.argmax(dim=-1, keepdim=True)
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, places, True)


def _places(past: bytes, start: bytes) -> list[int]:
    """Where `start` stands in `past`, overlaps too; b"" stands everywhere."""
    found, place = [], past.find(start)
    while place >= 0:
        found.append(place)
        place = past.find(start, place + 1)
    return found
