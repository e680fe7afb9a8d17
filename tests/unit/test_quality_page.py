"""The cells of the quality table, its runner's bookkeeping, and the page from part of the rows."""

from __future__ import annotations

import json
import re

import pytest
import tyro

from benchmarks import quality, quality_page, quality_plot, results_page
from benchmarks.peers import METHODS
from benchmarks.quality_cells import (
    HEADLINE,
    HEADLINE_BASELINES,
    HEADLINE_CONTROL,
    KEEPS,
    SEEDS,
    Cell,
    all_cells,
)
from qll.config import MainConfig, to_json

TEXTS = ("wiki", "python", "third")


def row(ratio: float, bits: float = 16.0, params_ratio: float = 0.8) -> dict:
    texts = {
        text: {"ppl_dense": 10.0, "ppl": 10 * ratio, "ratio": ratio, "tokens": 8, "sha256": ""}
        for text in TEXTS
    }
    return {"texts": texts, "bits_per_weight": bits, "params_ratio": params_ratio, "keep": 0.8}


@pytest.fixture
def result():
    rows = {
        "svd/keep0.8/seed0": row(2.0e6),
        "svd_llm/keep0.8/seed0": row(4.0),
        "svd_llm/keep0.8/seed1": row(5.0),
        "ours_best/keep0.8/seed0": row(1.2),
        "rtn_int4/keep1/seed0": row(1.05, bits=4.5),
        "ours_fast/keep0.8/seed0": row(1.25),
    }
    return {
        "rows": rows,
        "machine": {"cpu": "a processor", "cores": 2, "platform": "x"},
        "model": {"name": "tiny", "fingerprint": ""},
        "eval": dict.fromkeys(TEXTS, ""),
        "calib": {"a": "", "b": ""},
        "eval_tokens": 16384,
        "calib_tokens_per_text": 16384,
        "context": 1024,
    }


def test_cells_have_their_own_names_and_known_methods():
    cells = all_cells()
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    assert "svd_llm/keep0.8/seed0" in names
    assert all(cell.method in METHODS for cell in cells if cell.flags is None)
    assert all(cell.method in quality_page.LABELS for cell in cells if cell.table == "keep")
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    for method in ("ours_best", "svd_llm", "modegpt", "kfac_lems", "asvd", "mpifa"):
        sizes = {(cell.keep, cell.seed) for cell in cells if cell.method == method}
        assert sizes == {(keep, seed) for keep in KEEPS for seed in SEEDS}


def test_an_ablation_changes_one_flag():
    base = next(cell for cell in all_cells() if cell.method == "ours_fast").flags
    for cell in all_cells():
        if cell.table == "ablation":
            pairs = dict(zip(cell.flags[::2], cell.flags[1::2], strict=True))
            known = dict(zip(base[::2], base[1::2], strict=True))
            changed = {flag for flag in pairs if pairs[flag] != known.get(flag)}
            assert len(changed) == 1


def test_missing_cells_are_said_to_be_missing(result):
    text = quality_page.section(result)
    wiki = text.split("### Equal parameters: wiki")[1].split("###")[0]
    lines = {line.split(" | ")[0]: line for line in wiki.splitlines() if line.startswith("| ")}
    place = sorted(KEEPS, reverse=True).index(0.8)
    cells = lines["| SVD-LLM (v1, whitening)"].strip("| ").split(" | ")[1:]
    assert cells[place] == "4.500 (4.000 to 5.000), 2 of 3 seeds"
    assert cells[:place] + cells[place + 1 :] == ["not run"] * 4
    assert "2.0e+06" in lines["| truncated SVD"]
    assert "| round to nearest, int4, group 32 | 4.50 | 1.050 |" in text
    assert "| nothing | 1.250, 1 of 3 seeds |" in text
    assert "6 of" in text


def test_the_page_takes_a_file_without_rows(result):
    text = quality_page.section(result | {"rows": {}})
    assert "not run" in text
    assert "0 of" in text


def test_the_plot_is_the_same_from_the_same_numbers(result, tmp_path):
    for name in ("one.svg", "two.svg"):
        quality_plot.draw(result, tmp_path / name)
    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "two.svg").read_text()
    assert "perplexity / dense" in text or "<path" in text
    assert quality_plot.points(result["rows"], "svd", KEEPS, "wiki", "keep") == []
    assert quality_plot.points(result["rows"], "svd_llm", KEEPS, "wiki", "keep") == [(0.8, 4.5)]


def test_a_headline_needs_all_seeds_and_wins_on_every_text(result):
    rows = {}
    for seed in SEEDS:
        for method, ratio in zip(HEADLINE_BASELINES, (2.0, 1.8), strict=True):
            rows[Cell(method, 0.8, seed, "").name] = row(ratio)
        rows[Cell("headline_kron", 0.8, seed, "").name] = row(1.9)
        rows[Cell("headline_joint_tree", 0.8, seed, "").name] = row(1.5)
    found = quality.headline(rows)
    assert [item["format"] for item in found["headline_candidates"]] == ["joint_tree", "kron"]
    assert [item["won"] for item in found["headline_candidates"]] == [True, False]
    assert found["headline"]["format"] == "joint_tree"
    assert found["headline"]["texts"]["wiki"]["ours"] == [15.0] * 3
    # the better baseline counts
    assert found["headline"]["texts"]["wiki"]["whitened_interpolative"] == [18.0] * 3
    # one text lost, or more parameters, is no win
    name = Cell("headline_joint_tree", 0.8, 0, "").name
    lost = row(1.5)
    lost["texts"]["third"] = lost["texts"]["third"] | {"ppl": 90.0}
    assert not quality.headline(rows | {name: lost})["headline"]["won"]
    assert not quality.headline(rows | {name: row(1.5, params_ratio=0.81)})["headline"]["won"]
    del rows[name]
    assert [item["format"] for item in quality.headline(rows)["headline_candidates"]] == ["kron"]
    assert quality.headline({}) == {}
    assert next(iter(HEADLINE)) == "joint_tree"
    candidates = found["headline_candidates"]
    text = quality_page.section(result | {"headline_candidates": candidates})
    assert "| joint_tree | 0.8 | 0.8000 | wiki | 15.00 / 15.00 / 15.00 | 18.00" in text


def test_a_format_is_compared_with_low_rank_in_the_same_metric_too(result):
    rows = {Cell(HEADLINE_CONTROL, 0.8, 0, "").name: row(1.4)}
    for seed in SEEDS:
        rows |= {Cell(method, 0.8, seed, "").name: row(2.0) for method in HEADLINE_BASELINES}
        rows[Cell("headline_joint_tree", 0.8, seed, "").name] = row(1.5)
        rows[Cell("headline_panels", 0.8, seed, "").name] = row(1.3)
    found = quality.headline(rows)
    assert found["headline"]["texts"]["wiki"]["low_rank"] == [14.0]
    assert [quality_page.beats_low_rank(c) for c in found["headline_candidates"]] == [False, True]
    text = quality_page.section(result | found)
    assert "1 of 3 seeds) has wiki 14.00" in text
    assert "lower on every text is `panels`." in text
    assert "| 20.00 / 20.00 / 20.00 | yes | 14.00 |" in text


def test_rows_are_added_to_the_file_as_it_is_by_then(tmp_path):
    path = tmp_path / "quality.json"
    quality.update(path, {"seeds": [0]}, {"svd_llm/keep0.8/seed0": row(4.0)})
    before = quality.read(path)
    quality.update(path, {}, {"ours_best/keep0.8/seed0": row(1.2)})
    after = json.loads(path.read_text())
    assert after["seeds"] == [0]
    assert list(after["rows"]) == ["ours_best/keep0.8/seed0", "svd_llm/keep0.8/seed0"]
    assert before["rows"]["svd_llm/keep0.8/seed0"] == after["rows"]["svd_llm/keep0.8/seed0"]


def test_commands_name_no_folder_of_this_machine(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("words")
    flags = ["--calib", str(text), "--eval", str(text), "--third", str(text)]
    monkeypatch.setattr("sys.argv", ["quality.py", *flags])
    command = quality.command(Cell("svd", 0.8, 0, "keep"), quality.parse())
    assert "--only svd/keep0.8/seed0 --again" in command
    assert "--third text.txt" in command
    assert not re.search(r"(^|\s|=)/", command)


def test_the_result_file_records_what_it_depends_on():
    result = json.loads((results_page.RESULTS / "quality.json").read_text())
    assert {"platform", "cpu", "cores"} <= set(result["machine"])
    assert {"versions", "seeds", "calib", "eval", "model"} <= set(result)
    assert result["eval_tokens"] == 16384
    keys = {"command", "git", "wall_seconds", "params", "params_ratio", "bytes", "texts", "seed"}
    for name, item in result["rows"].items():
        assert keys <= set(item), name
        assert not re.search(r"(^|\s)/", item["command"] + " " + item.get("product_command", ""))
        assert item["params_ratio"] <= item["keep"] * (1 + 1e-9) or item["table"] == "bits", name
        assert len(item["texts"]) == 3
        for text, found in item["texts"].items():
            assert found["sha256"] == result["eval"][text]
            assert found["ratio"] == pytest.approx(found["ppl"] / found["ppl_dense"])
    assert (results_page.PAGE.parent / quality_page.PLOT).exists()


def test_a_row_with_a_note_is_starred_and_its_note_is_shown(result):
    result["rows"]["ours_best/keep0.8/seed0"]["note"] = "made with other defaults"
    page = quality_page.section(result)
    assert r"1.200\*, 1 of 3 seeds" in page
    assert "- `ours_best/keep0.8/seed0`: made with other defaults" in page
    assert page.count("\n- `") == 1
    assert r"| 1.200\* |" in quality_page.summary(result)


def test_the_readme_says_which_format_won_and_how(result):
    assert "instead of" not in quality_page.summary(result)
    texts = {"wiki": {"ours": [15.0, 14.0, 16.0], "whitened_interpolative": [20.0, 18.0, 19.5]}}
    found = {"format": "panels", "keep": 0.8, "won": True, "texts": texts, "params_ratio": 0.8}
    shown = quality_page.summary(result | {"headline": found})
    assert "`--format panels --effort fast` against" in shown
    assert "wiki 14.00 to 16.00 instead of 18.00 to 20.00." in shown
    assert "these too" not in shown
    lost = {**found, "format": "kron", "won": False}
    others = {"headline": found, "headline_candidates": [{**found, "format": "mpo"}, lost, found]}
    assert "to these too: `mpo` (wiki 14.00 to 16.00)." in quality_page.summary(result | others)
    assert "instead of" not in quality_page.summary(result | {"headline": {**found, "won": False}})
    rows = {Cell("headline_panels", 0.8, 0, "").name: {**row(1.5), "note": "older labels"}}
    page = quality_page.section(result | {"rows": rows, "headline_candidates": [found]})
    assert r"| panels\* | 0.8 |" in page


def test_a_run_with_the_flags_of_a_cell_is_a_run_of_it():
    products = [cell for cell in all_cells() if cell.flags is not None and cell.seed == 1]
    assert {cell.keep for cell in products} >= {0.8, 1.0}
    for cell in products:
        words = ["--keep", f"{cell.keep:g}", *cell.flags, "--seed", "1"]
        config = tyro.cli(MainConfig, args=words, config=(tyro.conf.OmitArgPrefixes,))
        settings = to_json(config.resolved())
        wanted, found = quality.wanted_and_found(cell, settings)
        assert found == wanted
        assert quality.wanted_and_found(cell, settings | {"seed": 0})[1] != wanted
