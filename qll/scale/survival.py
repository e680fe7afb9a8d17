"""What it takes to say which features of autoencoders survive, in closed form.

Per place: the autoencoder is read once, both models' activations of every token are encoded, and
six sums per feature are kept. Nothing larger than one block of latents by one batch is held.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qll.scale.machines import Machine
from qll.scale.memory import PROCESS_BYTES
from qll.scale.shapes import Shape
from qll.scale.work import Operation, seconds

BATCH_TOKENS = 4096  # encoded at a time
SUMS = 6  # per feature, float64
FLOAT32 = 4


@dataclass(frozen=True)
class Autoencoders:
    """Sparse autoencoders on the residual stream."""

    places: int = 31
    width: int = 32
    """Latents over d_model."""
    k: int = 192
    tokens: int = 4096
    itemsize: int = 2
    """Bytes of a number in the files."""


def predict_survival(shape: Shape, machine: Machine, saes: Autoencoders) -> dict[str, Any]:
    """Seconds, memory and disk of survival at all places of a model, as JSON.

    >>> from qll.scale.machines import machine_of
    >>> from qll.scale.shapes import SHAPES
    >>> found = predict_survival(SHAPES["llama3-8b"], machine_of("cpu2"), Autoencoders())
    >>> found["latents"], round(found["file_bytes"] / 1e9, 2)
    (131072, 2.15)
    """
    latents = saes.width * shape.d_model
    numbers = latents * shape.d_model
    encode = Operation("forward", 2 * 2.0 * saes.tokens * numbers, shape.d_model)
    # blocks of latents are read and widened for every batch of tokens, once for each model
    batches = -(-saes.tokens // BATCH_TOKENS)
    widen = 2.0 * batches * numbers * (saes.itemsize + 2 * FLOAT32)
    gather = 2.0 * FLOAT32 * saes.tokens * saes.k * shape.d_model
    decode = Operation("bytes", widen + gather)
    if machine.gpu_flops:
        computed = encode.count / machine.gpu_flops
    else:
        computed = seconds([encode, decode], machine.rates) / machine.cores
    size = saes.itemsize * (2 * numbers + latents + shape.d_model)
    each = computed + size / machine.disk
    return {
        **asdict(saes),
        "latents": latents,
        "file_bytes": size,
        "disk": saes.places * size,
        "seconds_per_place": each,
        "seconds": saes.places * each,
        # the file as it is, one block of latents in float32, the sums, both models' states
        "memory": PROCESS_BYTES
        + size
        + FLOAT32 * 8192 * shape.d_model
        + 8 * SUMS * latents
        + 2 * FLOAT32 * saes.tokens * shape.d_model,
    }
