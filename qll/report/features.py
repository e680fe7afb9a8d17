"""The page of one autoencoder: what became of its features, self-contained like the report.

Numbers and examples come from `qll.report.feature_data`. Tokens are text from a file: the template
escapes every one, and the script writes them with textContent only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from qll.report import units
from qll.report.feature_data import check_features
from qll.report.feature_plots import density_scatter, keep_curve, survival_curve
from qll.report.page import render_template
from qll.report.view import CLASSES, class_counts, pair

CUTS = (0.5, 0.9)
CARDS = 12
CONTROL_NAMES = {
    "floor": ("bfloat16 floor", "the dense model rounded to bfloat16: what rounding alone loses"),
    "matched_noise": ("matched noise", "random noise as long as the conversion's error per token"),
    "shuffled": ("shuffled", "tokens paired at random: nothing should survive"),
}
EFFECT_NAMES = {
    "floor": CONTROL_NAMES["floor"],
    "other_feature": ("another feature", "effects of two features of one token: the null"),
}
LEDGER_NAMES = {
    "changed": "features that fire in both, changed",
    "born": "features that fire only after",
    "died": "features that fire no more",
    "dark": "outside the dictionary",
    "cross": "overlap of the four",
}


def render_features(value: Mapping[str, Any]) -> str:
    """The page of a features/<place>.json as one string of HTML.

    Raises ReportError when `value` lacks a key (see `check_features`).

    >>> render_features({"schema_version": 1})
    Traceback (most recent call last):
    qll.errors.ReportError: features: key is missing (expected 'model', found 'schema_version')
    """
    check_features(value)
    return render_template("features.html", "features.js", **feature_view(value))


def feature_view(value: Mapping[str, Any]) -> dict[str, Any]:
    """The context of features.html."""
    entry, survival = value["entry"], value["entry"]["survival"]
    columns = {name: number for number, name in enumerate(value["columns"])}
    rows = {
        feature: _row(value, columns, number) for number, feature in enumerate(value["features"])
    }
    lists = {
        name: [rows[feature] for feature in entry["remarkable"][name][:CARDS] if feature in rows]
        for name in ("damaged", "robust")
    }
    return {
        "title": f"{entry['hookpoint']} of {value['model']}",
        "model": value["model"],
        "hookpoint": entry["hookpoint"],
        "entry": entry,
        "survival": survival,
        "measured": units.count(survival["measured"]),
        "classes": class_counts(survival),
        "shares": _shares(survival),
        "sure": survival.get("certainty"),
        "controls": _controls(entry),
        "plots": _plots(value, columns),
        "pairs": _pairs(entry),
        "ledger": _ledger(entry["ledger"]),
        "causal": _causal(entry["causal"]),
        "matrices": _matrices(entry["weights"]["matrices"]),
        "metric": entry["weights"]["metric"],
        "heat": [row for name in ("damaged", "robust") for row in lists[name]],
        "lists": lists,
        "strata": {name: survival.get(f"by_{name}", []) for name in ("density", "peak")},
        "data": {
            "columns": value["columns"],
            "features": value["features"],
            "values": value["values"],
            "verdicts": value["verdicts"],
            "critical": value["critical"],
            "matrices": [_short_name(item) for item in entry["weights"]["matrices"]],
            "ranks": [item["rank"] for item in entry["weights"]["matrices"]],
            "examples": value["examples"],
        },
    }


def _row(value: Mapping[str, Any], columns: Mapping[str, int], number: int) -> dict[str, Any]:
    """One feature: its numbers as texts, its critical bonds as cells, its examples."""
    feature, numbers = value["features"][number], value["values"][number]
    found = {name: numbers[column] for name, column in columns.items()}
    ranks = [item["rank"] for item in value["entry"]["weights"]["matrices"]]
    bonds = value["critical"][number]
    code = found["class"]
    return {
        "feature": feature,
        "class": CLASSES[int(code)] if code is not None and 0 <= code < 4 else "unmeasured",
        "verdict": value["verdicts"][number],
        "r": units.number(found["r"]),
        "facts": [
            ("r", units.number(found["r"])),
            ("direction", units.number(found["direction"])),
            ("gain", units.number(found["gain"])),
            ("Jaccard", units.number(found["jaccard"])),
            ("fires", f"{units.percent(found['density'], 2)} \u2192 "
                      f"{units.percent(found['density_after'], 2)}"),
            ("causal", units.number(found["causal"])),
        ],
        "bonds": [] if bonds is None else [_bond(*both) for both in zip(bonds, ranks, strict=True)],
        "examples": [_example(one) for one in value["examples"].get(str(feature), [])],
    }  # fmt: skip


def _bond(bond: int, rank: int) -> dict[str, Any]:
    known = isinstance(bond, int) and bond >= 0
    return {"text": str(bond) if known else "", "shade": min(1.0, bond / rank) if known else None}


def _example(example: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tokens with the two activations as shares of the largest in the example."""
    top = max([*example["before"], *example["after"], 1e-12])
    return [
        {
            "text": token,
            "before": max(0.0, before / top),
            "after": max(0.0, after / top),
            "title": f"dense {units.number(before)}, converted {units.number(after)}",
        }
        for token, before, after in zip(
            example["tokens"], example["before"], example["after"], strict=True
        )
    ]


def _shares(survival: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    names = {
        "unweighted": ("kept, by feature", "share of measured features with r of 0.9 and more"),
        "by_fires": ("kept, by firing", "the same, each feature weighed by how often it fires"),
        "by_energy": ("kept, by energy", "the same, weighed by the sum of its squared parts"),
    }
    return [
        (title, units.percent(survival["kept_share"].get(name)), meaning)
        for name, (title, meaning) in names.items()
    ]


def _controls(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = [("this conversion", "the dense against the converted model", entry["survival"])]
    for name, (title, meaning) in CONTROL_NAMES.items():
        if name in entry["controls"]:
            rows.append((title, meaning, entry["controls"][name]))
    return [
        {
            "name": title,
            "meaning": meaning,
            "kept": units.percent(found["kept_share"]["unweighted"]),
            "r": units.decimals(found["medians"]["r"]),
            "jaccard": units.decimals(found["medians"]["jaccard"]),
            "firm": units.decimals(found["medians"]["firm_jaccard"]),
            "direction": units.decimals(found["medians"]["direction"]),
            "births": units.rounded(found["births_per_token"]),
            "deaths": units.rounded(found["deaths_per_token"]),
        }
        for title, meaning, found in rows
    ]


def _plots(value: Mapping[str, Any], columns: Mapping[str, int]) -> dict[str, Markup | None]:
    entry, rows = value["entry"], value["values"]
    controls = {name: found["r_quantiles"] for name, found in entry["controls"].items()}
    picked = [[row[columns[name]] or 0 for row in rows]
              for name in ("density", "density_after", "class")]  # fmt: skip
    weights = entry["weights"]
    shares = [row["kept_share"] for row in weights["matrices"] if row["kept_share"] is not None]
    now = sum(shares) / len(shares) if shares else None
    curve = keep_curve(weights["over_keep"], now) if weights["over_keep"]["keep"] else None
    return {
        "survival": Markup(survival_curve(entry["survival"]["r_quantiles"], controls, CUTS)),
        "density": Markup(density_scatter(*picked, entry["survival"]["tokens"])),
        "keep": None if curve is None else Markup(curve),
    }


def _pairs(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = {
        "fvu": ("variance not explained (FVU)", units.number),
        "l0": ("features per token (L0)", units.rounded),
        "ce_score": ("loss recovered (CE score)", units.number),
        "dead": ("features that never fire", units.count),
    }
    return [
        pair(title, entry["dense"].get(name), entry["converted"].get(name), text)
        for name, (title, text) in names.items()
    ]


def _ledger(ledger: Mapping[str, float]) -> list[dict[str, Any]]:
    top = max([abs(share) for share in ledger.values()] or [0]) or 1.0
    return [
        {
            "name": title,
            "key": name,
            "text": units.percent(ledger[name]),
            "length": 100 * abs(ledger[name]) / top,
            "negative": ledger[name] < 0,
        }
        for name, title in LEDGER_NAMES.items()
        if ledger.get(name) is not None
    ]


def _causal(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """How many edits, by how much their effect is longer, and the correlation beside controls."""
    if not found.get("edits"):
        return None
    rows = [("this conversion", "the change in the dense against that in the converted", found)]
    for name, (title, meaning) in EFFECT_NAMES.items():
        if name in found.get("controls", {}):
            rows.append((title, meaning, found["controls"][name]))
    return {
        "edits": units.count(found["edits"]),
        "features": units.count(found["features"]),
        "length": units.times(found["length_ratio"]),
        "rows": [
            {
                "name": title,
                "meaning": meaning,
                "kept": units.percent(row["kept_share"]),
                "lost": units.percent(row["lost_share"]),
                "quartiles": [units.decimals(value) for value in row["quartiles"]],
            }
            for title, meaning, row in rows
        ],
    }


def _matrices(rows: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per matrix: name, side, median critical bond and rho, share kept."""
    return [
        {
            "name": _short_name(row),
            "side": row["side"],
            "rank": row["rank"],
            "middle": _bond(round(row["critical"][1]), row["rank"])
            if row["critical"]
            else _bond(-1, 1),
            "rho": units.number(row["rho"][1] if row["rho"] else None),
            "kept": units.percent(row["kept_share"]),
        }
        for row in rows
    ]


def _middle(quartiles: list[float] | None) -> int:
    return round(quartiles[1]) if quartiles else -1


def _short_name(row: Mapping[str, Any]) -> str:
    """model.layers.9.mlp.up_proj -> 9 up."""
    parts = row["matrix"].split(".")
    return f"{parts[2] if len(parts) > 2 else ''} {parts[-1].removesuffix('_proj')}".strip()
