"""report.json as one HTML file: no network, no foreign font, no file beside it.

The template escapes every text, the data for the script is JSON in which `<`, `>`, `&` and quotes
are written as escapes, and a Content-Security-Policy in the file lets the browser run our own
script (by its hash) and load nothing: a name that came from a weight file stays a name.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from qll.lens.spectra import random_spectrum
from qll.report import units
from qll.report.build import check_report
from qll.report.matrices import CHANNEL, kind_order, place
from qll.report.plots import Curve, Spectrum, entropy_panels, spectrum_panels
from qll.report.view import view


def render(report: Mapping[str, Any]) -> str:
    """The page of a report as one string of HTML.

    Raises ReportError when `report` lacks a key (see `check_report`).

    >>> render({"schema_version": 1})
    Traceback (most recent call last):
    qll.errors.ReportError: report: key is missing (expected 'model', found 'schema_version')
    """
    check_report(report)
    return render_template(
        "page.html",
        "page.js",
        **view(report),
        entropy=_entropy(report),
        spectra=_spectra(report),
    )


def render_template(template: str, script: str, **context: Any) -> str:
    """A template of this folder with the common style and its script, whose hash it lets run."""
    code = _asset(script)
    environment = Environment(
        loader=FunctionLoader(_asset),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": units.percent, "count": units.count, "number": units.number, "nats": units.nats,
    }  # fmt: skip
    return environment.get_template(template).render(
        **context,
        script=Markup(code),
        script_hash=_csp_hash(code),
        style=Markup(_asset("page.css")),
    )


def _asset(name: str) -> str:
    return files("qll.report").joinpath(name).read_text("utf-8")


def _csp_hash(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


def _entropy(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per cut, the channel cut first: the panels of all kinds, with the mean gap of each."""
    curves: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for entry in report["entropy"]["per_matrix"]:
        block, kind = place(entry["name"])
        if block is not None:
            curves.setdefault(entry["cut"], {}).setdefault(kind, {})[block] = entry
    ordered = sorted(curves, key=lambda cut: (cut != CHANNEL, cut))
    return [{"cut": cut, "panels": _cut_panels(curves[cut])} for cut in ordered]


def _cut_panels(kinds: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    panels = []
    drawn = entropy_panels({kind: _curve(entries) for kind, entries in kinds.items()})
    for kind in sorted(kinds, key=kind_order):
        curve = _curve(kinds[kind])
        panels.append(
            {
                "kind": kind,
                "svg": Markup(drawn[kind]),
                "gap": _mean_gap(curve.random, curve.dense),
                "lost": _mean_gap(curve.dense, curve.converted),
                "points": {
                    str(block): [curve.dense[i], curve.converted[i], curve.random[i]]
                    for i, block in enumerate(curve.blocks)
                },
            }
        )
    return panels


def _curve(entries: Mapping[int, Mapping[str, Any]]) -> Curve:
    blocks = sorted(entries)
    fields = ("nats", "nats_converted", "nats_random")
    return Curve(blocks, *([entries[block].get(field) for block in blocks] for field in fields))


def _mean_gap(above: Any, below: Any) -> float | None:
    gaps = [
        high - low
        for high, low in zip(above, below, strict=True)
        if high is not None and low is not None
    ]
    return sum(gaps) / len(gaps) if gaps else None


def _spectra(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The panels of all kinds that have spectra."""
    groups: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for entry in report["entropy"].get("spectra", []):
        block, kind = place(entry["name"])
        if block is not None and entry["rank"]:
            groups.setdefault(kind, []).append((block, entry))
    last = max((block for found in groups.values() for block, _ in found), default=0)
    lines, random, shapes = {}, {}, {}
    for kind, found in groups.items():
        found.sort(key=lambda item: item[0])
        lines[kind] = [_line(block, block / max(last, 1), entry) for block, entry in found]
        first = found[0][1]
        random[kind] = random_spectrum(*first["shape"], first["rank"])
        shapes[kind] = "\u00d7".join(str(side) for side in first["shape"])
    drawn = spectrum_panels(lines, random)
    return [
        {"kind": kind, "shape": shapes[kind], "svg": Markup(drawn[kind])}
        for kind in sorted(drawn, key=kind_order)
    ]


def _line(block: int, depth: float, entry: Mapping[str, Any]) -> Spectrum:
    return Spectrum(block, depth, entry["rank"], entry["dense"], entry.get("converted"))
