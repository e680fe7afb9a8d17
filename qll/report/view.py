"""What the page shows, and from which key of the report: numbers turned into texts and bars.

Nothing here knows HTML. `view(report)` is the context of page.html; `view(report)["data"]` is what
page.js reads. The matrices themselves are in matrices.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from qll.report import units
from qll.report.allocation import losses
from qll.report.matrices import details, format_counts, grid, matrix_rows, metrics, start
from qll.report.training import training_words
from qll.report.units import Number

CLASSES = ("kept", "blurred", "lost", "silenced")
PAGE = re.compile(r"features/\w[\w.]*\.html")


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
        "losses": losses(report["compression"].get("measured") or []),
        "matrices": matrices,
        "map": grid(matrices),
        "metrics": metrics(matrices),
        "features": [
            feature_summary(name, entry) for name, entry in report["sae"]["layers"].items()
        ],
        "formats": sorted({row["format"] for row in matrices}),
        "warnings": report["warnings"],
        "provenance": list(_provenance(report)),
        "data": {"matrices": [details(row) for row in matrices], "start": start(matrices)},
    }


def cost_pairs(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What both models cost, as `pair`s; quantities that were not measured are left out."""
    model, compression, cost = report["model"], report["compression"], report["cost"]
    params = compression.get("params") or {
        "dense": model["params"],
        "converted": model["params"] * compression["params_ratio"],
    }
    rates = ("decode_tokens_per_second", "prefill_tokens_per_second")
    own = [cost.get("runtime", {}).get(rate) for rate in rates]
    decode, prefill = (cost[rate] for rate in rates)
    names = ("", "") if any(own) else ("decode tokens/s", "prefill tokens/s")
    rows = [
        ("parameters, whole model", "parameters", params, units.count),
        (f"bytes in {compression['dtype']}", "bytes", compression.get("bytes"), units.size),
        ("decode, tokens/s in `generate`", "decode tokens/s", own[0], units.rounded),
        ("prefill, tokens/s in `generate`", "prefill tokens/s", own[1], units.rounded),
        ("decode, tokens/s in transformers", names[0], decode, units.rounded),
        ("prefill, tokens/s in transformers", names[1], prefill, units.rounded),
        ("FLOPs per decoded token", "", cost.get("flops_per_token"), units.count),
    ]
    return [
        pair(label, values["dense"], values["converted"], text) | {"short": short}
        for label, short, values, text in rows
        if values and not (values["dense"] is None and values["converted"] is None)
    ]


def feature_summary(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """One autoencoder in the report: where its page is, and a few numbers.

    A page that is not where this program writes them is not linked.
    """
    survival, page = entry["survival"], str(entry.get("page", ""))
    floor = entry.get("controls", {}).get("floor")
    causal = entry.get("causal", {})
    rounded = causal.get("controls", {}).get("floor", {}).get("kept_share")
    numbers = [
        ("bfloat16 floor", None if floor is None else floor["kept_share"]["unweighted"],
         "kept when the dense model is only rounded"),
        ("effects kept", causal.get("kept_share"),
         "of features taken away, changes of the logits that stay"),
        ("their bfloat16 floor", rounded, "effects kept when the dense model is only rounded"),
        ("kept by energy", survival["kept_share"]["by_energy"], "features weighed by energy"),
    ]  # fmt: skip
    return {
        "name": entry.get("hookpoint", name),
        "page": page if PAGE.fullmatch(page) else None,
        "kept": units.percent(survival["kept_share"]["unweighted"]),
        "measured": units.count(survival["measured"]),
        "unmeasured": units.count(survival["unmeasured"]),
        "classes": class_counts(survival),
        "numbers": [(title, units.percent(share), meaning) for title, share, meaning in numbers],
    }


def class_counts(survival: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Features per class of survival, with the length of each one's bar in percent."""
    total = max(1, survival["measured"])
    return [
        {"name": name, "count": survival[name], "share": 100 * survival[name] / total}
        for name in CLASSES
    ]


def _about(report: Mapping[str, Any]) -> list[str]:
    """The model in a few words each."""
    model = report["model"]
    words = [f"{model['n_layers']} blocks", f"d_model {model['d_model']:,}"]
    if {"n_heads", "n_kv_heads"} <= {*model}:
        words.append(f"{model['n_heads']}:{model['n_kv_heads']} heads")
    words.append(f"from {model['source_format']}; rows {model['row_order']}")
    words.append(format_counts(report["compression"]["per_matrix"]))
    if "metric" in report["compression"]:
        words.append(f"{report['compression']['metric']} metric")
    return [word for word in (*words, *training_words(report)) if word]


def _summary(report: Mapping[str, Any]) -> dict[str, str | None]:
    compression = report["compression"]
    keys = ("keep", "params_ratio", "bytes_ratio")
    asked = compression.get("keep_requested")
    return {
        "dtype": compression["dtype"],
        "asked": None if asked is None else units.percent(asked),
        "bits": bits_words(compression),
        **{key: units.percent(compression[key]) for key in keys},
    }


def bits_words(compression: Mapping[str, Any]) -> str | None:
    """What a weight of the block linears takes in the files, where numbers are packed.

    >>> bits_words({"per_matrix": [{"bits": 3}], "block_bits_per_weight": 3.5})
    '3.50 bits per weight'
    """
    if not any(row.get("bits") for row in compression["per_matrix"]):
        return None
    asked = compression.get("bits_per_weight_requested")
    words = f"{compression['block_bits_per_weight']:.2f} bits per weight"
    return words if asked is None else f"{words} ({asked:g} asked for)"


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
    numbers = [
        ("KL divergence", units.number(text["kl"]), "nats per token, dense to converted"),
        ("top-1 agreement", units.percent(text["top1_agreement"]), "same most likely token"),
        ("bits per byte", bits, "dense to converted"),
    ]
    if "leak" in text:
        seen = " \u2192 ".join(units.number(text["leak"][side]) for side in ("dense", "converted"))
        numbers.append(("leak of later tokens", seen, "of the largest logit; 0 when causal"))
    return {
        "name": name,
        "tokens": f"{text['tokens']:,}",
        "pair": pair("perplexity", dense["ppl"], converted["ppl"], units.number),
        "ratio": units.times(change),
        "numbers": numbers,
    }


def pair(label: str, dense: Number | None, converted: Number | None, text: Any) -> dict[str, Any]:
    """Two values of one quantity as texts and bar lengths in percent of the larger one.

    >>> [bar["length"] for bar in pair("ppl", 10.0, 40.0, str)["bars"]]
    [25.0, 100.0]
    """
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
    return [(name, units.size(value)) for name, value in rows if value]


def _provenance(report: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    model = report["model"]
    yield "model", f"{model['name']} ({model['source_format']}; row order {model['row_order']})"
    for name, text in report["quality"]["texts"].items():
        yield f"text {name}", f"{text['tokens']:,} tokens, sha256 {text['sha256']}"
    yield from _rows(report.get("provenance", {}), ())
    yield "schema version", str(report["schema_version"])


def _rows(values: Mapping[str, Any], path: tuple[str, ...]) -> Iterable[tuple[str, str]]:
    """A row per value, and per group of plain values in it; groups in groups get their own."""
    for name, value in values.items():
        label = " ".join((*path, name.replace("_", " ")))
        if not isinstance(value, Mapping):
            yield label, _flat(value)
            continue
        nested = {key: item for key, item in value.items() if isinstance(item, Mapping)}
        yield label, _flat({key: item for key, item in value.items() if key not in nested})
        yield from _rows(nested, (*path, name.replace("_", " ")))


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_flat(item)}" for name, item in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(_flat(item) for item in value) or "-"
    return "-" if value in (None, "") else str(value)
