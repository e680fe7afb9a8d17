"""What the page of one autoencoder shows, as JSON data: features/<place>.json.

Rows are features that were measured, the busiest ones if there are very many; the numbers of all
features are in features/<place>.safetensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qll.errors import ReportError
from qll.report.build import MAYBE_NUMBER, NUMBER, check_schema, plain
from qll.store import read_json

SCHEMA_VERSION = 1
MOST_ROWS = 8000
DIGITS = 4
COLUMNS = ("r", "low", "high", "jaccard", "direction", "gain", "density", "density_after",
           "peak", "causal", "class")  # fmt: skip

EXAMPLE = {"tokens": [str], "before": [NUMBER], "after": [NUMBER]}
MATRIX = {"matrix": str, "side": str, "rank": int}
SCHEMA = {
    "schema_version": int,
    "model": str,
    "entry": {
        "hookpoint": str,
        "text": str,
        "dense": dict,
        "converted": dict,
        "survival": dict,
        "controls": dict,
        "ledger": dict,
        "causal": dict,
        "remarkable": {"damaged": [int], "robust": [int], "active": [int]},
        "weights": {"metric": str, "matrices": [MATRIX], "over_keep": dict},
    },
    "columns": [str],
    "features": [int],
    "values": [list],
    "verdicts": [(str, type(None))],
    "critical": [(list, type(None))],
    "examples": dict,
}


def page_value(
    model: str,
    entry: Mapping[str, Any],
    features: Mapping[str, Tensor],
    examples: Mapping[int, Any],
) -> dict[str, Any]:
    """The page's data from an entry of `sae.layers`, numbers by feature, and examples.

    features: as in `qll.lens.Study`. Row i of `values` (numbers in the order of `columns`), of
    `verdicts` (damaged, kept or null) and of `critical` (a rank per matrix, or null) belongs to
    feature `features[i]`.
    """
    measured = (features["class"] >= 0).nonzero()[:, 0]
    busiest = measured[features["density"][measured].argsort(descending=True, stable=True)]
    rows = busiest[:MOST_ROWS].sort().values
    place = {feature: column for column, feature in enumerate(features["asked"].tolist())}
    bonds = features["critical"].mT.tolist()
    table = torch.stack([features[name][rows].double() for name in COLUMNS], dim=1)
    return plain(
        {
            "schema_version": SCHEMA_VERSION,
            "model": model,
            "entry": entry,
            "columns": list(COLUMNS),
            "features": rows.tolist(),
            "values": [[_short(value) for value in row] for row in table.tolist()],
            "verdicts": [_verdict(features, feature) for feature in rows.tolist()],
            "critical": [
                bonds[place[feature]] if feature in place else None for feature in rows.tolist()
            ],
            "examples": {str(feature): found for feature, found in examples.items()},
        },
        "features",
    )


def read_features(path: Path) -> dict[str, Any]:
    """The page's data in `path`; raises IntegrityError or ReportError, naming the file."""
    value = read_json(path)
    try:
        check_features(value)
    except ReportError as error:
        raise ReportError(f"not the features of this version: {error}", where=path) from None
    return value


def check_features(value: Any) -> None:
    """Raise ReportError unless `value` has every key of the schema with the right kind of value.

    >>> check_features({"schema_version": 1})
    Traceback (most recent call last):
    qll.errors.ReportError: features: key is missing (expected 'model', found 'schema_version')
    """
    check_schema(value, SCHEMA, "features")
    for name in ("values", "verdicts", "critical"):
        if len(value[name]) != len(value["features"]):
            raise ReportError(
                "not one entry per feature",
                where=f"features.{name}",
                expected=len(value["features"]),
                found=len(value[name]),
            )
    for row in value["values"]:
        check_schema(row, [MAYBE_NUMBER], "features.values")
        if len(row) != len(value["columns"]):
            raise ReportError("not one number per column", where="features.values", found=len(row))
    for feature, found in value["examples"].items():
        check_schema(found, [EXAMPLE], f"features.examples[{feature!r}]")


def _verdict(features: Mapping[str, Tensor], feature: int) -> str | None:
    if features["damaged"][feature]:
        return "damaged"
    return "kept" if features["sure"][feature] else None


def _short(value: float) -> float | None:
    """A few significant digits; None for what is not finite."""
    return float(f"{value:.{DIGITS}g}") if abs(value) < float("inf") else None
