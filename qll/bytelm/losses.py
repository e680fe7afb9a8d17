"""The objective: cross-entropy, and optional terms whose weights are set, scheduled or learned.

    total = cross-entropy + sum_i weight_i * schedule * term_i
    with weighting "uncertainty" each term becomes exp(-s_i) term_i + s_i, s_i learned
    (Kendall, Gal and Cipolla 2018, eq. 10 up to factors of 2)

Every term is a mean, so a weight means the same at every batch size, length and width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from qll.bytelm.config import VOCAB, LossConfig
from qll.bytelm.context import Notes
from qll.bytelm.energy import entanglement_energy, neighbour_energy, pair_energy, phasors
from qll.bytelm.model import ByteModel
from qll.bytelm.state import State

RAMP = 0.5  # share of what is left, when a loss is first on, over which its weight grows
REPEATED = 4  # bytes that must be the same before, for their successor to be a repetition
FROM_NOTES = ("codebook", "width", "rank")  # terms that layers compute themselves


class Objective(nn.Module):
    """The loss of a model on some bytes; its own parameters are the learned weights, if any.

    beginnings: the share of training after which a loss is first on, by name; 0 unless given.

    >>> from qll.bytelm.config import ModelConfig
    >>> model = ByteModel(ModelConfig(d_model=32, n_layers=1, context=8))
    >>> ids = torch.tensor([[1, 2, 3, 4]])
    >>> loss, terms, state = Objective(LossConfig(coherence=0.1))(model, ids, ids)
    >>> sorted(terms), state.position, loss.requires_grad
    (['coherence', 'cross_entropy'], 4, True)
    """

    def __init__(self, config: LossConfig, beginnings: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.config, self.beginnings = config, beginnings or {}
        learned = config.weighting == "uncertainty"
        names = [name for name in TERMS if getattr(config, name)] if learned else []
        self.log_variance = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(())) for name in names}
        )

    def forward(
        self,
        model: ByteModel,
        ids: Int[Tensor, "batch seq"],
        targets: Int[Tensor, "batch seq"],
        share: float = 1.0,
        state: State | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor], State]:
        """(total, every term by name (detached, unweighted), state after `ids`).

        share: of the training that is done, in [0, 1]. state: what `ids` go on from.
        """
        wanted = [name for name in TERMS if getattr(self.config, name)]
        notes: Notes | None = {} if wanted else None
        state = state or model.initial_state(len(ids), ids.device)
        logits, state = model.step(ids, state, notes)
        total = cross_entropy(logits, targets)
        terms = {"cross_entropy": total.detach()}
        for name in wanted:
            term = self._term(name, logits, ids, targets, notes)
            if term is not None:
                total = total + self._weighted(name, term, share)
                terms[name] = term.detach()
        return total, terms, state

    def _term(
        self, name: str, logits: Tensor, ids: Tensor, targets: Tensor, notes: Notes
    ) -> Tensor | None:
        """One term, or None when the model has no such part."""
        if name in FROM_NOTES:
            return torch.stack(notes[name]).mean() if name in notes else None
        if name == "unlikelihood":
            return unlikelihood(logits, ids % VOCAB, targets)
        stream = torch.cat(notes["stream"], dim=1)
        if name == "entanglement":
            return entanglement_energy(stream)
        return {"coherence": neighbour_energy, "interference": pair_energy}[name](phasors(stream))

    def _weighted(self, name: str, term: Tensor, share: float) -> Tensor:
        weight = getattr(self.config, name)
        if self.config.weighting == "uncertainty":
            learned = self.log_variance[name]
            return weight * ((-learned).exp() * term + learned)
        if self.config.weighting == "ramp":
            begins = self.beginnings.get(name, 0.0)
            weight = weight * min(1.0, max(0.0, share - begins) / (RAMP * (1 - begins)))
        return weight * term


TERMS = ("coherence", "interference", "entanglement", "unlikelihood", *FROM_NOTES)


def cross_entropy(
    logits: Float[Tensor, "batch seq 256"], targets: Int[Tensor, "batch seq"]
) -> Float[Tensor, ""]:
    """Mean nats per byte, float32 or better.

    >>> round(float(cross_entropy(torch.zeros(1, 1, 256), torch.tensor([[7]]))), 4)
    5.5452
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def unlikelihood(
    logits: Float[Tensor, "batch seq 256"],
    ids: Int[Tensor, "batch seq"],
    targets: Int[Tensor, "batch seq"],
) -> Float[Tensor, ""]:
    """Mean of -log(1 - p(c)) over bytes c that would wrongly repeat (Welleck et al. 2020, eq. 4).

    c is a candidate at t when the last REPEATED bytes occurred before in the window, c followed
    them there, and c is not the target.

    >>> ids = torch.tensor([[1, 2, 3, 4, 9, 1, 2, 3, 4]])
    >>> logits = torch.zeros(1, 9, 256)
    >>> round(float(unlikelihood(logits, ids, ids + 1) * 255), 2)  # -log(1 - 1/256) = 1/255.5
    1.0
    """
    wrong = _repetitions(ids) & ~functional.one_hot(targets, VOCAB).bool()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    probability = logits.softmax(dim=-1)
    penalty = -torch.log1p(-probability.clamp(max=1 - 1e-6))
    return (penalty * wrong).sum() / wrong.sum().clamp(min=1)


def _repetitions(ids: Int[Tensor, "batch seq"]) -> Tensor:
    """bool[batch, seq, 256]: bytes that followed an earlier occurrence of the last few bytes."""
    batch, seq = ids.shape
    found = torch.zeros(batch, seq, VOCAB, dtype=torch.bool, device=ids.device)
    if seq <= REPEATED:
        return found
    grams = ids.unfold(1, REPEATED, 1)
    same = (grams[:, :, None] == grams[:, None, :]).all(dim=-1).tril(diagonal=-1)
    after = functional.one_hot(ids[:, REPEATED:], VOCAB).float()
    found[:, REPEATED - 1 :] = same[:, :, :-1].float() @ after > 0
    return found
