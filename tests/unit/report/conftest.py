"""The hand-made sample report, a fresh copy for every test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

SAMPLE = Path(__file__).parents[2] / "golden" / "report_sample.json"


@pytest.fixture(scope="session")
def sample_text() -> str:
    return SAMPLE.read_text(encoding="utf-8")


@pytest.fixture
def sample(sample_text) -> dict:
    return json.loads(sample_text)


@pytest.fixture
def small(sample) -> dict:
    """The sample cut to two blocks and one site cut: renders in a fraction of a second."""
    keep = ("model.layers.0.", "model.layers.1.", "model.embed_tokens")
    sample["compression"]["per_matrix"] = [
        row for row in sample["compression"]["per_matrix"] if row["name"].startswith(keep)
    ]
    for key in ("per_matrix", "spectra"):
        sample["entropy"][key] = [
            entry
            for entry in sample["entropy"][key]
            if entry["name"].startswith(keep) and entry.get("cut") != "site2"
        ]
    return sample
