"""The report as plain text: what a person reads in the terminal when the main job ends.

At most 100 columns of printable characters: control characters in names (which could move the
cursor or recolour a terminal) are replaced by `?`, long names are shortened in the middle.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from qll.report import units
from qll.report.allocation import loss_table
from qll.report.build import check_report
from qll.report.layout import table
from qll.report.matrices import CHANNEL, format_counts, kind_order, matrix_rows
from qll.report.training import training_words
from qll.report.view import bits_words, cost_pairs

WIDTH = 100
WORST = 5


def text_table(report: Mapping[str, Any], path: Path | None = None) -> str:
    """Model, quality, cost, entropy per matrix type, worst matrices, features, as text.

    `path`: of the HTML page, printed last. Raises ReportError when `report` lacks a key.

    >>> text_table({"schema_version": 1})
    Traceback (most recent call last):
    qll.errors.ReportError: report: key is missing (expected 'model', found 'schema_version')
    """
    check_report(report)
    rows = matrix_rows(report)
    parts = [
        _model(report),
        _quality(report),
        _cost(report),
        _entropy(rows),
        _losses(report),
        _worst(rows),
        features_table(report["sae"]["layers"]).splitlines(),
    ]
    warnings = len(report["warnings"])
    if warnings:
        noun = "warning" if warnings == 1 else "warnings"
        parts.append([f"{warnings} {noun}, the first: {report['warnings'][0]}"])
    lines = [_safe(line, WIDTH) for part in parts if part for line in (*part, "")]
    return "\n".join([*lines, *([f"report: {path}"] if path else [])]).rstrip() + "\n"


def _model(report: Mapping[str, Any]) -> list[str]:
    model, compression = report["model"], report["compression"]
    bits = bits_words(compression)
    return [
        f"{_safe(model['name'], 50)} ({model['source_format']}): "
        f"{model['n_layers']} blocks, d_model {model['d_model']:,}, "
        f"{units.count(model['params'])} parameters",
        f"keep {units.percent(compression['keep'])} of {units.count(model['block_params'])} in "
        f"blocks, params_ratio {compression['params_ratio']:.3f}, "
        f"bytes_ratio {compression['bytes_ratio']:.3f} in {compression['dtype']}",
        f"rows {model['row_order']}; formats: {format_counts(compression['per_matrix'])}",
        *([] if bits is None else [f"block linears stored in {bits}"]),
        *training_words(report),
    ]


def _quality(report: Mapping[str, Any]) -> list[str]:
    header = (
        "quality",
        "tokens",
        "ppl dense",
        "converted",
        "ratio",
        "KL nats",
        "top-1",
        "bits/byte",
    )
    rows = []
    for name, text in report["quality"]["texts"].items():
        dense, converted = text["dense"], text["converted"]
        rows.append(
            (
                _safe(name, 28),
                f"{text['tokens']:,}",
                units.number(dense["ppl"]),
                units.number(converted["ppl"]),
                units.rounded(units.ratio(dense["ppl"], converted["ppl"])),
                units.rounded(text["kl"]),
                units.percent(text["top1_agreement"]),
                units.rounded(converted["bits_per_byte"]),
            )
        )
    return table(header, rows)


def _cost(report: Mapping[str, Any]) -> list[str]:
    rows = [
        (item["label"], *(bar["text"] for bar in item["bars"]), item["ratio"].lstrip("\u00d7"))
        for item in cost_pairs(report)
    ]
    cost = report["cost"]
    seconds = cost["seconds"]
    longest = sorted(seconds, key=lambda stage: -seconds[stage])[:3]
    stages = ", ".join(f"{_safe(name, 20)} {units.seconds(seconds[name])}" for name in longest)
    memory = f"peak RAM {units.size(cost['peak_rss_bytes'])}"
    if cost["peak_device_bytes"]:
        memory += f", device {units.size(cost['peak_device_bytes'])}"
    time = f"time {units.seconds(sum(seconds.values()))}" + (f" (most: {stages})" if stages else "")
    return [*table(("cost", "dense", "converted", "ratio"), rows), time, memory]


def _entropy(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Means over the blocks at the channel cut."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["block"] is not None and CHANNEL in row["entropy"]:
            kinds.setdefault(row["kind"], []).append(row)
    header = ("entropy, channel cut, nats", "dense", "converted", "random", "gap", "lost")
    lines = []
    for kind in sorted(kinds, key=kind_order):
        entries = [row["entropy"][CHANNEL] for row in kinds[kind]]
        columns = [
            [entry.get(f"nats{end}") for entry in entries] for end in ("", "_converted", "_random")
        ]
        columns += [[row["values"][key] for row in kinds[kind]] for key in ("gap", "lost")]
        lines.append((_safe(kind, 28), *map(_mean, columns)))
    return table(header, lines)


def _worst(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    measured = [row for row in rows if row["metric_error"]]
    worst = sorted(measured, key=lambda row: -row["metric_error"])[:WORST]
    header = ("largest metric error", "format", "kept", "ranks", "rel. error", "metric error")
    lines = [
        (
            _safe(row["name"], 40),
            _safe(row["format"], 14),
            units.percent(row["values"]["kept"]),
            _safe(row["ranks_text"], 14),
            units.number(row["rel_error"]),
            units.number(row["metric_error"]),
        )
        for row in worst
    ]
    return table(header, lines)


def _losses(report: Mapping[str, Any]) -> list[str]:
    """Predicted beside measured losses, when the plan was made of measured ones."""
    return loss_table(report["compression"].get("measured") or [])


def _mean(values: Iterable[units.Number | None]) -> str:
    known = [value for value in values if value is not None]
    return units.nats(fmean(known) if known else None)


def features_table(layers: Mapping[str, Mapping[str, Any]]) -> str:
    """What became of the features of each autoencoder, one line each; "" without any.

    kept: share of the measured ones; effects: share of effects on the logits kept; each beside that
    of rounding to bfloat16 alone; FVU: dense, and after the conversion.

    >>> features_table({})
    ''
    """
    header = ("features", "measured", "kept", "blurred", "lost", "silenced", "bf16 floor",
              "effects", "their floor", "FVU", "after")  # fmt: skip
    rows = []
    for entry in layers.values():
        survival, floor = entry["survival"], entry.get("controls", {}).get("floor")
        causal = entry.get("causal", {})
        rounded = causal.get("controls", {}).get("floor", {})
        rows.append(
            (
                _safe(entry["hookpoint"], 18),
                units.count(survival["measured"]),
                units.percent(survival["kept_share"]["unweighted"]),
                *(units.count(survival[name]) for name in ("blurred", "lost", "silenced")),
                units.percent(None if floor is None else floor["kept_share"]["unweighted"]),
                units.percent(causal.get("kept_share")),
                units.percent(rounded.get("kept_share")),
                units.number(entry["dense"]["fvu"]),
                units.number(entry["converted"]["fvu"]),
            )
        )
    return "\n".join(table(header, rows))


def _safe(text: str, width: int) -> str:
    """`text` without control characters, shortened in the middle to `width`."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    if len(shown) <= width:
        return shown
    head = (width - 3) // 2
    return f"{shown[:head]}...{shown[len(shown) - (width - 3 - head) :]}"
