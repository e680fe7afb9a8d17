"""A cheap model proposes tokens, the dear one checks them all at once: the same text, faster.

Leviathan et al., "Fast inference from transformers via speculative decoding" (2023). Of the
proposals d_1 .. d_k, drawn from q, one after another is accepted with probability
min(1, p(d) / q(d)); at the first that is not, a token is drawn from max(p - q, 0) instead, and
after k accepted ones a token comes from p for free. Every token is then distributed as p alone
would have it; greedy, the text is the checking model's own. A batch grows in step: it keeps as many
tokens as its row with the fewest accepted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qll.errors import UsageError
from qll.runtime.cache import Cache
from qll.runtime.llama import Runtime
from qll.runtime.sample import Sampling

LENGTH = 4
LONGEST = 8


@dataclass
class Acceptance:
    """What became of the proposals so far."""

    proposed: int = 0
    accepted: int = 0
    rounds: int = 0
    tokens: int = 0
    """New tokens per text."""

    @property
    def rate(self) -> float:
        """Share of proposals accepted."""
        return self.accepted / max(self.proposed, 1)


def speculate(
    model: Runtime,
    draft: Runtime,
    ids: Int[Tensor, "batch seq"],
    new_tokens: int,
    *,
    length: int = LENGTH,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    counts: Acceptance | None = None,
) -> Iterator[Int[Tensor, "batch _"]]:
    """`new_tokens` ids that `model` continues `ids` with, in pieces as they are settled.

    length: proposals per round. counts: is told what was accepted. Raises UsageError for models of
    different vocabularies.
    """
    counts = Acceptance() if counts is None else counts
    total = ids.shape[1] + new_tokens
    caches = [runtime.cache(ids.shape[0], total) for runtime in (model, draft)]
    draw = sampling.generator(model.device)
    with torch.inference_mode():
        logits = model(ids, caches[0])[:, -1]
        proposed = draft(ids, caches[1])[:, -1]
        if logits.shape[-1] != proposed.shape[-1]:
            raise UsageError(
                "draft and model have different vocabularies",
                where="--draft",
                expected=logits.shape[-1],
                found=proposed.shape[-1],
                hint="the draft must be converted from the same model",
            )
        last = sampling.choose(logits, draw)[:, None]
    yield last
    made = 1
    while made < new_tokens:
        most = new_tokens - made
        with torch.inference_mode():
            proposals = _propose(draft, caches[1], (ids, last), min(length, most), sampling, draw)
            settled = _check(model, caches[0], last, proposals, sampling, draw, counts)[:, :most]
        for cache in caches:  # all tokens but the last
            cache.filled = min(cache.filled, ids.shape[1] + settled.shape[1])
        ids = torch.cat([ids, last, settled[:, :-1]], 1)
        last = settled[:, -1:]
        made += settled.shape[1]
        counts.tokens = made
        yield settled


def gain(rate: float, length: int, draft_cost: float, check_cost: float) -> float:
    """Expected speed relative to the model alone (Leviathan et al. 2023, theorem 3.8).

    rate: probability that a proposal is accepted. draft_cost: seconds of one step of the draft,
    check_cost: of checking length + 1 tokens, both in steps of the model.

    >>> round(gain(0.8, 4, 0.25, 1.0), 2), round(gain(0.5, 4, 0.8, 1.2), 2)
    (1.68, 0.44)
    """
    tokens = length + 1 if rate >= 1 else (1 - rate ** (length + 1)) / (1 - rate)
    return tokens / (length * draft_cost + check_cost)


def best_length(rate: float, draft_cost: float, check_costs: list[float]) -> tuple[int, float]:
    """(proposals per round, speed): the best there is; (0, 1.0) where speculation does not pay.

    check_costs: of checking 2, 3, .. tokens, in steps of the model.

    >>> best_length(0.8, 0.3, [1.05, 1.1, 1.15, 1.2])[0], best_length(0.4, 0.85, [1.0, 1.0])
    (3, (0, 1.0))
    """
    found = [(gain(rate, k, draft_cost, cost), k) for k, cost in enumerate(check_costs, 1)]
    speed, length = max(found, default=(0.0, 0))
    return (length, speed) if speed > 1 else (0, 1.0)


def _propose(
    draft: Runtime,
    cache: Cache,
    known: tuple[Tensor, Tensor],
    count: int,
    sampling: Sampling,
    draw: torch.Generator | None,
) -> tuple[Int[Tensor, "batch count"], Float[Tensor, "batch count vocab"]]:
    """The draft's next tokens, and what they were drawn from."""
    # the last proposal of a round that was accepted whole is new to the draft, too
    step = torch.cat(known, 1)[:, cache.filled :]
    tokens, guesses = [], []
    for _ in range(count):
        logits = draft(step, cache)[:, -1]
        guesses.append(sampling.distribution(logits))
        step = sampling.choose(logits, draw)[:, None]
        tokens.append(step)
    return torch.cat(tokens, 1), torch.stack(guesses, 1)


def _check(
    model: Runtime,
    cache: Cache,
    last: Tensor,
    proposals: tuple[Tensor, Tensor],
    sampling: Sampling,
    draw: torch.Generator | None,
    counts: Acceptance,
) -> Int[Tensor, "batch _"]:
    """The tokens that this round settles, by one pass of the model."""
    drafted, guesses = proposals
    logits = model(torch.cat([last, drafted], 1), cache, keep=drafted.shape[1] + 1)
    settled, accepted = settle(drafted, guesses, sampling.distribution(logits), draw)
    counts.rounds += 1
    counts.proposed += drafted.numel()
    counts.accepted += int(accepted.sum())
    return settled


def settle(
    drafted: Int[Tensor, "batch k"],
    guesses: Float[Tensor, "batch k vocab"],
    truth: Float[Tensor, "batch checked vocab"],
    draw: torch.Generator | None,
) -> tuple[Int[Tensor, "batch _"], Bool[Tensor, "batch k"]]:
    """The tokens that a round settles in every row, and which proposals were accepted.

    guesses, truth: what the draft and the model draw from, at each proposal (truth one further).

    >>> drafted = torch.tensor([[1, 0]])
    >>> sure = torch.eye(2)[drafted]
    >>> truth = torch.eye(2)[torch.tensor([[1, 1, 0]])]
    >>> settled, accepted = settle(drafted, sure, truth, None)
    >>> settled.tolist(), accepted.tolist()
    ([[1, 1]], [[True, False]])
    """
    count = drafted.shape[1]
    places = drafted[..., None]
    p, q = (of[:, :count].gather(-1, places)[..., 0] for of in (truth, guesses))
    if draw is None:
        luck = torch.full_like(p, 0.5)
    else:
        luck = torch.rand(p.shape, generator=draw, device=p.device)
    # a proposal that the draft could not have made is never accepted
    accepted = ((luck * q < p) & (q > 0)).cumprod(1).bool()
    kept = int(accepted.sum(1).min())
    row = truth[:, kept]
    if kept < count:
        rest = (row - guesses[:, kept]).clamp(min=0)
        empty = rest.sum(-1, keepdim=True) <= 0
        fresh = _drawn(torch.where(empty, row, rest), draw)
        nxt = torch.where(accepted[:, kept], drafted[:, kept], fresh)
    else:
        nxt = _drawn(row, draw)
    return torch.cat([drafted[:, :kept], nxt[:, None]], 1), accepted


def _drawn(weights: Tensor, draw: torch.Generator | None) -> Tensor:
    if draw is None:
        return weights.argmax(-1)
    return torch.multinomial(weights, 1, generator=draw)[:, 0]
