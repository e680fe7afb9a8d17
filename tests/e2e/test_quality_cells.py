"""Cells of the quality table on the tiny Llama: a peer, a quantised one, and the product itself."""

from __future__ import annotations

import json

import pytest

from benchmarks import quality
from qll.load import builtin_texts


@pytest.fixture
def bench(tiny_checkpoint, tmp_path, monkeypatch):
    """Runs `quality.py` with these words on the tiny Llama; gives the result file's content."""
    source = builtin_texts()["python_source"].text
    pieces = {"eval": source[:200_000], "third": source[200_000:400_000], "calib": source[400_000:]}
    for name, text in pieces.items():
        (tmp_path / f"{name}.txt").write_text(text)
    words = ["--llama_dir", tiny_checkpoint, "--cache", tmp_path / "cache", "--context", "128"]
    words += ["--calib", "python_topics_calibration", tmp_path / "calib.txt"]
    words += ["--eval", tmp_path / "eval.txt", "--third", tmp_path / "third.txt"]
    words += ["--calib_tokens", "512", "--eval_tokens", "256", "--result", tmp_path / "q.json"]

    def run(*more: str) -> dict:
        monkeypatch.setattr("sys.argv", ["quality.py", *map(str, words), *more])
        quality.main()
        return json.loads((tmp_path / "q.json").read_text())

    return run


def test_a_peer_and_the_product_agree_on_the_whitened_svd(bench, capsys):
    """Two roads to the same method, but for the shrinkage: near each other, and both filled in."""
    result = bench("--only", "whitened_interpolative*/keep0.8/seed0")
    rows = list(result["rows"].values())
    assert [row["method"] for row in rows] == [
        "whitened_interpolative",
        "whitened_interpolative_shrunk",
    ]
    for row in rows:
        assert 0.75 < row["params_ratio"] <= 0.8
        assert row["bytes"] == 4 * row["params"] or "product_command" in row
        assert set(row["texts"]) == set(result["eval"])
        assert all(0.5 < text["ratio"] < 2 for text in row["texts"].values())
    assert rows[0]["params_ratio"] == pytest.approx(rows[1]["params_ratio"], abs=0.01)
    assert "--moments" not in rows[1]["product_command"]
    # what is there is not run again; --list says so
    before = result["rows"]
    assert bench("--only", "whitened_interpolative/keep0.8/seed0")["rows"] == before
    capsys.readouterr()
    bench("--list", "--only", "*/keep0.8/seed0")
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "not run" in lines["svd_llm/keep0.8/seed0"]
    assert "not run" not in lines["whitened_interpolative/keep0.8/seed0"]


def test_float16_changes_nothing_and_a_failing_cell_does_not_stop_the_others(bench, monkeypatch):
    load = quality.load_method

    def broken(name: str):
        if name == "gguf_bf16":
            raise ImportError("not installed")
        return load(name)

    monkeypatch.setattr(quality, "load_method", broken)
    with pytest.raises(SystemExit, match="gguf_bf16"):
        bench("--only", "*f*16/keep1/seed0")
    row = bench("--only", "fp16/*")["rows"]["fp16/keep1/seed0"]
    assert row["bits_per_weight"] == 16
    assert all(text["ratio"] == pytest.approx(1, abs=1e-3) for text in row["texts"].values())
