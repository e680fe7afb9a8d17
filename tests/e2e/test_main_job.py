"""The main job through the command line, on the tiny Llama: every format, resume, bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from qll.cli import main
from tests.e2e.conftest import QUICK, ROOT, run_qll

FORMATS = (
    "lowrank",
    "mpo",
    "tucker",
    "tree",
    "kron",
    "panels",
    "sparse",
    "joint_tree",
    "joint_tucker",
)


@pytest.fixture(scope="module")
def finished(tiny_checkpoint, tmp_path_factory):
    """A finished default run and what it printed."""
    out = tmp_path_factory.mktemp("run") / "out"
    result = run_qll("--llama_dir", tiny_checkpoint, "--out", out, *QUICK)
    assert result.returncode == 0, result.stderr
    return out, result


def test_main_job_leaves_what_it_promises(finished):
    out, result = finished
    names = {path.name for path in out.iterdir()}
    promised = {"report.json", "report.html", "run.json", "events.jsonl", "plan.json", "model"}
    assert promised <= names
    assert "work" not in names
    assert str(out / "report.html") in result.stdout
    assert "Traceback" not in result.stderr


def test_report_counts_are_those_of_the_files(finished):
    out, _ = finished
    report = json.loads((out / "report.json").read_text())
    compression = report["compression"]
    assert compression["keep"] <= 0.8
    assert compression["keep"] > 0.75
    assert compression["bytes"]["converted"] < compression["bytes"]["dense"]
    stored = sum(path.stat().st_size for path in (out / "model").glob("*.safetensors"))
    assert compression["bytes"]["converted"] == pytest.approx(stored, rel=0.2)
    assert len(compression["per_matrix"]) == 2 * 7 + 2
    assert len(report["quality"]["texts"]) == 2
    for text in report["quality"]["texts"].values():
        assert text["kl"] > 0
        assert 0 <= text["top1_agreement"] <= 1
        assert text["dense"]["ppl"] > 1
        assert max(text["leak"].values()) < 1e-4
    assert report["provenance"]["settings"]["seed"] == 0


def test_second_run_says_it_is_done(finished, tiny_checkpoint):
    out, _ = finished
    before = (out / "report.json").stat().st_mtime_ns
    result = run_qll("--llama_dir", tiny_checkpoint, "--out", out, *QUICK)
    assert result.returncode == 0
    assert "nothing to do" in result.stderr
    assert (out / "report.json").stat().st_mtime_ns == before


def test_other_settings_do_not_touch_the_run(finished, tiny_checkpoint):
    out, _ = finished
    result = run_qll("--llama_dir", tiny_checkpoint, "--out", out, "--keep", "0.5", *QUICK)
    assert result.returncode == 2
    assert "belongs to another run" in result.stderr
    assert "convert.keep=0.8" in result.stderr


def test_verify_generate_eval_export_report(finished, tiny_checkpoint, tmp_path, capsys):
    out, _ = finished
    model = str(out / "model")
    assert printed(capsys, "verify", "--model", model).endswith("match the manifest\n")
    words = ("--prompt", "The for statement", "--max_new_tokens", "8")
    assert printed(capsys, "generate", "--model", model, *words).strip()
    scored = printed(
        capsys, "eval", "--model", model, "--llama_dir", str(tiny_checkpoint), *QUICK[2:6]
    )
    report = json.loads((out / "report.json").read_text())
    of_report = report["quality"]["texts"]["python_topics_evaluation"]
    assert json.loads(scored)["kl"] == pytest.approx(of_report["kl"], rel=1e-4)
    for layout in ("dense", "two_linear"):
        target = tmp_path / layout
        printed(capsys, "export", "--model", model, "--out", str(target), "--layout", layout)
        assert (target / "config.json").is_file()
    assert str(out / "report.html") in printed(capsys, "report", "--run", str(out))
    assert "connect" in printed(capsys, "inspect", "--llama_dir", str(tiny_checkpoint), "--json")


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_runs_to_the_end(format, tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    flags = ("--format", format, "--keep", "0.7", "--keep_embeddings", "0.8", "--norms", "fold")
    assert main(["--llama_dir", str(tiny_checkpoint), "--out", str(out), *flags, *QUICK]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["compression"]["keep"] <= 0.7
    used = {row["format"] for row in report["compression"]["per_matrix"]}
    assert format in used
    assert "dense" not in used


@pytest.mark.parametrize("format", ["auto", "mpo"])
def test_bits_are_counted_verified_and_exported(format, tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ("--format", format, "--keep", "0.8", "--bits", "4", "--norms", "fold")
    assert main(["--llama_dir", str(tiny_checkpoint), "--out", str(out), *flags, *QUICK]) == 0
    compression = json.loads((out / "report.json").read_text())["compression"]
    assert 0.7 < compression["keep"] <= 0.8
    # 4 bits and a scale of 16 for 32 or fewer of them, pivots of 32
    assert 4.5 * 0.7 < compression["block_bits_per_weight"] < 8 * 0.8
    assert compression["bytes_ratio"] < compression["params_ratio"]
    assert main(["verify", "--model", str(out / "model")]) == 0
    plain = ["export", "--model", str(out / "model"), "--out", str(tmp_path / "plain")]
    assert main(plain) == 0
    assert main(["--llama_dir", str(tiny_checkpoint), "--out", str(out), *flags, *QUICK]) == 0
    assert "complete" in capsys.readouterr().err


def test_a_budget_of_bits_is_kept_in_the_files(tiny_checkpoint, tmp_path, capsys):
    import torch
    from transformers import AutoModelForCausalLM

    import qll

    out, plain = tmp_path / "out", tmp_path / "plain"
    flags = ["--llama_dir", str(tiny_checkpoint), "--bits_per_weight", "3.5", "--effort", "best"]
    flags += ["--heal_tokens", "0", "--tune_tokens", "1024", "--train_context", "128", *QUICK]
    assert main([*flags, "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    compression = report["compression"]
    assert 3.2 < compression["block_bits_per_weight"] <= 3.5
    assert len({row["bits"] for row in compression["per_matrix"] if "bits" in row}) > 1
    assert compression["training"]["tune"]["tokens"] > 0
    assert main(["export", "--model", str(out / "model"), "--out", str(plain)]) == 0
    ids = torch.arange(40)[None] % 512
    with torch.no_grad():
        packed = qll.load(out / "model")(ids).logits
        dense = AutoModelForCausalLM.from_pretrained(plain).eval()(ids).logits
    assert float((packed - dense).abs().max()) < 1e-4
    assert main(["plan", *flags, "--out", str(tmp_path / "plan")]) == 0
    assert "bits of" in capsys.readouterr().out
    page = (out / "report.html").read_text()
    assert "bits per weight (3.5 asked for)" in page
    assert "Stored bits" in page
    assert main(["report", "--run", str(out)]) == 0
    assert "bits per weight (3.5 asked for)" in capsys.readouterr().out
    assert main([*flags, "--out", str(out), "--dry_run"]) == 0
    assert "--bits_per_weight 3.5" in capsys.readouterr().out
    words = ["--plan", str(out / "plan.json"), "--out", str(tmp_path / "other")]
    assert main(["plan", *flags, *words, "--bits_per_weight", "4.0"]) == 2
    assert "the plan was made for another --bits_per_weight" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["auto", "lowrank", "mpo"])
def test_keep_one_reproduces_the_dense_logits(format, tiny_checkpoint, tmp_path):
    import torch

    import qll

    out = tmp_path / "out"
    flags = ("--llama_dir", str(tiny_checkpoint), "--out", str(out), "--keep", "1.0")
    assert main(["convert", *flags, "--format", format, *QUICK]) == 0
    from transformers import LlamaForCausalLM

    ids = torch.arange(40)[None] % 512
    dense = LlamaForCausalLM.from_pretrained(tiny_checkpoint).eval()
    converted = qll.load(out / "model")
    with torch.no_grad():
        difference = (dense(ids).logits - converted(ids).logits).abs().max()
    assert float(difference) < 1e-4


def test_plan_can_be_edited_and_passed_back(tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    flags = ["--llama_dir", str(tiny_checkpoint), "--out", str(out), "--format", "lowrank", *QUICK]
    assert main(["plan", *flags]) == 0
    plan = json.loads((out / "plan.json").read_text())
    plan["entries"][0]["spec"]["ranks"] = [3]
    (out / "plan.json").write_text(json.dumps(plan))
    assert main(["convert", *flags]) == 0
    config = json.loads((out / "model" / "config.json").read_text())
    first = plan["entries"][0]["members"][0]
    assert config["quantization_config"]["modules"][first]["ranks"] == [3]


def test_a_plan_edited_between_runs_is_converted_again(tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--llama_dir", str(tiny_checkpoint), "--out", str(out), "--format", "lowrank"]
    flags += ["--metric", "plain", *QUICK]
    assert main(flags) == 0
    before = (out / "model" / "config.json").read_text()
    plan = json.loads((out / "plan.json").read_text())
    plan["entries"][0]["spec"]["ranks"] = [5]
    (out / "plan.json").write_text(json.dumps(plan))
    assert main(flags) == 0
    assert "edited" in capsys.readouterr().err
    assert (out / "model" / "config.json").read_text() != before
    rows = json.loads((out / "report.json").read_text())["compression"]["per_matrix"]
    assert rows[0]["ranks"] == [5]


MISTAKES = {
    "negative rank": lambda entry: entry["spec"].update(ranks=[-5]),
    "huge rank": lambda entry: entry["spec"].update(ranks=[10**6]),
    "two ranks": lambda entry: entry["spec"].update(ranks=[2, 2]),
    "a word": lambda entry: entry["spec"].update(ranks=["a"]),
    "unknown format": lambda entry: entry["spec"].update(format="peps"),
    "other shape": lambda entry: entry["spec"].update(shape=[3, 3], ranks=[1]),
    "unknown matrix": lambda entry: entry.update(members=["model.layers.9.self_attn.q_proj"]),
    "no spec": lambda entry: entry.pop("spec"),
}


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_mistakes_in_an_edited_plan_are_named(mistake, tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--llama_dir", str(tiny_checkpoint), "--out", str(out), "--format", "lowrank"]
    flags += ["--metric", "plain", *QUICK]
    assert main(["plan", *flags]) == 0
    plan = json.loads((out / "plan.json").read_text())
    MISTAKES[mistake](plan["entries"][0])
    (out / "plan.json").write_text(json.dumps(plan))
    capsys.readouterr()
    assert main(["convert", *flags]) == 3
    error = capsys.readouterr().err
    assert "plan.json" in error
    assert "Traceback" not in error
    assert not (out / "model").exists()


def test_dry_run_writes_nothing(tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--llama_dir", str(tiny_checkpoint), "--out", str(out), "--dry_run", *QUICK]
    assert main(flags) == 0
    assert "parameters" in capsys.readouterr().out
    assert not out.exists()


@pytest.mark.slow
def test_killed_at_any_point_it_resumes_to_the_same_bytes(tiny_checkpoint, tmp_path):
    flags = ["--llama_dir", str(tiny_checkpoint), *QUICK]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    started = time.monotonic()
    assert run_qll("convert", *flags, "--out", whole).returncode == 0
    span = time.monotonic() - started
    for share in (0.55, 0.7, 0.8, 0.9, 0.97):
        command = [sys.executable, str(ROOT / "main.py"), "convert", *flags, "--out", str(killed)]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "2"},  # as in run_qll: last digits depend on it
        )
        try:
            process.communicate(timeout=span * share)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    assert run_qll("convert", *flags, "--out", killed).returncode == 0
    assert tree_bytes(whole / "model") == tree_bytes(killed / "model")
    assert not list(killed.rglob("*.qll-tmp*"))


def test_interrupt_is_resumable(tiny_checkpoint, tmp_path):
    flags = ["convert", "--llama_dir", str(tiny_checkpoint), *QUICK, "--out", str(tmp_path / "o")]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background of a shell is told to ignore it, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and not (tmp_path / "o" / "run.json").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 4, messages
    assert "resume" in messages
    assert run_qll(*flags).returncode == 0


def test_a_copied_model_with_one_flipped_bit_is_refused(finished, tmp_path):
    out, _ = finished
    copy = shutil.copytree(out / "model", tmp_path / "model")
    shard = sorted(copy.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    result = run_qll("verify", "--model", copy)
    assert result.returncode == 3
    assert "has changed since it was written" in result.stderr


def printed(capsys, *words) -> str:
    """What a command that must succeed writes to stdout."""
    capsys.readouterr()
    assert main(list(words)) == 0
    return capsys.readouterr().out


def tree_bytes(folder):
    """Name to content of every file below `folder`."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
