"""What the page shows, and from which key of the report: numbers turned into texts, bars and cells.

Nothing here knows HTML. `view(report)` is the context of page.html; `view(report)["data"]` is what
page.js reads. A matrix is placed on the map by its name: `model.layers.{block}.{kind}`; any other
name (embeddings, head) stands beside the map.
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
    ("rel_error", "Relative error", "norm of the difference / norm of the dense matrix"),
    (
        "metric_error",
        "Metric error",
        "the same, in the norm the conversion minimised: activations, or activations and gradients",
    ),
    (
        "gap",
        "Entropy gap",
        "nats by which the dense matrix lies below a random one of its shape, channel cut",
    ),
    ("lost", "Entropy lost", "nats of the dense matrix minus nats of the converted one"),
)
CHANNEL = "channel"


def view(report: Mapping[str, Any]) -> dict[str, Any]:
    """The context of the page, plain data. `report` has passed `check_report`."""
    matrices = matrix_rows(report)
    pairs = cost_pairs(report)
    return {
        "model": report["model"],
        "about": _about(report),
        "facts": _facts(report, pairs),
        "summary": _summary(report),
        "texts": [_text_card(name, text) for name, text in report["quality"]["texts"].items()],
        "pairs": pairs,
        "stages": _stages(report["cost"]["seconds"]),
        "memory": _memory(report["cost"]),
        "matrices": matrices,
        "map": _map(matrices),
        "metrics": _metrics(matrices),
        "cuts": cuts(report),
        "formats": sorted({row["format"] for row in matrices}),
        "warnings": report["warnings"],
        "provenance": list(_provenance(report)),
        "data": {"matrices": [_details(row) for row in matrices]},
    }


def place(name: str) -> tuple[int | None, str]:
    """Block number and kind of a matrix; None for what is not in a block.

    >>> place("model.layers.12.self_attn.q_proj.weight"), place("lm_head")
    ((12, 'self_attn.q_proj'), (None, 'lm_head'))
    """
    path = name.removesuffix(".weight")
    found = BLOCK.fullmatch(path)
    return (int(found[1]), found[2]) if found else (None, path)


def kind_order(kind: str) -> tuple[int, str]:
    """Sort key: the order in which a block uses its matrices, unknown ones last."""
    last = kind.rsplit(".", 1)[-1]
    return (ORDER.index(last) if last in ORDER else len(ORDER), kind)


def cuts(report: Mapping[str, Any]) -> list[str]:
    """Names of the cuts in the report, the channel cut first."""
    names = {entry["cut"] for entry in report["entropy"]["per_matrix"]}
    return sorted(names, key=lambda cut: (cut != CHANNEL, cut))


def matrix_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """compression.per_matrix with block, kind, kept, entropies, and values for every metric."""
    entropies: dict[str, dict[str, Any]] = {}
    for entry in report["entropy"]["per_matrix"]:
        entropies.setdefault(entry["name"], {})[entry["cut"]] = entry
    rows = []
    for number, matrix in enumerate(report["compression"]["per_matrix"]):
        block, kind = place(matrix["name"])
        cuts_here = entropies.get(matrix["name"], {})
        channel = cuts_here.get(CHANNEL, {})
        values = {
            "kept": units.ratio(matrix["params_dense"], matrix["params"]),
            "rel_error": matrix["rel_error"],
            "metric_error": matrix["metric_error"],
            "gap": _minus(channel.get("nats_random"), channel.get("nats")),
            "lost": _minus(channel.get("nats"), channel.get("nats_converted")),
        }
        place_and_values = {
            "number": number, "block": block, "kind": kind, "short": kind.rsplit(".", 1)[-1],
            "values": values, "entropy": cuts_here, "shape": _shape(matrix),
            "modes_text": modes_text(matrix["modes"]),
            "ranks_text": ", ".join(str(rank) for rank in matrix["ranks"]) or "-",
        }  # fmt: skip
        rows.append({**matrix, **place_and_values})
    return rows


def cost_pairs(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What both models cost, as `pair`s; quantities that were not measured are left out."""
    model, compression, cost = report["model"], report["compression"], report["cost"]
    params = compression.get("params") or {
        "dense": model["params"],
        "converted": model["params"] * compression["params_ratio"],
    }
    decode, prefill = cost["decode_tokens_per_second"], cost["prefill_tokens_per_second"]
    rows = [
        ("parameters, whole model", "parameters", params, units.count),
        (f"bytes in {compression['dtype']}", "bytes", compression.get("bytes"), units.size),
        ("decode, tokens per second", "decode tokens/s", decode, units.rounded),
        ("prefill, tokens per second", "prefill tokens/s", prefill, units.rounded),
        ("FLOPs per decoded token", "", cost.get("flops_per_token"), units.count),
    ]
    return [
        pair(label, values["dense"], values["converted"], text) | {"short": short}
        for label, short, values, text in rows
        if values and not (values["dense"] is None and values["converted"] is None)
    ]


def format_counts(matrices: Iterable[Mapping[str, Any]]) -> str:
    """How many matrices have which format, most frequent first.

    >>> format_counts([{"format": "mpo"}, {"format": "dense"}, {"format": "mpo"}])
    '2 mpo, 1 dense'
    """
    counts = Counter(matrix["format"] for matrix in matrices)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {name}" for name, count in ordered)


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


def _shape(matrix: Mapping[str, Any]) -> str:
    shape = matrix.get("shape")
    return "\u00d7".join(f"{side:,}" for side in shape) if shape else "-"


def _about(report: Mapping[str, Any]) -> list[str]:
    """The model in a few words each."""
    model = report["model"]
    words = [f"{model['n_layers']} blocks", f"d_model {model['d_model']:,}"]
    if {"n_heads", "n_kv_heads"} <= {*model}:
        words.append(f"{model['n_heads']}:{model['n_kv_heads']} heads")
    words.append(f"from {model['source_format']}; rows {model['row_order']}")
    words.append(format_counts(report["compression"]["per_matrix"]))
    return [word for word in words if word]


def _summary(report: Mapping[str, Any]) -> dict[str, str]:
    compression = report["compression"]
    keys = ("keep", "params_ratio", "bytes_ratio")
    return {key: units.percent(compression[key]) for key in keys} | {"dtype": compression["dtype"]}


def _facts(report: Mapping[str, Any], pairs: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The cost in one line; the section on cost has the same numbers with bars."""
    facts = [
        (item["short"], f"{item['bars'][0]['text']} \u2192 {item['bars'][1]['text']}")
        for item in pairs
        if item["short"]
    ]
    facts += [(f"peak {name}", value) for name, value in _memory(report["cost"])]
    return [*facts, ("run time", units.seconds(sum(report["cost"]["seconds"].values())))]


def _text_card(name: str, text: Mapping[str, Any]) -> dict[str, Any]:
    dense, converted = text["dense"], text["converted"]
    change = units.ratio(dense["ppl"], converted["ppl"])
    bits = (
        f"{units.number(dense['bits_per_byte'])} \u2192 {units.number(converted['bits_per_byte'])}"
    )
    return {
        "name": name,
        "tokens": f"{text['tokens']:,}",
        "pair": pair("perplexity", dense["ppl"], converted["ppl"], units.number),
        "ratio": units.times(change),
        "numbers": [
            ("KL divergence", units.number(text["kl"]), "nats per token, dense to converted"),
            ("top-1 agreement", units.percent(text["top1_agreement"]), "same most likely token"),
            ("bits per byte", bits, "dense to converted"),
        ],
    }


def pair(label: str, dense: Number | None, converted: Number | None, text: Any) -> dict[str, Any]:
    """Two values of one quantity as texts and bar lengths in percent of the larger one."""
    top = max((value for value in (dense, converted) if value is not None), default=0.0)
    bars = [
        {"side": side, "text": text(value), "length": 100 * value / top if value and top else 0.0}
        for side, value in (("dense", dense), ("converted", converted))
    ]
    return {"label": label, "bars": bars, "ratio": units.times(units.ratio(dense, converted))}


def _stages(seconds: Mapping[str, float]) -> dict[str, Any]:
    total = sum(seconds.values())
    stages = [
        {"name": name, "text": units.seconds(value), "share": 100 * value / total if total else 0}
        for name, value in seconds.items()
    ]
    return {"total": units.seconds(total), "stages": stages}


def _memory(cost: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("RAM", cost["peak_rss_bytes"]), ("device", cost["peak_device_bytes"])]
    return [(name, units.size(value)) for name, value in rows if value is not None]


def _map(matrices: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Cells by position: columns are blocks, rows are kinds; numbers count from zero."""
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


def _metrics(matrices: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The metrics that have values: domain over the blocks, colour and text of each cell."""
    metrics = []
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
        metrics.append(entry)
    return metrics


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


def _details(row: Mapping[str, Any]) -> dict[str, Any]:
    """What page.js writes into the panel of a selected matrix: texts only."""
    left = f"{units.count(row['params'])} of {units.count(row['params_dense'])}"
    facts = [
        ("shape, out\u00d7in", row["shape"]),
        ("parameters", left),
        ("kept", units.percent(row["values"]["kept"])),
        ("modes", row["modes_text"]),
        ("ranks", row["ranks_text"]),
        ("gauge", row.get("gauge")),
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


def _entropy_row(cut: str, entry: Mapping[str, Any]) -> list[str]:
    nats, converted, random = entry["nats"], entry.get("nats_converted"), entry["nats_random"]
    numbers = (nats, converted, random, _minus(random, nats))
    texts = [units.NONE if value is None else f"{value:.3f}" for value in numbers]
    return [cut, *texts, units.number(entry["participation_ratio"])]


def _provenance(report: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    model = report["model"]
    yield "model", f"{model['name']} ({model['source_format']}; row order {model['row_order']})"
    for name, text in report["quality"]["texts"].items():
        yield f"text {name}", f"{text['tokens']:,} tokens, sha256 {text['sha256']}"
    for name, value in report.get("provenance", {}).items():
        yield name.replace("_", " "), _flat(value)
    yield "schema version", str(report["schema_version"])


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_flat(item)}" for name, item in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(_flat(item) for item in value) or "-"
    return "-" if value is None else str(value)


def _minus(left: Number | None, right: Number | None) -> Number | None:
    return None if left is None or right is None else left - right
