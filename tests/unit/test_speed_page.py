"""The speed section is written from what benchmarks/speed.py measures, here on tiny models."""

from __future__ import annotations

import pytest

from benchmarks import speed, speed_page, speed_runs
from tests.conftest import make_tiny_llama
from tests.unit.runtime.conftest import make_model


@pytest.fixture
def small(monkeypatch):
    for module in (speed, speed_runs):
        for name, value in {"PROMPT": 8, "DECODED": 2, "PREFILL": 16}.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(speed, "BATCHES", (1, 2))
    return {"dense": make_tiny_llama(seed=3), "keep_0.8": make_model("mixed")}


def test_every_row_that_is_measured_is_on_the_page(small):
    result = {
        "machine": speed.machine(),
        "versions": speed.versions(),
        "threads": 1,
        "smollm2": speed.smollm2(small, 1),
        "batches": speed.batches(small, 1),
        "llama3_8b_block": speed.llama_block(1, shrink=8),
    }
    text = speed_page.section(result)
    assert "(1.10)" in text
    assert text.count("| keep_0.8 |") == 2
    assert text.count("| keep_0.6 |") == 1
    assert "Speculative" not in text
    for part in ("smollm2", "llama3_8b_block"):
        row = result[part]["rows"]["dense"]
        assert row["decode"]["faster"] == 1.0
        assert f"| dense | {row['decode']['tokens_per_second']:.1f} | 1.00" in text
    result["transformers"] = speed.through_transformers(small, 1)
    assert "dense_in_qll" in speed_page.section(result)
