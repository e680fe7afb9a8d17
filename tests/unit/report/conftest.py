"""The hand-made sample report, a fresh copy for every test."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

SAMPLE = Path(__file__).parents[2] / "golden" / "report_sample.json"
SMALL = re.compile(r"model\.(embed_tokens|layers\.[01]\.self_attn\.[qvo]_proj)")


@pytest.fixture(scope="session")
def sample_text() -> str:
    return SAMPLE.read_text(encoding="utf-8")


@pytest.fixture
def sample(sample_text) -> dict:
    return json.loads(sample_text)


@pytest.fixture(scope="session")
def small_text(sample_text) -> str:
    report = json.loads(sample_text)
    rows = report["compression"]["per_matrix"]
    report["compression"]["per_matrix"] = [row for row in rows if SMALL.fullmatch(row["name"])]
    for key in ("per_matrix", "spectra"):
        report["entropy"][key] = [
            entry
            for entry in report["entropy"][key]
            if SMALL.fullmatch(entry["name"]) and entry.get("cut") != "site2"
        ]
    return json.dumps(report)


@pytest.fixture
def small(small_text) -> dict:
    """The sample cut to two blocks, three kinds and one site cut: renders in half a second."""
    return json.loads(small_text)
