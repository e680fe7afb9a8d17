"""`qll lm generate`, `monitor` and `compare` as a user meets them: text, tables, exit codes."""

from __future__ import annotations

import io
import json
import os
import platform
import subprocess
import sys
import threading
import time

import pytest
import torch

from qll import cli, store
from qll.bytelm.compare import HEADINGS, PROMPTS
from qll.bytelm.config import ModelConfig
from qll.bytelm.model import ByteModel
from qll.bytelm.monitor import snapshot, watch
from qll.bytelm.saved import save_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run folder with a random model."""
    return make_run(tmp_path_factory.mktemp("runs") / "first", seed=0)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "second", seed=1)


def make_run(folder, seed):
    torch.manual_seed(seed)
    model = ByteModel(ModelConfig(d_model=32, n_layers=1, n_heads=2, context=48))
    with torch.no_grad():
        model.head.weight.mul_(30)
        model.head.weight[0] = model.head.weight[1:].mean(dim=0)  # the boundary is unlikely
    save_model(folder / "model", model)
    store.write_json(folder / "run.json", {})
    return folder


def line(step, **values):
    return {
        "kind": "train",
        "step": step,
        "bytes": step * 100,
        "loss": 1.5,
        "seconds": 61.0,
    } | values


def test_generate_prints_a_continuation(run, capsys):
    words = ["lm", "generate", "--model", str(run), "--prompt", "The", "--max_new_tokens", "20"]
    assert cli.main([*words, "--temperature", "0"]) == 0
    greedy = capsys.readouterr().out
    assert 1 < len(greedy.encode()) <= 21
    assert cli.main([*words, "--temperature", "0", "--preset", "creative", "--seed", "5"]) == 0
    assert capsys.readouterr().out == greedy
    # the seeds' spelling of the flags
    flags = ["--top_k", "30", "--top_p", "0.8", "--min_p", "0.05", "--repetition_penalty", "1.1"]
    words[2:4] = ["--checkpoint", str(run / "model")]
    assert cli.main([*words, "--temperature", "0.6", *flags]) == 0


def test_generate_takes_the_flags_of_the_founding_script(run, capsys):
    words = ["lm", "generate", "--checkpoint", str(run), "--prompt", "a", "--max_new_tokens", "4"]
    words += ["--temperature", "0.8", "--top_k", "20", "--top_p", "0.9", "--min_p", "0.01"]
    words += ["--repetition_penalty", "1.1", "--mode", "generate", "--model_args", "model.json"]
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert len(said.out) >= 4
    assert "--mode has no effect" in said.err
    assert "--model_args has no effect" in said.err


def test_generate_picks_the_best_of_several(run, capsys):
    words = ["lm", "generate", "--model", str(run), "--prompt", "The", "--max_new_tokens", "12"]
    assert cli.main([*words, "--candidates", "4"]) == 0
    best = capsys.readouterr().out[:-1]
    alone = []
    for seed in range(4):
        cli.main([*words, "--seed", str(seed)])
        alone.append(capsys.readouterr().out[:-1])
    assert best in alone


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "nan"], "--temperature: out of range"),
        (["--temperature", "inf"], "--temperature: out of range"),
        (["--top_p", "0"], "--top_p: out of range (expected (0, 1], found 0.0)"),
        (["--top_p", "1.5"], "--top_p: out of range"),
        (["--max_new_tokens", "0"], "--max_new_tokens"),
        (["--prompt", "x" * 48], "--prompt: longer than the model's window"),
        (["--prompt", "\udcff"], "--prompt: not valid text"),
    ],
)
def test_generate_refuses_what_cannot_be_meant(run, capsys, flags, message):
    words = ["lm", "generate", "--model", str(run), "--prompt", "a", *flags]
    if "--prompt" in flags:
        words[4:6] = []
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err


def test_a_long_prompt_can_slide(run):
    words = ["lm", "generate", "--model", str(run), "--prompt", "x" * 100, "--slide"]
    assert cli.main([*words, "--max_new_tokens", "2"]) == 0


def test_a_folder_without_a_model_is_said_so(tmp_path, capsys):
    words = ["lm", "generate", "--prompt", "a", "--model"]
    assert cli.main([*words, str(tmp_path / "nothing")]) == 3
    assert "no such folder" in capsys.readouterr().err
    assert cli.main(words[:-1]) == 2
    assert "--model" in capsys.readouterr().err


def test_compare_prints_paired_tables(run, other, capsys, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The first\n\nand the second\n")
    words = ["lm", "compare", "--models", str(run), str(other / "model"), "--max_new_tokens", "30"]
    words += ["--prompts", str(prompts)]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    for heading in HEADINGS.values():
        assert heading[:26] in text
    assert "first" in text.splitlines()[0]
    assert "second" in text.splitlines()[0]
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompts"] == ["The first", "and the second"]
    rows = list(found["models"].values())
    means = [sum(row["values"]["bits_per_byte"] for row in column) / 2 for column in rows]
    shown = next(line for line in text.splitlines() if line.startswith("mean"))
    assert [float(cell) for cell in shown.split()[1:]] == pytest.approx(means, abs=6e-4)
    difference = text.split("against the first")[1].split()[0]
    assert float(difference) == pytest.approx(means[1] - means[0], abs=6e-4)


def test_compare_has_prompts_of_its_own_and_shows_texts(run, capsys):
    words = ["lm", "compare", "--models", str(run), str(run), "--max_new_tokens", "4", "--texts"]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert all(f"> {prompt}" in text for prompt in PROMPTS)
    assert "+0.000 (0.000)" in text


def test_compare_refuses_one_model_and_a_file_without_prompts(run, capsys, tmp_path):
    assert cli.main(["lm", "compare", "--models", str(run)]) == 2
    assert "--models" in capsys.readouterr().err
    (tmp_path / "empty").write_text("\n\n")
    words = ["lm", "compare", "--models", str(run), str(run), "--prompts", str(tmp_path / "empty")]
    assert cli.main(words) == 3
    assert "no prompt" in capsys.readouterr().err


def test_monitor_prints_once_when_stdout_is_no_terminal(tmp_path):
    store.write_json(tmp_path / "run.json", {})
    beat = {"state": "training", "process": os.getpid(), "time": time.time(), "share": 0.5}
    store.write_json(tmp_path / "heartbeat.json", beat | {"steps": 40})
    values = {"bits_per_byte": 2.1640, "tokens_per_second": 5000.0, "eta_seconds": 90.0}
    store.append_line(tmp_path / "metrics.jsonl", line(20, rss_bytes=5 * 10**8, **values))
    validation = {"kind": "validation", "step": 10, "bytes": 1000, "bits_per_byte": 2.5}
    store.append_line(tmp_path / "metrics.jsonl", validation)
    words = [sys.executable, "-m", "qll.cli", "lm", "monitor", "--run", str(tmp_path)]
    code = "import sys; from qll import cli; sys.exit(cli.main(sys.argv[1:]))"
    words[1:3] = ["-c", code]
    result = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    for shown in ("training, 50.0 %", "20 of 40", "1.5000 nats", "2.1640", "5,000 tokens"):
        assert shown in result.stdout
    for shown in ("0:01:30", "0:01:01", "0.50 GB", "2.5000"):
        assert shown in result.stdout


class Terminal(io.StringIO):
    """A stdout that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_monitor_follows_a_run_until_it_ends(tmp_path, monkeypatch):
    store.write_json(tmp_path / "run.json", {})
    store.append_line(tmp_path / "metrics.jsonl", line(1))

    def finish() -> None:
        time.sleep(0.3)
        store.append_line(tmp_path / "metrics.jsonl", line(7))
        store.write_json(tmp_path / "training.json", {})

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    thread = threading.Thread(target=finish)
    thread.start()
    last = watch(tmp_path, every=0.1)
    thread.join()
    assert last.state == "complete"
    assert last.train["step"] == 7


def test_monitor_sees_that_a_process_is_gone(tmp_path):
    store.write_json(tmp_path / "run.json", {})
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    beat = {"state": "training", "process": ended.pid, "time": time.time() - 300, "share": 0.1}
    beat["host"] = platform.node()
    store.write_json(tmp_path / "heartbeat.json", beat)
    assert snapshot(tmp_path).state == "gone"
    store.write_json(tmp_path / "heartbeat.json", beat | {"host": "another machine"})
    assert snapshot(tmp_path).state == "training", "its processes cannot be seen from here"
    store.write_json(tmp_path / "heartbeat.json", beat | {"process": os.getpid()})
    assert snapshot(tmp_path).state == "training"
    store.write_json(tmp_path / "heartbeat.json", beat | {"state": "failed"})
    assert snapshot(tmp_path).ended


def test_monitor_refuses_what_is_no_run(tmp_path, capsys):
    assert cli.main(["lm", "monitor", "--run", str(tmp_path)]) == 3
    assert "not a run" in capsys.readouterr().err
