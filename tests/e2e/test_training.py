"""The main job with training: what it adds, that it resumes, that bits follow it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from qll.cli import main
from qll.config import MainConfig
from qll.errors import UsageError
from qll.runfolder import Run
from qll.runmodel import distilling_fits
from qll.train import CHECKPOINT_NAME
from tests.e2e.conftest import QUICK


def run(tiny_checkpoint, out, *words: str) -> dict:
    flags = ["--llama_dir", str(tiny_checkpoint), *QUICK, "--out", str(out), "--keep", "0.5"]
    flags += ["--refine_tokens", "4096", "--train_context", "64", *words]
    assert main(flags) == 0
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def best(tiny_checkpoint, tmp_path_factory):
    return run(
        tiny_checkpoint,
        tmp_path_factory.mktemp("best") / "out",
        *("--effort", "best", "--heal_tokens", "4096"),
    )


def test_best_refines_and_heals_and_says_so(best):
    training = best["compression"]["training"]
    assert [block["block"] for block in training["refine"]] == [0, 1]
    assert training["heal"]["tokens"] == 4096
    assert {"refine", "heal", "write"} <= {*best["cost"]["seconds"]}
    # the plan that --effort best stands for
    assert best["provenance"]["settings"]["convert"]["singles"] == "panels"


def test_it_is_nearer_to_the_dense_model_than_the_closed_form(best, tiny_checkpoint, tmp_path):
    fast = run(tiny_checkpoint, tmp_path / "fast", "--effort", "fast", "--singles", "panels")
    assert fast["compression"]["training"] == {}
    for name, text in fast["quality"]["texts"].items():
        assert best["quality"]["texts"][name]["kl"] < text["kl"]
    assert fast["compression"]["keep"] == best["compression"]["keep"]


def test_a_text_too_short_to_train_on_is_refused_before_anything_is_measured(
    tiny_checkpoint, tmp_path, capsys
):
    text = tmp_path / "short.txt"
    text.write_text("A few words, and a few more of them.\n" * 8)
    flags = ["--llama_dir", str(tiny_checkpoint), "--calib_text", str(text)]
    flags += ["--calib_tokens", "64", "--context", "16", "--train_context", "96"]
    assert main([*flags, "--out", str(tmp_path / "out")]) == 3
    error = capsys.readouterr().err
    assert "too little text to refine on" in error
    assert "[calibrate]" not in error
    assert main(["calibrate", *flags, "--out", str(tmp_path / "moments")]) == 0


def test_an_attempt_that_was_killed_is_named_in_the_warnings(tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    flags = ["--llama_dir", str(tiny_checkpoint), *QUICK, "--out", str(out), "--effort", "fast"]
    assert main(["plan", *flags]) == 0
    with open(out / "events.jsonl", "a") as events:
        events.write(json.dumps({"event": "started", "stage": "convert"}) + "\n")
    assert main(flags) == 0
    warnings = json.loads((out / "report.json").read_text())["warnings"]
    assert [line for line in warnings if "killed during convert" in line]


def test_bits_are_packed_from_what_was_trained(best, tiny_checkpoint, tmp_path):
    packed = run(
        tiny_checkpoint,
        tmp_path / "out",
        *("--effort", "best", "--heal_tokens", "4096", "--bits", "8", "--tune_tokens", "0"),
    )
    assert packed["compression"]["bytes_ratio"] < 0.6 * best["compression"]["bytes_ratio"] + 0.4
    for name, text in best["quality"]["texts"].items():
        found = packed["quality"]["texts"][name]["converted"]["ppl"]
        assert found == pytest.approx(text["converted"]["ppl"], rel=0.01)


def test_tuned_scales_are_nearer_to_the_dense_model_with_the_same_codes(tiny_checkpoint, tmp_path):
    flags = ("--effort", "fast", "--bits", "3")
    rounded = run(tiny_checkpoint, tmp_path / "rounded", *flags)
    tuned = run(tiny_checkpoint, tmp_path / "tuned", *flags, "--tune_tokens", "16384")
    facts = tuned["compression"]["training"]["tune"]
    assert facts["kept"]
    assert facts["kl_after"] < facts["kl_before"]
    for name, text in rounded["quality"]["texts"].items():
        assert tuned["quality"]["texts"][name]["kl"] < text["kl"]
    first, second = (
        load_file(tmp_path / name / "model" / "model-00001-of-00003.safetensors")
        for name in ("rounded", "tuned")
    )
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        same = torch.equal(tensor, second[name])
        assert same == (not name.endswith((".scales", "norm.weight"))), name
    errors = [
        {row["name"]: row["rel_error"] for row in report["compression"]["per_matrix"]}
        for report in (rounded, tuned)
    ]
    assert errors[0] != errors[1]


def test_without_memory_healing_is_left_out_and_said_or_refused(
    tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("qll.runmodel.free_bytes", lambda device: 1000)
    words = [*QUICK, "--effort", "best"]
    words = ["--llama_dir", str(tiny_checkpoint), *words, "--refine_tokens", "1024"]
    words += ["--train_context", "64", "--keep", "0.5"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "heal" not in report["compression"]["training"]
    assert [line for line in report["warnings"] if "--heal_tokens) was left out" in line]
    assert main([*words, "--heal_tokens", "1024", "--out", str(tmp_path / "asked")]) == 2
    assert "too little memory to distil" in capsys.readouterr().err


def test_a_distillation_that_was_begun_is_not_left_out(tmp_path, monkeypatch):
    """Resumed on a machine with less free memory a run would otherwise end with another model."""
    monkeypatch.setattr("qll.runmodel.distilling_bytes", lambda state: 2000)
    monkeypatch.setattr("qll.runmodel.free_bytes", lambda device: 1000)
    state = object.__new__(Run)
    state.config, state.device = MainConfig(), torch.device("cpu")
    assert not distilling_fits(state, "--heal_tokens", tmp_path)
    (tmp_path / CHECKPOINT_NAME).write_bytes(b"")
    with pytest.raises(UsageError, match=r"go on with .*free memory and run the same"):
        distilling_fits(state, "--heal_tokens", tmp_path)
    monkeypatch.setattr("qll.runmodel.free_bytes", lambda device: 3000)
    assert distilling_fits(state, "--heal_tokens", tmp_path)
