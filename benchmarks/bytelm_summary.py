"""Conclusions from the rows of bytelm.json: what a part is worth, where a larger model lands."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import t

from benchmarks.bytelm_cells import (
    BEST,
    FLAGS,
    LAW_MINUTES,
    PARTS,
    PLAIN,
    SEEDS,
    Cell,
    all_cells,
    twin_of,
)
from qll.bytelm.settings import LMTrainConfig, TextSettings
from qll.bytelm.sizing import count_parameters

MARGIN = 0.01  # bits per byte that a part must win, beyond the noise of the seeds
CONFIDENCE = 0.95
PRESET_BYTES = 10_916_000  # of the training half of WikiText-2 in its raw form
PRESET_EPOCHS = 20
REPEATS_WORTH = 15.39  # Muennighoff et al. 2023 (arXiv 2305.16264), R*_D
GPU_FLOPS = 165e12  # an RTX 4090's dense bfloat16 products per second, by its data sheet
GPU_SHARE = 0.35  # of them that training reaches, an assumption
PRESET_COMMAND = "qll lm train --dataset wikitext2 --preset improved --out runs/improved"


def summary(rows: dict[str, Any]) -> dict[str, Any]:
    """The keys of bytelm.json that follow from its rows; what has not been run is absent."""
    found: dict[str, Any] = {"seeds": list(SEEDS), "ablation": ablation(rows)}
    for label in (PLAIN, BEST):
        row = rows.get(Cell("train", "long", label).name)
        if row is not None:
            found[label] = {key: row[key] for key in row if key not in ("samples", "config")}
    runs = [cell for cell in all_cells() if cell.table == "scaling" and cell.name in rows]
    points = [rows[cell.name] for cell in runs if cell.minutes >= LAW_MINUTES]
    if len(points) >= 8:
        found["scaling"] = scaling(points)
        if PLAIN in found:
            everything = [rows[cell.name] for cell in runs]
            found["scaling"]["check"] = checked(found[PLAIN], points, everything)
    return found


def ablation(rows: dict[str, Any]) -> dict[str, Any]:
    """Every part against the plain twin, and against its own real-valued twin, paired by seed."""
    plain = _by_seed(rows, PLAIN)
    found = {}
    for part in ("nanoGPT-style loop", "AdamW", *PARTS, *FLAGS, BEST):
        on = _by_seed(rows, part)
        if not on or not plain:
            continue
        entry = {"bits_per_byte": on, **compared(plain, on)}
        if twin := _by_seed(rows, twin_of(part)):
            entry["against_twin"] = {"bits_per_byte": twin, **compared(twin, on)}
        found[part] = entry
    return found


def compared(base: dict[int, float], other: dict[int, float]) -> dict[str, Any]:
    """How much `other` wins over `base` on the seeds both have, the noise of that, and a verdict.

    gain is the mean of paired differences, above 0 where `other` needs fewer bits; noise is the
    half-width of its one-sided 95 % interval by Student's t. Credited: gain - noise above 0.01;
    harmful: gain + noise below -0.01; neutral: anything else.

    >>> compared({0: 2.0, 1: 2.1, 2: 2.2}, {0: 1.9, 1: 2.0, 2: 2.1})["verdict"]
    'credited'
    >>> compared({0: 2.0}, {0: 1.0})["verdict"]
    'too few seeds'
    """
    gains = [base[seed] - other[seed] for seed in sorted(base.keys() & other.keys())]
    gain = statistics.mean(gains) if gains else math.nan
    if len(gains) < 2:
        return {"gain": gain if gains else None, "noise": None, "verdict": "too few seeds"}
    noise = float(t.ppf(CONFIDENCE, len(gains) - 1)) * statistics.stdev(gains) / len(gains) ** 0.5
    verdict = "neutral"
    if gain - noise > MARGIN:
        verdict = "credited"
    elif gain + noise < -MARGIN:
        verdict = "harmful"
    return {"gain": gain, "noise": noise, "verdict": verdict}


def scaling(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The law fitted to small runs and where it puts the preset: a prediction, never a result.

    The range of the prediction is that of fits with one run left out.
    """
    law = law_of(points)
    model = LMTrainConfig(texts=TextSettings(dataset="wikitext2"), preset="improved").model_config()
    params = count_parameters(model)
    total = PRESET_BYTES * PRESET_EPOCHS
    effective = effective_bytes(PRESET_BYTES, PRESET_EPOCHS)
    parts = [law_of([*points[:i], *points[i + 1 :]]) for i in range(len(points))]
    predictions = [predict(part, params, effective) for part in parts]
    flops = (6 * params + 12 * model.n_layers * model.d_model * model.context) * total
    # weights, gradients and two moments in float32; 34 bytes per channel and layer of activations
    # (Korthikanti et al. 2022, arXiv 2205.05198, without attention's matrices)
    batch = 32
    activations = 34 * batch * model.context * model.d_model * model.n_layers
    return {
        "law": law,
        "runs": len(points),
        "preset": {
            "command": PRESET_COMMAND,
            "parameters": params,
            "bytes": total,
            "effective_bytes": round(effective),
            "predicted_bits_per_byte": predict(law, params, effective),
            "predicted_range": [min(predictions), max(predictions)],
            "memory_bytes": 16 * params + activations,
            "flops": flops,
            "gpu_seconds": round(flops / (GPU_FLOPS * GPU_SHARE)),
            "run": False,
        },
    }


def checked(
    run: dict[str, Any], points: Sequence[dict[str, Any]], everything: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """A longer run that no fit has seen, beside what laws of `points` and of all runs say of it."""
    size, read = run["parameters"], run["bytes"]
    return {
        **{key: run[key] for key in ("parameters", "bytes", "bits_per_byte")},
        "predicted": predict(law_of(points), size, read),
        "runs_with_shorter_ones": len(everything),
        "predicted_with_shorter_ones": predict(law_of(everything), size, read),
    }


def law_of(points: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The law fitted to rows."""
    keys = ("parameters", "bytes", "bits_per_byte")
    return fit_law(*([row[key] for row in points] for key in keys))


def fit_law(
    parameters: Sequence[float], read: Sequence[float], bits: Sequence[float]
) -> dict[str, float]:
    """L = floor + a (N / 1e6)^-alpha + b (D / 1e6)^-beta by Huber's loss on log L.

    (Hoffmann et al. 2022, arXiv 2203.15556, approach 3.) All five numbers are positive.
    """
    n, d = np.log(np.asarray(parameters) / 1e6), np.log(np.asarray(read) / 1e6)
    target = np.log(np.asarray(bits))

    def residuals(x: np.ndarray) -> np.ndarray:
        terms = [x[0] + 0 * n, x[1] - np.exp(x[2]) * n, x[3] - np.exp(x[4]) * d]
        return np.logaddexp.reduce(terms, axis=0) - target

    starts = [
        (math.log(floor), 0.0, math.log(slope), 0.0, math.log(slope))
        for floor in (0.5, 1.0)
        for slope in (0.2, 0.5)
    ]
    fits = [least_squares(residuals, start, loss="huber", f_scale=1e-3) for start in starts]
    best = min(fits, key=lambda fit: fit.cost).x
    names = ("floor", "a", "alpha", "b", "beta")
    values = {name: float(np.exp(value)) for name, value in zip(names, best, strict=True)}
    return values | {"rms_log_error": float(np.sqrt(np.mean(residuals(best) ** 2)))}


def predict(law: dict[str, float], parameters: float, read: float) -> float:
    """Bits per byte of a law at so many parameters and bytes.

    >>> law = {"floor": 1.0, "a": 1.0, "alpha": 1.0, "b": 2.0, "beta": 1.0}
    >>> predict(law, 2e6, 4e6)
    2.0
    """
    size = law["a"] * (parameters / 1e6) ** -law["alpha"]
    return law["floor"] + size + law["b"] * (read / 1e6) ** -law["beta"]


def effective_bytes(unique: float, epochs: float) -> float:
    """Fresh bytes that `epochs` passes over `unique` bytes are worth.

    U + U R (1 - e^(-(epochs - 1) / R)) with R = 15.39 (Muennighoff et al. 2023, equation 5).

    >>> effective_bytes(100.0, 1.0), effective_bytes(100.0, 4.0) > 370
    (100.0, True)
    """
    repeats = REPEATS_WORTH * (1 - math.exp(-(epochs - 1) / REPEATS_WORTH))
    return unique * (1 + repeats)


def _by_seed(rows: dict[str, Any], label: str) -> dict[int, float]:
    names = {seed: Cell("train", "ablation", label, seed).name for seed in SEEDS}
    return {seed: rows[name]["bits_per_byte"] for seed, name in names.items() if name in rows}
