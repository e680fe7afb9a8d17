"""Sixteen tokens through the model: a number that a wrong load cannot reproduce.

sha256 proves that the bytes are the ones that were written; the fingerprint proves that the code
that reads them still computes the same model (another library version, another device, a changed
rope). It is stored in the manifest and compared with a tolerance for the dtypes involved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from qll.errors import IntegrityError, NonFiniteError

TOKENS = 16
COLUMNS = 16
# Largest drift at a position, relative to the spread of the logits; unrelated logits drift by 1.4.
# float32 differs by the order of summation (1e-4 on SmolLM2, whose first blocks amplify it), half
# precision accumulates its epsilon over the depth: 0.04 was seen between bfloat16 and float32 on
# SmolLM2, 0.08 on a damaged one.
TOLERANCE = {torch.float64: 5e-3, torch.float32: 5e-3, torch.float16: 0.1, torch.bfloat16: 0.5}


def logits_fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """Logits of 16 fixed tokens at 16 fixed vocabulary entries, as JSON: {"dtype", "logits"}.

    `logits` has 16 rows (positions) of 16 numbers. The tokens are spread over the vocabulary by a
    multiplicative (Knuth) hash, and depend on nothing else. Raises NonFiniteError for NaN logits.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8,
    ...                      num_hidden_layers=1, num_attention_heads=2)
    >>> found = logits_fingerprint(LlamaForCausalLM(config))
    >>> found["dtype"], len(found["logits"]), len(found["logits"][0])
    ('float32', 16, 16)
    """
    ids, columns = fixed_places(model.config.vocab_size)
    tokens = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[0]
    dtype, where = str(model.dtype).removeprefix("torch."), model.name_or_path
    _require_finite(logits, where or type(model).__name__)
    return recorded(logits[:, columns], dtype, where or type(model).__name__)


def fixed_places(vocab: int) -> tuple[list[int], list[int]]:
    """The tokens that are run, and the entries of the vocabulary whose logits are kept.

    >>> [len(places) for places in fixed_places(100)]
    [16, 16]
    """
    ids = [position * 2654435761 % vocab for position in range(1, TOKENS + 1)]
    columns = [position * 2654435761 % vocab for position in range(TOKENS, TOKENS + COLUMNS)]
    return ids, columns


def recorded(logits: Float[Tensor, "tokens columns"], dtype: str, where: object) -> dict[str, Any]:
    """The fingerprint as JSON, from the logits at `fixed_places`."""
    _require_finite(logits, where)
    rows = logits.double().tolist()
    return {"dtype": dtype, "logits": [[float(f"{value:.6g}") for value in row] for row in rows]}


def check_fingerprint(model: PreTrainedModel, stored: Mapping[str, Any], where: object) -> float:
    """Largest drift of `model` from the stored fingerprint, relative to their spread.

    Raises IntegrityError when it is not within TOLERANCE of the coarser of the two dtypes.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8,
    ...                      num_hidden_layers=1, num_attention_heads=2)
    >>> model = LlamaForCausalLM(config)
    >>> check_fingerprint(model, logits_fingerprint(model), where="example") < 1e-3
    True
    """
    return compare(logits_fingerprint(model), stored, where)


def compare(found: Mapping[str, Any], stored: Mapping[str, Any], where: object) -> float:
    """`check_fingerprint` of a fingerprint that was computed before."""
    then = torch.tensor(stored["logits"], dtype=torch.float64)
    now = torch.tensor(found["logits"], dtype=torch.float64)
    if then.shape != now.shape:
        raise IntegrityError("fingerprint of another form", where=where, found=tuple(then.shape))
    spread = (then - then.mean(1, keepdim=True)).square().mean().sqrt()
    drift = (now - then).square().mean(1).sqrt().max() / spread
    tolerance = max(TOLERANCE[getattr(torch, side["dtype"])] for side in (found, stored))
    # written so that NaN fails too
    if not drift <= tolerance:
        raise IntegrityError(
            "the model computes other logits than when it was written",
            where=where,
            expected=f"a relative drift of at most {tolerance:g}",
            found=f"{drift:.3g}",
            hint="check the versions of torch and transformers against run.json, or convert again",
        )
    return float(drift)


def _require_finite(logits: Tensor, where: object) -> None:
    if not torch.isfinite(logits).all():
        raise NonFiniteError(
            "the model computes logits that are not finite",
            where=where,
            hint="use a wider dtype than float16, or convert again",
        )
