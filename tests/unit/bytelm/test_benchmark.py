"""The cells of the byte-model benchmark, its conclusions from planted rows, and its page."""

from __future__ import annotations

import argparse
import gzip
import json
import math
import subprocess

import pytest
import torch

from benchmarks import bytelm, bytelm_page, bytelm_rows, results_page
from benchmarks.bytelm_cells import (
    BATCH,
    BEST,
    BEST_SETTINGS,
    CONTEXT,
    FLAGS,
    LAW_MINUTES,
    PARTS,
    PLAIN,
    SEEDS,
    Cell,
    all_cells,
    twin_of,
)
from benchmarks.bytelm_summary import (
    compared,
    effective_bytes,
    fit_law,
    predict,
    scaling,
    summary,
)
from benchmarks.bytelm_texts import Corpus, compressors, unpack
from benchmarks.peers.byte_loop import LoopModel, train
from qll.bytelm.settings import LMTrainConfig
from qll.bytelm.sizing import count_parameters


def test_cells_have_their_own_names_and_cover_every_part_on_every_seed():
    cells = all_cells()
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    assert {cell.kind for cell in cells} == set(bytelm_rows.KINDS)
    for label in (PLAIN, BEST, *PARTS, *FLAGS):
        seeds = {c.seed for c in cells if c.table == "ablation" and c.label == label}
        assert seeds == set(SEEDS)
    assert {"long/plain_twin/seed0", "long/best/seed0"} <= set(names)


def test_all_cells_of_an_ablation_read_the_same_bytes_whatever_the_machine_does():
    steps = {cell.steps(6000) for cell in all_cells() if cell.table == "ablation"}
    assert steps == {703}
    budget = 703 * BATCH * CONTEXT
    assert abs(budget / (8 * 60 * 6000) - 1) < 0.01


@pytest.mark.parametrize(
    "part", ["phase rotation", "dynamic width", "dynamic rank", "learned positions", "MPO linears"]
)
def test_parts_are_compared_at_equal_parameters(part):
    plain = count_parameters(bytelm_rows.config_of(()))
    for settings in PARTS[part]:
        if settings is None:
            continue
        width = bytelm_rows.matched_width(settings)
        config = bytelm_rows.config_of((*settings, f"d_ff={width}"))
        assert count_parameters(config) == pytest.approx(plain, rel=0.005)


def test_every_cell_is_a_command_line_of_the_product(tmp_path, monkeypatch):
    from qll.cli import VERBS, _parse

    monkeypatch.setattr(bytelm_rows, "matched_width", lambda settings: 640)
    corpus = Corpus(tmp_path / "training", tmp_path / "held_out", None)
    for cell in all_cells():
        if cell.kind == "train" and cell.seed == 0 and cell.table != "scaling":
            words = bytelm_rows.train_words(cell, corpus, 6000)
            assert words[:2] == ["lm", "train"]
            config = _parse(VERBS["lm train"], "lm train", words[2:])
            assert isinstance(config, LMTrainConfig)
            assert config.resolved().learning.max_steps == cell.steps(6000)
            model = config.model_config()
            assert model.context == CONTEXT
            if cell.label == BEST:
                assert model.mixer == bytelm_rows.config_of(BEST_SETTINGS).mixer


def rows_of(label: str, bits: list[float], table: str = "ablation") -> dict:
    return {
        Cell("train", table, label, seed).name: {"bits_per_byte": value, "label": label}
        for seed, value in enumerate(bits)
    }


def long_row(bits: float) -> dict:
    rank = {"effective_rank": 4.0, "full_rank": 8}
    return {
        "bits_per_byte": bits,
        "transfer_bits_per_byte": 2.5,
        "parameters": 3_000_000,
        "bytes": 21_600_000,
        "needle_recall": {"64": 0.5},
        "multi_fact_recall": {"4": 0.25},
        "phases": [{"coherence": 0.3, "random": 0.03}],
        "visibility": -0.1,
        "state_ranks": [rank],
        "generation": {"rep8": 0.1, "distinct2": 0.9},
        "samples": {"a": "b"},
        "config": {},
    }


@pytest.fixture
def result():
    rows = {
        **rows_of(PLAIN, [2.00, 2.02, 2.04]),
        **rows_of("phase rotation", [1.95, 1.97, 1.99]),
        **rows_of(twin_of("phase rotation"), [1.95, 1.98, 1.985]),
        **rows_of("brickwall gates", [2.10, 2.12, 2.14]),
        **rows_of("global memory", [1.90, 2.10, 1.98]),
        **rows_of("dynamic width", [1.50]),
        "long/plain_twin/seed0": long_row(1.49),
        "baselines/compressors/seed0": {"bits_per_byte": {"bz2": 2.06}},
        "speed/throughput/seed0": {
            "ratio": 1.4,
            "rounds": [{"ours": 7000.0, "loop": 5000.0, "ratio": 1.4, "load_average": 1.0}],
        },
        "generation/interference_recurrent/seed0": {
            "lengths": {
                str(n): {"state_bytes": 10**6, "milliseconds_per_byte": 2.0}
                for n in (256, 1024, 4096)
            }
        },
    }
    texts = {"documents": 13, "bytes": 1000, "sha256": "0" * 64}
    return {
        "machine": {"cpu": "a processor", "cores": 2, "platform": "x"},
        "texts": {"training": texts, "held_out": texts},
        "budget": {
            "bytes_per_second": 6000,
            "minutes": 8.0,
            "bytes": 2_879_488,
            "long_minutes": 60.0,
            "long_bytes": 21_598_208,
        },
        **summary(rows),
        "rows": rows,
    }


def test_a_part_is_credited_only_beyond_the_noise_of_the_seeds(result):
    found = {part: entry["verdict"] for part, entry in result["ablation"].items()}
    assert found == {
        "phase rotation": "credited",
        "brickwall gates": "harmful",
        "global memory": "neutral",
        "dynamic width": "too few seeds",
    }
    rotation = result["ablation"]["phase rotation"]
    assert rotation["gain"] == pytest.approx(0.05)
    assert rotation["against_twin"]["verdict"] == "neutral"
    # Student's t at 2 degrees of freedom: 2.92
    entry = compared({0: 1.0, 1: 1.0, 2: 1.0}, {0: 0.9, 1: 0.8, 2: 0.7})
    assert entry["noise"] == pytest.approx(2.920 * 0.1 / math.sqrt(3), rel=1e-3)
    assert compared({0: 1.0, 1: 1.1}, {0: 0.992, 1: 1.092})["verdict"] == "neutral"


def test_the_keys_that_others_read_are_there(result):
    assert result["plain_twin"]["bits_per_byte"] == 1.49
    assert "best" not in result
    assert result["seeds"] == [0, 1, 2]
    best = summary(result["rows"] | {"long/best/seed0": long_row(1.4)})["best"]
    assert best["bits_per_byte"] == 1.4
    json.dumps(result, allow_nan=False)


def test_the_page_says_what_is_there_and_what_is_not(result):
    text = bytelm_page.section(result)
    lines = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| ")}
    assert "1.9700 | +0.0500 ± 0.0000 | credited" in lines["| phase rotation"]
    assert lines["| phase rotation"].endswith("neutral |")
    assert "harmful" in lines["| brickwall gates"]
    assert "1 of 3 seeds" in lines["| dynamic width"]
    assert bytelm_page.NOT_RUN in lines["| complex stream"]
    assert "1.4900" in lines["| plain twin (wanted: at most 1.50)"]
    assert bytelm_page.NOT_RUN in lines["| best combination (wanted: at most 1.45)"]
    assert "1.00 MB, 2.00 ms" in lines["| interference, recurrent"]
    assert "1.40 times" in text
    empty = result | summary({}) | {"rows": {}}
    assert bytelm_page.NOT_RUN in bytelm_page.section(empty)


def test_the_law_is_recovered_from_what_it_predicts():
    law = {"floor": 0.9, "a": 0.4, "alpha": 0.3, "b": 0.7, "beta": 0.5}
    points = [
        {"parameters": n, "bytes": d, "bits_per_byte": predict(law, n, d)}
        for n in (1e5, 3e5, 1e6, 3e6, 1e7)
        for d in (7e5, 1.5e6, 3e6, 1e7)
    ]
    values = [[point[key] for point in points] for key in ("parameters", "bytes", "bits_per_byte")]
    found = fit_law(*values)
    assert found["rms_log_error"] < 1e-4
    assert predict(found, 9e7, 1e8) == pytest.approx(predict(law, 9e7, 1e8), rel=0.01)
    preset = scaling(points[:9])["preset"]
    assert preset["run"] is False
    assert 8e7 < preset["parameters"] < 9.5e7
    low, high = preset["predicted_range"]
    assert low <= high
    assert effective_bytes(1.0, 1e9) == pytest.approx(1 + 15.39)


def test_the_law_is_fitted_to_runs_past_their_start_and_held_against_a_longer_one():
    law = {"floor": 0.9, "a": 0.4, "alpha": 0.3, "b": 0.7, "beta": 0.5}
    rows = {"long/plain_twin/seed0": long_row(1.31) | {"parameters": 3_000_000, "bytes": 2e7}}
    for cell in all_cells():
        if cell.table == "scaling":
            size, read = 10.0 * int(cell.label.split()[0]) ** 2, cell.minutes * 360_000
            bits = predict(law, size, read) + (2.0 if cell.minutes < LAW_MINUTES else 0.0)
            rows[cell.name] = {"parameters": size, "bytes": read, "bits_per_byte": bits}
    found = summary(rows)["scaling"]
    assert found["runs"] == sum(cell.minutes >= LAW_MINUTES for cell in _scaling_cells())
    assert found["law"]["rms_log_error"] < 1e-4
    check = found["check"]
    assert check["bits_per_byte"] == 1.31
    assert check["runs_with_shorter_ones"] == len(_scaling_cells()) > found["runs"]
    assert check["predicted"] == pytest.approx(predict(law, 3e6, 2e7), rel=0.01)
    assert abs(check["predicted_with_shorter_ones"] - check["predicted"]) > 0.003
    words = bytelm_page.scaling_words(found)
    assert f"says {check['predicted']:.3f} bits per byte; measured were 1.310" in words
    table = bytelm_page.scaling_table(rows)
    assert table.count("not run") == 2  # 32 minutes of the two largest
    assert "check" not in summary({k: v for k, v in rows.items() if "long" not in k})["scaling"]


def _scaling_cells():
    return [cell for cell in all_cells() if cell.table == "scaling"]


def test_the_corpus_is_unpacked_once_in_name_order(tmp_path):
    root = tmp_path / "deb"
    place = root / "usr/share/doc/anarchism/markdown"
    place.mkdir(parents=True)
    for number in range(12):
        text = f"document {number} ".encode() * 50
        (place / f"sec{number:02d}.md.gz").write_bytes(gzip.compress(text))
    (root / "DEBIAN").mkdir()
    control = "Package: anarchism\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b>\n"
    (root / "DEBIAN/control").write_text(control + "Description: texts\n")
    package = tmp_path / "anarchism_1_all.deb"
    subprocess.run(["dpkg-deb", "-b", str(root), str(package)], check=True, capture_output=True)
    corpus = unpack(package, tmp_path / "cache")
    assert [path.name for path in sorted(corpus.held_out.iterdir())] == ["sec00.md", "sec10.md"]
    assert corpus.facts()["training"]["documents"] == 10
    assert corpus.sample(20) == [b"document 0", b"document 1"]
    sizes = compressors(corpus)
    assert sizes["xz after training text"] < sizes["xz"]
    package.unlink()
    assert unpack(package, tmp_path / "cache").facts() == corpus.facts()


def test_a_cell_that_is_there_is_skipped_and_a_failure_is_shown(tmp_path, monkeypatch, capsys):
    arguments = argparse.Namespace(
        result=tmp_path / "bytelm.json",
        minutes=8.0,
        long_minutes=60.0,
        rate=6000.0,
        again=False,
        cache=tmp_path,
    )
    corpus = Corpus(tmp_path, tmp_path, None)
    cell = Cell("compressors", "baselines", "compressors")
    calls = []

    def compress(*_):
        calls.append(1)
        return {"bits_per_byte": {"bz2": 2.0}}

    monkeypatch.setitem(bytelm.KINDS, "compressors", compress)
    assert bytelm.attempt(cell, corpus, arguments)
    assert bytelm.attempt(cell, corpus, arguments)
    assert len(calls) == 1
    row = bytelm.read(arguments.result)["rows"][cell.name]
    assert "--rate 6000" in row["command"]
    arguments.rate = 9000.0  # another budget is another cell
    assert bytelm.attempt(cell, corpus, arguments)
    assert len(calls) == 2
    monkeypatch.setitem(bytelm.KINDS, "compressors", lambda *_: 1 / 0)
    arguments.again = True
    assert not bytelm.attempt(cell, corpus, arguments)
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_the_loop_learns():
    torch.manual_seed(0)
    model = LoopModel(32, 1, 2, context=16)
    text = torch.frombuffer(bytearray(b"abcd" * 100), dtype=torch.uint8)
    arguments = argparse.Namespace(lr=1e-2, seed=0, context=16, steps=40, batch=4)
    assert train(model, text, arguments) > 0
    logits = model(torch.tensor([list(b"abcdabcdabcd")]))
    assert bytes(logits[0, 4:].argmax(-1).tolist()) == b"bcdabcda"
    changed = model(torch.tensor([list(b"abcdabcdabcx")]))
    assert torch.equal(logits[:, :-1], changed[:, :-1])


def test_a_committed_result_says_what_it_depends_on():
    for path in results_page.RESULTS.glob("bytelm.json"):
        found = json.loads(path.read_text())
        assert {"machine", "versions", "texts", "budget", "seeds", "ablation"} <= set(found)
        for row in found["rows"].values():
            assert {"command", "seed", "git"} <= set(row)
