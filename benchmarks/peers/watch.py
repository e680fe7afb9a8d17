"""The dense model on a few calibration tokens, with some of its weights replaced for a moment: what
the published searches for ranks measure.

The first calibration windows are taken, of two texts since these take turns in them. Blocks before
the first that is replaced are not run again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from benchmarks.peers.case import Case
from qll.model import load_dense, run_block

WINDOWS = 2
# rows of logits at a time
ROWS = 256


class Watch:
    """The dense model with its hidden states on the first `tokens` of WINDOWS windows."""

    @torch.no_grad()
    def __init__(self, case: Case, tokens: int) -> None:
        self.ids = case.windows[:WINDOWS, :tokens].long()
        self.model: LlamaForCausalLM = load_dense(case.source)
        self.hidden = [self.model.model.embed_tokens(self.ids)]
        for block in self.model.model.layers:
            self.hidden.append(run_block(block, self.hidden[-1]))

    @torch.no_grad()
    def after(
        self, replaced: dict[str, Float[Tensor, "out into"]]
    ) -> Float[Tensor, "windows tokens d"]:
        """The last hidden state with these weights replaced."""
        linears = {name: self.model.get_submodule(name) for name in replaced}
        before = {name: linear.weight for name, linear in linears.items()}
        for name, matrix in replaced.items():
            linears[name].weight = nn.Parameter(matrix, requires_grad=False)
        blocks = self.model.model.layers
        first = min((int(name.split(".")[2]) for name in replaced), default=len(blocks))
        state = self.hidden[first]
        for block in blocks[first:]:
            state = run_block(block, state)
        for name, weight in before.items():
            linears[name].weight = weight
        return state

    @torch.no_grad()
    def log_probs(
        self, state: Float[Tensor, "windows tokens d"], temperature: float = 1.0
    ) -> Iterator[Float[Tensor, "rows vocab"]]:
        """Of the next tokens after every token of `state`, window by window, ROWS at a time."""
        for rows in state.flatten(0, -2).split(ROWS):
            logits = self.model.lm_head(self.model.model.norm(rows))
            yield (logits / temperature).log_softmax(-1)

    def cross_entropy(self, replaced: dict[str, Float[Tensor, "out into"]]) -> float:
        """Mean nats per token of the text with these weights replaced."""
        state, targets = self.after(replaced)[:, :-1], self.ids[:, 1:].flatten()
        total = sum(
            float(-found.gather(1, wanted[:, None]).sum())
            for found, wanted in zip(self.log_probs(state), targets.split(ROWS), strict=True)
        )
        return total / len(targets)
