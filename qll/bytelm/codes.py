"""How a concept layer uses its codebook: how many codes, how evenly, and for what.

The perplexity of the codes is exp of the entropy of their use (van den Oord et al. 2017): 1 when
one code does everything, the size of the book when all are used alike. Purity is the share of uses
in which a code stands for the byte it stands for most often.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qll.bytelm.coherence import passes_of_bytes
from qll.bytelm.config import VOCAB
from qll.bytelm.model import ByteModel
from qll.errors import UsageError


@dataclass(frozen=True)
class CodeUse:
    """Use of the codes over some bytes."""

    codes: int
    """Codes in the book."""
    used: int
    """Codes that were used at all."""
    perplexity: float
    purity: float
    chance: float
    """The purity of codes that know nothing: the share of the most frequent byte."""


@torch.inference_mode()
def code_use(model: ByteModel, ids: Int[Tensor, "batch seq"]) -> CodeUse:
    """How the codes are used when `model` reads `ids`; raises UsageError without a concept layer.

    >>> from qll.bytelm.config import ConceptConfig, ModelConfig
    >>> concept = ConceptConfig(kind="vq", codes=9)
    >>> model = ByteModel(ModelConfig(d_model=32, n_layers=1, context=8, concept=concept)).eval()
    >>> code_use(model, torch.full((1, 8), 97)).purity  # one byte only
    1.0
    """
    if model.concept is None:
        raise UsageError("the model has no concept layer", where="code_use")
    notes: dict[str, list[Tensor]] = {}
    model.step(ids, model.initial_state(len(ids), ids.device), notes)
    chosen = [
        codes
        for codes, of_bytes in zip(notes["codes"], passes_of_bytes(model, ids), strict=True)
        if of_bytes
    ]
    together = use_by_byte(torch.cat(chosen, dim=1), ids, model.config.concept.codes)
    uses, total = together.sum(1), together.sum()
    shares = uses[uses > 0] / total
    return CodeUse(
        codes=len(uses),
        used=len(shares),
        perplexity=float((-shares * shares.log()).sum().exp()),
        purity=float(together.amax(1).sum() / total),
        chance=float(together.sum(0).max() / total),
    )


def use_by_byte(
    codes: Int[Tensor, "batch seq"] | Float[Tensor, "batch seq codes"],
    ids: Int[Tensor, "batch seq"],
    size: int,
) -> Float[Tensor, "codes 256"]:
    """How often each code is used at each byte: one code per place, or all that are not 0.

    >>> found = use_by_byte(torch.tensor([[1, 1]]), torch.tensor([[97, 98]]), 2)
    >>> found.sum(1).tolist(), found[1, 97].item()
    ([0.0, 2.0], 1.0)
    """
    if not codes.is_floating_point():
        codes = torch.nn.functional.one_hot(codes, size)
    places, used = codes.flatten(0, 1).nonzero(as_tuple=True)
    pairs = used * VOCAB + ids.flatten()[places]
    return torch.bincount(pairs, minlength=size * VOCAB).view(size, VOCAB).double()
