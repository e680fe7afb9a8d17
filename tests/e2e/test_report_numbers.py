"""What the report of a whole run says about entropies and cost: every matrix, every cut."""

from __future__ import annotations

import json
import math

import pytest

from qll.cli import main
from tests.e2e.conftest import QUICK

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FACTS = ("nats", "nats_converted", "nats_random", "max_nats", "renyi2", "participation_ratio")


@pytest.fixture(scope="module")
def run(tiny_checkpoint, tmp_path_factory):
    """The folder of a finished run in which every linear of the blocks is a three-site MPO."""
    out = tmp_path_factory.mktemp("numbers") / "out"
    flags = ["--llama_dir", str(tiny_checkpoint), "--out", str(out), *QUICK]
    assert main([*flags, "--format", "mpo", "--sites", "3", "--keep", "0.5"]) == 0
    return out


@pytest.fixture(scope="module")
def report(run):
    return json.loads((run / "report.json").read_text())


def test_every_matrix_has_every_cut_and_every_fact(report):
    cuts: dict[str, set] = {}
    for entry in report["entropy"]["per_matrix"]:
        assert {"name", "cut", *FACTS} <= entry.keys()
        cuts.setdefault(entry["name"], set()).add(entry["cut"])
    for block in (0, 1):
        for linear in LINEARS:
            name = next(n for n in cuts if f".{block}." in n and n.endswith(linear))
            assert cuts[name] == {"channel", "site1", "site2"}, name


def test_a_random_model_lies_on_the_random_line(report):
    """The tiny Llama is Gaussian noise, so its entropies are those of the baseline."""
    for entry in report["entropy"]["per_matrix"]:
        assert 0 <= entry["nats"] <= entry["max_nats"] + 1e-9
        assert 0 < entry["nats_random"] < entry["max_nats"]
        assert entry["nats"] == pytest.approx(entry["nats_random"], abs=0.06), entry
        assert entry["renyi2"] <= entry["nats"] + 1e-9
        assert entry["participation_ratio"] >= 1


def test_truncation_shows_as_lower_entropy_at_the_cuts_that_were_truncated(report):
    """The cuts of an MPO are its bonds: a bond of rank chi carries at most log(chi)."""
    ranks = {row["name"]: row["ranks"] for row in report["compression"]["per_matrix"]}
    truncated = set()
    for entry in report["entropy"]["per_matrix"]:
        if entry["cut"] == "channel" or ".layers." not in entry["name"]:
            continue
        most = math.log(ranks[entry["name"]][int(entry["cut"].removeprefix("site")) - 1])
        assert entry["nats_converted"] <= most + 1e-6, entry
        if most < entry["max_nats"] - 1e-9:
            assert entry["nats_converted"] < entry["nats"], entry
            truncated.add(entry["name"])
    assert len(truncated) == 2 * len(LINEARS)


def test_cost_is_measured_for_both_models(report):
    cost = report["cost"]
    assert cost["peak_rss_bytes"] > 1e8
    assert {"calibrate", "plan", "convert", "evaluate", "lens"} <= cost["seconds"].keys()
    assert all(seconds >= 0 for seconds in cost["seconds"].values())
    for key in ("decode_tokens_per_second", "prefill_tokens_per_second"):
        assert cost[key]["dense"] > 0
        assert cost[key]["converted"] > 0


def test_every_matrix_has_its_line_in_the_events(run, report):
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    text = json.dumps(lines)
    for row in report["compression"]["per_matrix"]:
        assert row["name"] in text
        facts = {"format", "ranks", "params", "params_dense", "rel_error", "metric_error"}
        assert facts <= row.keys()
        assert row["format"] != "mpo" or row["rel_error"] > 0


BROKEN = {
    "run.json": ["", "\x00\x01", "\xff", "{}", "[]", '{"settings": 7}'],
    "plan.json": ["", "{}", "[]", '{"entries": [{}]}'],
    "report.json": ["", "{", "[]", "{}"],
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_of_the_run_is_named(name, tiny_checkpoint, tmp_path, capsys):
    flags = ["--llama_dir", str(tiny_checkpoint), "--out", str(tmp_path / "out"), *QUICK]
    flags += ["--metric", "plain"]
    if name == "report.json":
        (tmp_path / "out").mkdir()
    else:
        assert main(["plan", *flags]) == 0
    for text in BROKEN[name]:
        (tmp_path / "out" / name).write_text(text, "latin-1")
        capsys.readouterr()
        verb = ["report", "--run", str(tmp_path / "out")] if name == "report.json" else None
        assert main(verb or ["convert", *flags]) in (2, 3)
        assert name in capsys.readouterr().err
