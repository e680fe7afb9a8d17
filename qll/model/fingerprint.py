"""Sixteen tokens through the model: a number that a wrong load cannot reproduce.

sha256 proves that the bytes are the ones that were written; the fingerprint proves that the code
that reads them still computes the same model (another library version, another device, a changed
rope). It is stored in the manifest and compared with a tolerance for the dtypes involved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from qll.errors import IntegrityError, NonFiniteError

TOKENS = 16
COLUMNS = 8
# Largest drift per position, in units of the logits' root mean square. float32 differs by the
# order of summation (1e-6 to 1e-5); half precision accumulates its epsilon over the depth.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.2}


def logits_fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """Logits of 16 fixed tokens at 8 fixed vocabulary entries, as JSON: {"dtype", "logits"}.

    `logits` has 16 rows (positions) of 8 numbers. The tokens are spread over the vocabulary by a
    multiplicative (Knuth) hash, and depend on nothing else. Raises NonFiniteError for NaN logits.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8,
    ...                      num_hidden_layers=1, num_attention_heads=2)
    >>> found = logits_fingerprint(LlamaForCausalLM(config))
    >>> found["dtype"], len(found["logits"]), len(found["logits"][0])
    ('float32', 16, 8)
    """
    vocab = model.config.vocab_size
    ids = [position * 2654435761 % vocab for position in range(1, TOKENS + 1)]
    columns = [position * 2654435761 % vocab for position in range(TOKENS, TOKENS + COLUMNS)]
    tokens = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[0]
    if not torch.isfinite(logits).all():
        raise NonFiniteError(
            "the model computes logits that are not finite",
            where=model.name_or_path or type(model).__name__,
            hint="use a wider dtype than float16, or convert again",
        )
    rows = logits[:, columns].double().tolist()
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "logits": [[float(f"{value:.6g}") for value in row] for row in rows],
    }


def check_fingerprint(model: PreTrainedModel, stored: Mapping[str, Any], where: object) -> float:
    """Largest drift of `model` from the stored fingerprint, relative to the logits' RMS.

    Raises IntegrityError when it is not within TOLERANCE of the coarser of the two dtypes.
    """
    then = torch.tensor(stored["logits"], dtype=torch.float64)
    now = torch.tensor(logits_fingerprint(model)["logits"], dtype=torch.float64)
    if then.shape != now.shape:
        raise IntegrityError("fingerprint of another form", where=where, found=tuple(then.shape))
    drift = (now - then).square().mean(1).sqrt().max() / then.square().mean().sqrt()
    tolerance = max(TOLERANCE[model.dtype], TOLERANCE[getattr(torch, stored["dtype"])])
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
