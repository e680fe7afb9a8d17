"""What it takes to say which features of autoencoders survive, in closed form.

Per place six sets of activations are encoded: of both models, of the two controls that have their
own (noise, rounding), and of the blocks before and after, which say whether the place is right. The
weights are taken to be in bfloat16, in which the features are looked for that are computed exactly.
Four comparisons then fetch the direction of everything that fires, and four fits decode. Passes
through the models are not in it. Nothing larger than one block of latents by one batch is held.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qll.scale.machines import Machine
from qll.scale.memory import PROCESS_BYTES
from qll.scale.shapes import Shape
from qll.scale.work import Operation, seconds

SUMS = 8  # per feature, float64
ENCODED, COMPARED, FITTED = 6, 4, 4
# bytes moved: per latent and token by adding a bias and finding the k largest (the sum is read and
# written twice, then read); per number of all directions by their norms (widened, squared, summed);
# per number of a row that is gathered (read and written in bfloat16), widened, and read by one
# product: the row of a candidate (there are SPARE times k) or of a feature that is decoded;
# a comparison reads its rows twice
TOPK_BYTES, NORM_BYTES, ROW_BYTES, COMPARED_BYTES = 20, 16, 14, 18
SPARE = 1.25
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
    encode = Operation("coarse", ENCODED * 2.0 * saes.tokens * numbers, shape.d_model)
    # all directions are read for their norms once; the encoder's for every set of activations,
    # which the product reads, writes as it likes them, and reads again
    directions = numbers * (saes.itemsize + NORM_BYTES + ENCODED * 3 * saes.itemsize)
    largest = ENCODED * TOPK_BYTES * saes.tokens * latents
    fires = saes.tokens * saes.k * shape.d_model
    each_row = (ENCODED * SPARE + FITTED) * ROW_BYTES + COMPARED * COMPARED_BYTES
    moved = directions + largest + fires * each_row
    move = Operation("bytes", float(moved))
    if machine.gpu_flops:
        computed = encode.count / machine.gpu_flops
    else:
        computed = seconds([encode, move], machine.rates) / machine.cores
    size = saes.itemsize * (2 * numbers + latents + shape.d_model)
    each = computed + size / machine.disk
    return {
        **asdict(saes),
        "latents": latents,
        "file_bytes": size,
        "disk": saes.places * size,
        "seconds_per_place": each,
        "seconds": saes.places * each,
        # the file as it is, one block of latents in float32, the sums, all states and one noise
        "memory": PROCESS_BYTES
        + size
        + FLOAT32 * 8192 * shape.d_model
        + 8 * SUMS * latents
        + (ENCODED + 1) * FLOAT32 * saes.tokens * shape.d_model,
    }
