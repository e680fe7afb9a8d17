"""The budget through the command line: measured losses in plan and report, plans from elsewhere."""

from __future__ import annotations

import json

import pytest

from qll.cli import main
from tests.e2e.conftest import QUICK

FAST = ("--effort", "fast", "--keep", "0.6", "--sharing", "none", *QUICK)


@pytest.fixture(scope="module")
def measured(tiny_checkpoint, tmp_path_factory):
    """The folder and flags of a finished run with measured losses."""
    out = tmp_path_factory.mktemp("measured") / "out"
    flags = ["--llama_dir", str(tiny_checkpoint), "--losses", "measured", *FAST]
    assert main([*flags, "--out", str(out)]) == 0
    return out, flags


def test_measured_losses_are_in_plan_and_report(measured, capsys):
    out, _ = measured
    plan = json.loads((out / "plan.json").read_text())
    report = json.loads((out / "report.json").read_text())
    assert plan["measured"] == report["compression"]["measured"] != []
    assert {line["first"] for line in plan["measured"]} == {0, 1}
    assert "Predicted and measured losses" in (out / "report.html").read_text()
    assert plan["block_params"] <= plan["budget"]
    assert main(["report", "--run", str(out)]) == 0
    assert "measured KL" in capsys.readouterr().out


def test_a_plan_from_another_folder_is_followed(measured, tmp_path, capsys):
    out, flags = measured
    assert main(["plan", *flags, "--out", str(tmp_path / "plan")]) == 0
    assert "predicted loss" in capsys.readouterr().out
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert plan["entries"] == json.loads((out / "plan.json").read_text())["entries"]
    entry = next(e for e in plan["entries"] if e["format"] == "lowrank")
    entry["spec"]["ranks"] = [5]
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps(plan))
    again = [*flags, "--plan", str(mine), "--out", str(tmp_path / "again")]
    assert main(["convert", *again]) == 0
    config = json.loads((tmp_path / "again" / "model" / "config.json").read_text())
    assert config["quantization_config"]["modules"][entry["members"][0]]["ranks"] == [5]


def test_a_plan_for_another_budget_or_none_at_all_is_refused(measured, tmp_path, capsys):
    out, flags = measured
    words = [*flags, "--plan", str(out / "plan.json"), "--out", str(tmp_path / "out")]
    assert main(["plan", *words, "--keep", "0.7"]) == 2
    assert "the plan was made for another --keep" in capsys.readouterr().err
    words[words.index("--plan") + 1] = str(tmp_path / "none.json")
    assert main(["plan", *words]) == 2
    assert "--plan: no such file" in capsys.readouterr().err
