"""Pages of autoencoders: every token is text, every number is that of the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qll.errors import ReportError
from qll.report import features_table, page_value, read_features, render, render_features
from qll.report.feature_plots import density_scatter, keep_curve, survival_curve
from qll.report.view import feature_summary
from tests.unit.report.test_page import HOSTILE, read

SAMPLE = Path(__file__).parents[2] / "golden" / "features_sample.json"


@pytest.fixture(scope="session")
def features_text() -> str:
    return SAMPLE.read_text(encoding="utf-8")


def cut(text: str) -> dict:
    """The sample cut to a few features with contexts."""
    value = json.loads(text)
    wanted = value["entry"]["remarkable"]
    for name in wanted:
        wanted[name] = wanted[name][:3]
    kept = {str(feature) for found in wanted.values() for feature in found}
    value["examples"] = {name: found for name, found in value["examples"].items() if name in kept}
    return value


@pytest.fixture
def features(features_text) -> dict:
    return cut(features_text)


@pytest.fixture(scope="module")
def clean(features_text):
    """The page of the sample, read once."""
    return read(render_features(cut(features_text)))


def test_the_page_shows_the_data(features, clean):
    reader = clean
    text = " ".join(" ".join(reader.texts).split())
    survival = features["entry"]["survival"]
    for expected in ("layers.9", "3,964 ordinary tokens", "62.0 %", "kfac metric", "10 gate",
                     f"{100 * survival['kept_share']['unweighted']:.1f} %"):  # fmt: skip
        assert expected in text, expected
    tokens = [a for tag, a in reader.tags if tag == "span" and a.get("class") == "token"]
    assert len(tokens) == 2 + 2 * 23 * 6, "the key, and two contexts of six features"
    assert all("--before" in attributes["style"] for attributes in tokens)
    data = next(json.loads(body) for a, body in reader.scripts if a.get("id") == "data")
    assert data["features"] == features["features"]
    assert data["examples"] == features["examples"]


def test_one_file_that_asks_for_nothing_and_runs_only_our_script(clean):
    for tag, attributes in clean.tags:
        assert tag not in {"link", "iframe", "object", "embed", "img", "base"}
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith(("#", "../report.html"))
        assert not [name for name in attributes if name.startswith("on")]
    policy = next(a["content"] for _, a in clean.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; script-src 'sha256-")


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_tokens_and_names_stay_text(features, clean, text):
    features["model"] = features["entry"]["hookpoint"] = features["entry"]["text"] = text
    features["entry"]["weights"]["metric"] = text
    features["entry"]["weights"]["matrices"][0]["matrix"] = text
    features["verdicts"][0] = text
    for found in features["examples"].values():
        for example in found:
            example["tokens"] = [text for _ in example["tokens"]]
    attacked = read(render_features(features))
    assert [tag for tag, _ in attacked.tags] == [tag for tag, _ in clean.tags]
    assert len(attacked.scripts) == len(clean.scripts) == 2
    assert any(text.replace("\u0000", "\ufffd") in part or text in part for part in attacked.texts)


def test_data_that_is_not_ours_is_refused(features, tmp_path):
    def refused(words: str) -> None:
        path = tmp_path / "features.json"
        path.write_text(json.dumps(features))
        with pytest.raises(ReportError, match=words) as caught:
            read_features(path)
        assert "features.json" in str(caught.value)

    features["examples"]["3"] = [{"tokens": ["a"], "before": ["x"], "after": [1.0]}]
    refused("expected int or float, found str")
    del features["examples"]["3"]
    features["values"][0][0] = "1"
    refused("wrong kind of value")
    features["values"].pop()
    refused("one entry per feature")
    del features["entry"]["ledger"]
    refused("expected 'ledger'")


def test_nothing_measured_still_renders(features):
    entry = features["entry"]
    for name in ("features", "values", "verdicts", "critical"):
        features[name] = []
    features["examples"] = {}
    entry["remarkable"] = {"damaged": [], "robust": [], "active": []}
    entry["causal"] = {"edits": 0, "features": 0}
    entry["weights"] |= {"matrices": [], "over_keep": {"keep": [], "kept_share": [], "every": []}}
    survival = entry["survival"]
    survival |= {"kept": 0, "blurred": 0, "lost": 0, "silenced": 0, "measured": 0}
    survival["kept_share"] = dict.fromkeys(survival["kept_share"])
    survival["medians"] = dict.fromkeys(survival["medians"])
    survival |= {"r_quantiles": [], "by_density": [], "by_peak": []}
    entry["controls"] = {}
    html = render_features(features)
    assert "No feature fires often enough" in html
    assert 'id="weights"' not in html


def test_page_value_lists_measured_features_and_their_bonds():
    count = 6
    arrays = {name: torch.arange(count) / 10 for name in
              ("r", "low", "high", "jaccard", "direction", "gain", "density", "density_after",
               "peak", "causal")}  # fmt: skip
    arrays["gain"][2] = torch.nan
    arrays |= {
        "class": torch.tensor([-1, 0, 1, -1, 3, 2], dtype=torch.int8),
        "damaged": torch.tensor([0, 0, 0, 0, 1, 0]).bool(),
        "sure": torch.tensor([0, 1, 0, 0, 0, 0]).bool(),
        "asked": torch.tensor([1, 4]),
        "critical": torch.tensor([[7, 8], [9, -1]]),
    }
    value = page_value("m", {}, arrays, {4: []})
    assert value["features"] == [1, 2, 4, 5]
    assert value["verdicts"] == ["kept", None, "damaged", None]
    assert value["critical"] == [[7, 9], None, [8, -1], None]
    row = dict(zip(value["columns"], value["values"][1], strict=True))
    assert (row["r"], row["gain"], row["class"]) == (0.2, None, 1)
    assert value["examples"] == {"4": []}


def test_report_links_only_pages_of_its_own(features, small):
    entry = features["entry"]
    for page, link in (("features/layers.9.html", "features/layers.9.html"),
                       ("javascript:alert(1)", None), ("features/../../x.html", None),
                       ("features/..html/x.html", None)):  # fmt: skip
        assert feature_summary("9", entry | {"page": page})["page"] == link
    small["sae"] = {"layers": {"9": entry}}
    html = render(small)
    assert 'href="features/layers.9.html"' in html
    assert "Features of autoencoders" in html


def test_the_table(features):
    lines = features_table({"9": features["entry"]}).splitlines()
    assert lines[2].startswith("layers.9")
    assert "62.0 %" in lines[2]


def test_effects_stand_beside_what_rounding_alone_leaves(features):
    causal = {"kept_share": 0.055, "controls": {"floor": {"kept_share": 0.332}}}
    entry = features["entry"] | {"causal": causal}
    shown = {title: share for title, share, _ in feature_summary("9", entry)["numbers"]}
    assert (shown["effects kept"], shown["their bfloat16 floor"]) == ("5.5 %", "33.2 %")
    header, _, line = features_table({"9": entry}).splitlines()
    assert "their floor" in header
    assert line.index("5.5 %") < line.index("33.2 %")
    # without causal edits there is nothing to show
    bare = feature_summary("9", features["entry"] | {"causal": {"edits": 0, "features": 0}})
    assert [share for title, share, _ in bare["numbers"] if "floor" in title][1] == "n/a"


def test_plots_leave_out_what_was_not_measured():
    assert "var(--converted)" not in survival_curve([], {}, [])
    assert survival_curve([0.1, 0.2], {}, []).count("var(--converted)") == 1
    assert density_scatter([0.5, 0.1], [0.5, 0.0], [0, 3], 100).startswith("<svg")
    assert density_scatter([], [], [], 0).startswith("<svg")
    curve = {"keep": [0.5, 1.0], "kept_share": [0.2, 1.0], "every": [0.0, 1.0]}
    assert "var(--converted)" in keep_curve(curve, 0.4)
    assert "var(--converted)" not in keep_curve(curve, None)
