"""The table in the terminal: aligned, at most 100 columns, nothing that moves a cursor."""

from __future__ import annotations

from pathlib import Path

import pytest

from qll.errors import ReportError
from qll.report import text_table


def test_it_says_what_happened(sample):
    text = text_table(sample, Path("runs/demo/report.html"))
    lines = text.splitlines()
    assert lines[0].startswith("SmolLM2-135M-Instruct (gguf): 30 blocks, d_model 576, 134.5 M")
    quality = next(line for line in lines if line.startswith("python_source"))
    assert quality.split()[1:] == ["4,096", "9.123", "19.96", "2.19", "0.803", "64.0", "%", "1.14"]
    assert any(line.startswith("decode") and line.split()[-1] == "0.860" for line in lines)
    assert lines[-1] == "report: runs/demo/report.html"


def test_columns_line_up_and_fit(sample):
    sample["compression"]["per_matrix"][0]["name"] = "model.layers.0." + "x" * 300
    sample["quality"]["texts"]["t" * 300] = sample["quality"]["texts"]["python_source"]
    lines = text_table(sample).splitlines()
    assert max(map(len, lines)) <= 100
    rules = [number for number, line in enumerate(lines) if line.startswith("---")]
    assert len(rules) == 6
    for number in rules:
        assert len(lines[number - 1]) == len(lines[number]) == len(lines[number + 1])


def test_worst_matrices_come_first(sample):
    lines = text_table(sample).splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("largest metric error"))
    errors = [float(line.split()[-1]) for line in lines[start + 2 : start + 7]]
    assert errors == sorted(errors, reverse=True)
    largest = max(row["metric_error"] for row in sample["compression"]["per_matrix"])
    assert errors[0] == pytest.approx(largest, abs=5e-5)


def test_control_characters_do_not_reach_the_terminal(sample):
    evil = "\x1b[2J\x1b]0;owned\x07\r\n\u202e"
    sample["model"]["name"] = sample["compression"]["dtype"] = evil
    sample["compression"]["per_matrix"][0]["format"] = evil
    sample["quality"]["texts"][evil] = sample["quality"]["texts"]["python_source"]
    sample["cost"]["seconds"][evil] = 1e6
    sample["warnings"] = [evil]
    text = text_table(sample)
    assert all(letter.isprintable() for line in text.split("\n") for letter in line)


def test_an_incomplete_report_is_refused(sample):
    del sample["quality"]["texts"]["python_source"]["kl"]
    with pytest.raises(ReportError, match="expected 'kl'"):
        text_table(sample)
