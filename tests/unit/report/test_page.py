"""The page: everything in one file, every hostile name shown as the name it is."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from qll.errors import ReportError
from qll.report import render

HOSTILE = (
    "<script>window.attacked=1</script>",
    "</script><script>window.attacked=1</script>",
    "<img src=x onerror=window.attacked=1>",
    '" onmouseover="window.attacked=1" x=\'',
    "</style></svg><!-- <b>",
    "{{ 7 * 7 }}{% raw %}",
    "$\\frac{1}{0}$ \u202e\u0000 \U0001f98a \u2028",
)


class Reader(HTMLParser):
    """Tags with attributes, texts, and the content of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[tuple[dict, str]] = []
        self.texts: list[str] = []
        self.inside: str | None = None

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append((self.tags[-1][1], data))
        elif self.inside != "style":
            self.texts.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    return reader


def attack(report: dict, text: str) -> dict:
    """The report with `text` in every place that a file or a user can name."""
    report["model"]["name"] = report["model"]["row_order"] = text
    report["compression"]["dtype"] = text
    for row in report["compression"]["per_matrix"][:3]:
        row["name"] += text
        row["format"] = text
        row["modes"] = {text: [2, 2]}
    report["compression"]["per_matrix"][4]["gauge"] = text
    for entry in (*report["entropy"]["per_matrix"][:3], *report["entropy"]["spectra"][:3]):
        entry["name"] = f"model.layers.0.{text}"
    report["entropy"]["per_matrix"][5]["cut"] = text
    report["quality"]["texts"] = {text: next(iter(report["quality"]["texts"].values()))}
    report["cost"]["seconds"][text] = 1.0
    report["warnings"] = [text]
    report["provenance"] = {text: {text: [text]}}
    return report


@pytest.fixture(scope="module")
def clean(sample_text) -> Reader:
    """The page of the whole sample."""
    return read(render(json.loads(sample_text)))


def test_one_file_that_asks_for_nothing(small):
    html = render(small)
    reader = read(html)
    for tag, attributes in reader.tags:
        assert tag not in {"link", "iframe", "object", "embed", "img", "base"}
        assert "src" not in attributes
        assert not attributes.get("href", "#").startswith(("http", "//"))
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)


def test_only_our_script_may_run(clean):
    policy = next(a["content"] for _, a in clean.tags if a.get("http-equiv"))
    (script,) = [text for attributes, text in clean.scripts if "type" not in attributes]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert not [a for _, a in clean.tags if any(name.startswith("on") for name in a)]


def test_the_page_holds_the_headline_numbers(clean):
    text = " ".join(clean.texts)
    for expected in ("SmolLM2-135M-Instruct", "15.46", "25.06", "\u00d71.62", "71.4 %", "3.413 GB",
                     "4 min 7 s", "model.layers.29.mlp.down_proj", "ridge 1e-06"):  # fmt: skip
        assert expected in text, expected


def test_data_for_the_script_is_the_table_of_the_report(small):
    reader = read(render(small))
    data = {a["id"]: json.loads(text) for a, text in reader.scripts if a.get("id")}
    names = [matrix["name"] for matrix in data["data"]["matrices"]]
    assert names == [row["name"] for row in small["compression"]["per_matrix"]]
    assert len(data["metrics"][0]["shade"]) == len(names)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_stays_text(clean, small, text):
    attacked = read(render(attack(small, text)))
    allowed = {tag for tag, _ in clean.tags}
    assert {tag for tag, _ in attacked.tags} <= allowed
    assert len(attacked.scripts) == len(clean.scripts) == 3
    assert not [a for _, a in attacked.tags if any(name.startswith("on") for name in a)]
    data = json.loads(next(body for a, body in attacked.scripts if a.get("id") == "data"))
    assert data["matrices"][0]["format"] == text
    assert any(text.replace("\u0000", "\ufffd") in part or text in part for part in attacked.texts)


def test_a_report_with_nothing_measured_still_renders(small):
    small["compression"]["per_matrix"] = []
    small["entropy"] = {"per_matrix": [], "activations": []}
    small["quality"] = {"texts": {}}
    small["cost"]["seconds"] = {}
    small["cost"]["peak_rss_bytes"] = None
    small["warnings"] = []
    del small["provenance"]
    html = render(small)
    assert 'id="map"' not in html
    assert "No text was scored" in html


def test_an_incomplete_report_is_refused(small):
    del small["cost"]
    with pytest.raises(ReportError, match="expected 'cost'"):
        render(small)
