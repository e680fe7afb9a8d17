"""The matrices of a report: where each one stands on the map, its values, colours and details.

A matrix is placed by its name: `model.layers.{block}.{kind}`; any other name (embeddings, head)
stands beside the map.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from qll.report import units
from qll.report.units import Number

BLOCK = re.compile(r"(?:model\.)?layers\.(\d{1,6})\.(.+)")
ORDER = (
    "q_proj", "k_proj", "v_proj", "qkv", "qkvo", "o_proj",
    "gate_proj", "up_proj", "gate_up", "down_proj",
)  # fmt: skip
METRICS = (
    ("kept", "Parameters kept", "parameters stored / parameters of the dense matrix"),
    ("bits", "Stored bits", "bits stored per weight of the dense matrix, scales and all"),
    ("rel_error", "Relative error", "norm of the difference / norm of the dense matrix"),
    (
        "metric_error",
        "Metric error",
        "the same, in the norm the conversion minimised: activations, or activations and gradients",
    ),
    (
        "predicted",
        "Predicted loss",
        "loss the plan expected, in thousandths (of a nat per token in the K-FAC metric)",
    ),
    (
        "gap",
        "Entropy gap",
        "nats by which the dense matrix lies below a random one of its shape, channel cut",
    ),
    ("lost", "Entropy lost", "nats of the dense matrix minus nats of the converted one"),
)
CHANNEL = "channel"


def matrix_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """compression.per_matrix with block, kind, kept, entropies, and values for every metric."""
    entropies: dict[str, dict[str, Any]] = {}
    for entry in report["entropy"]["per_matrix"]:
        entropies.setdefault(entry["name"], {})[entry["cut"]] = entry
    shapes = {entry["name"]: entry["shape"] for entry in report["entropy"].get("spectra", [])}
    rows = []
    for number, matrix in enumerate(report["compression"]["per_matrix"]):
        block, kind = place(matrix["name"])
        cuts_here = entropies.get(matrix["name"], {})
        channel = cuts_here.get(CHANNEL, {})
        shape = matrix.get("shape") or shapes.get(matrix["name"])
        values = {
            "kept": units.ratio(matrix["params_dense"], matrix["params"]),
            "bits": _stored_bits(matrix),
            "rel_error": matrix["rel_error"],
            "metric_error": matrix["metric_error"],
            "predicted": _thousandths(matrix.get("predicted_loss")),
            "gap": _minus(channel.get("nats_random"), channel.get("nats")),
            "lost": _minus(channel.get("nats"), channel.get("nats_converted")),
        }
        place_and_values = {
            "number": number, "block": block, "kind": kind,
            "values": values, "entropy": cuts_here, "shape": _shape(shape),
            "modes_text": modes_text(matrix["modes"]),
            "ranks_text": ", ".join(str(rank) for rank in matrix["ranks"]) or "-",
        }  # fmt: skip
        rows.append({**matrix, **place_and_values})
    return rows


def place(name: str) -> tuple[int | None, str]:
    """Block number and kind of a matrix; None for what is not in a block.

    >>> place("model.layers.12.self_attn.q_proj.weight"), place("lm_head")
    ((12, 'self_attn.q_proj'), (None, 'lm_head'))
    """
    path = name.removesuffix(".weight")
    found = BLOCK.fullmatch(path)
    return (int(found[1]), found[2]) if found else (None, path)


def kind_order(kind: str) -> tuple[int, str]:
    """Sort key: the order in which a block uses its matrices, unknown ones last.

    >>> sorted(["mlp.x", "mlp.up_proj", "self_attn.q_proj"], key=kind_order)
    ['self_attn.q_proj', 'mlp.up_proj', 'mlp.x']
    """
    last = kind.rsplit(".", 1)[-1]
    return (ORDER.index(last) if last in ORDER else len(ORDER), kind)


def grid(matrices: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Cells by position: columns are blocks, rows are kinds; numbers count from zero.

    >>> grid([{"number": 0, "block": 7, "kind": "mlp.up_proj"}])["cells"]
    [{'number': 0, 'column': 0, 'row': 0}]
    """
    inside = [row for row in matrices if row["block"] is not None]
    blocks = sorted({row["block"] for row in inside})
    kinds = sorted({row["kind"] for row in inside}, key=kind_order)
    column = {block: position for position, block in enumerate(blocks)}
    line = {kind: position for position, kind in enumerate(kinds)}
    cells = [
        {"number": row["number"], "column": column[row["block"]], "row": line[row["kind"]]}
        for row in inside
    ]
    outside = [row["number"] for row in matrices if row["block"] is None]
    return {"blocks": blocks, "kinds": kinds, "cells": cells, "outside": outside}


def metrics(matrices: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The metrics that have values: domain over the blocks, colour and text of each cell."""
    found = []
    for key, label, meaning in METRICS:
        values = {row["number"]: row["values"][key] for row in matrices}
        inside = [values[row["number"]] for row in matrices if row["block"] is not None]
        known = [value for value in inside if value is not None]
        if not known:
            continue
        low, high = _domain(known)
        shade = {
            number: 0.5 if high == low else min(1.0, max(0.0, (value - low) / (high - low)))
            for number, value in values.items()
            if value is not None
        }
        text = _percent_cell if key == "kept" else _decimal_cell
        long = units.percent if key == "kept" else units.number
        entry = {
                "key": key,
                "label": label,
                "meaning": meaning,
                "low": ("\u2264 " if min(known) < low else "") + long(low),
                "high": ("\u2265 " if max(known) > high else "") + long(high),
                "shade": [round(shade[n], 3) if n in shade else None for n in values],
                "cell": ["" if v is None else text(v) for v in values.values()],
                "text": [long(value) for value in values.values()],
        }  # fmt: skip
        found.append(entry)
    return found


def details(row: Mapping[str, Any]) -> dict[str, Any]:
    """What page.js writes into the panel of a selected matrix: texts only."""
    left = f"{units.count(row['params'])} of {units.count(row['params_dense'])}"
    facts = [
        ("shape, out\u00d7in", row["shape"]),
        ("parameters", left),
        ("kept", units.percent(row["values"]["kept"])),
        ("modes", row["modes_text"]),
        ("ranks", row["ranks_text"]),
        ("gauge", row.get("gauge")),
        ("bits", row.get("bits")),
        ("bytes", row.get("bytes") and units.count(row["bytes"])),
        ("group", row.get("group")),
        ("relative error", units.number(row["rel_error"])),
        ("metric error", units.number(row["metric_error"])),
        ("discarded weight", units.number(row["discarded_weight"])),
    ]
    return {
        "name": row["name"],
        "block": row["block"],
        "kind": row["kind"],
        "format": row["format"],
        "facts": [[name, str(value)] for name, value in facts if value not in (None, "", "-")],
        "entropy": [_entropy_row(cut, row["entropy"][cut]) for cut in sorted(row["entropy"])],
    }


def start(matrices: Iterable[Mapping[str, Any]]) -> int | None:
    """The matrix that the page shows first: the one in a block with the largest relative error.

    >>> start([{"number": 5, "block": 0, "rel_error": 0.1}])
    5
    """
    inside = [row for row in matrices if row["block"] is not None]
    worst = max(inside, key=lambda row: row["rel_error"] or 0.0, default=None)
    return None if worst is None else worst["number"]


def format_counts(matrices: Iterable[Mapping[str, Any]]) -> str:
    """How many matrices have which format, most frequent first.

    >>> format_counts([{"format": "mpo"}, {"format": "dense"}, {"format": "mpo"}])
    '2 mpo, 1 dense'
    """
    counts = Counter(matrix["format"] for matrix in matrices)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {name}" for name, count in ordered)


def _stored_bits(matrix: Mapping[str, Any]) -> Number | None:
    """Per weight of the dense matrix, where numbers are packed."""
    if not matrix.get("bits"):
        return None
    return 8 * matrix["bytes"] / matrix["params_dense"]


def modes_text(modes: Any) -> str:
    """Modes of a format as one short text.

    >>> modes_text({"heads": [9], "d_head": [64]}), modes_text(None)
    ('heads 9, d_head 64', '-')
    """
    if isinstance(modes, Mapping):
        return ", ".join(f"{name} {modes_text(dims)}" for name, dims in modes.items()) or "-"
    if isinstance(modes, list) and modes:
        if any(isinstance(item, list) for item in modes):
            return ", ".join(modes_text(item) for item in modes)
        return "\u00d7".join(str(item) for item in modes)
    return "-" if not modes else str(modes)


def _domain(values: list[Number]) -> tuple[Number, Number]:
    """Ends of the colour scale: the outermost hundredths share a colour, so one outlier does not
    make all other cells look alike."""
    ordered, spare = sorted(values), len(values) // 100
    return ordered[spare], ordered[-1 - spare]


def _percent_cell(value: Number) -> str:
    return f"{100 * value:.0f}"


def _decimal_cell(value: Number) -> str:
    if abs(value) < 0.005:
        return "0"
    return f"{value:.2f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.1f}"


def _entropy_row(cut: str, entry: Mapping[str, Any]) -> list[str]:
    nats, converted, random = entry["nats"], entry.get("nats_converted"), entry["nats_random"]
    numbers = (nats, converted, random, _minus(random, nats))
    return [cut, *map(units.nats, numbers), units.number(entry["participation_ratio"])]


def _thousandths(value: Number | None) -> Number | None:
    return None if value is None else 1000 * value


def _shape(shape: list[int] | None) -> str:
    return "\u00d7".join(f"{side:,}" for side in shape) if shape else "-"


def _minus(left: Number | None, right: Number | None) -> Number | None:
    return None if left is None or right is None else left - right
