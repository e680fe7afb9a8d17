"""`qll lm train` and `qll lm eval` from the command line, killed, resumed, and given bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qll import store
from qll.bytelm.documents import split_documents
from qll.bytelm.runfiles import RunFiles
from qll.cli import main

ROOT = Path(__file__).parents[2]
SIZE = ["--model_dim", "32", "--num_layers", "1", "--num_heads", "2", "--seq_length", "32"]
QUICK = [*SIZE, "--batch_size", "4", "--log_every", "5", "--device", "cpu"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Prose of a kind: numbers in words and digits."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("".join(f"The square of {n} is {n * n}, café №{n}. " for n in range(600)))
    return path


def train(*words) -> int:
    return main(["lm", "train", *map(str, words)])


def test_it_trains_measures_and_is_read_again(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert train("--data", text, "--out", out, *QUICK, "--max_steps", 150, "--lr", "0.01") == 0
    assert "bits per byte" in capsys.readouterr().out
    result = json.loads((out / "training.json").read_text())
    assert result["held_out"]["bits_per_byte"] < 4.5  # 8 without learning
    assert result["stopped_by"] == "steps"
    assert result["bytes"] == 150 * 4 * 32
    assert result["texts"][0]["bytes"] == text.stat().st_size
    assert not RunFiles(out).checkpoint.exists()
    assert RunFiles(out).beat()["state"] == "complete"
    before = store.sha256(out / "training.json")
    assert train("--data", text, "--out", out, *QUICK, "--max_steps", 150, "--lr", "0.01") == 0
    assert "nothing to do" in capsys.readouterr().err
    assert store.sha256(out / "training.json") == before
    assert main(["lm", "eval", "--model", str(out), "--precision", "float32"]) == 0
    own = json.loads(capsys.readouterr().out)
    assert own["bits_per_byte"] == pytest.approx(result["held_out"]["bits_per_byte"], abs=0.02)
    words = ["--data", str(text), "--split", "held_out", "--stride", "8", "--max_bytes", "900"]
    assert main(["lm", "eval", "--model", str(out / "model"), *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["bytes"], found["documents"], found["stride"]) == (900, 1, 8)
    assert found["bits_per_byte"] < 4.5


def test_a_run_killed_at_any_moment_ends_with_the_same_bytes(text, tmp_path):
    flags = [*QUICK, "--max_steps", "60", "--save_every", "10", "--ema", "0.9", "--dropout", "0.1"]
    flags += ["--accumulate_steps", "2", "--val_every", "20"]

    def start(out):
        command = [sys.executable, "main.py", "lm", "train", "--data", str(text), "--out", str(out)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [*command, *flags], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
        )

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(whole).wait() == 0
    process = start(cut)
    while not RunFiles(cut).checkpoint.exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not RunFiles(cut).complete
    assert start(cut).wait() == 0
    for name in ("model/model.safetensors", "last/model.safetensors", "model/model.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    results = [json.loads((out / "training.json").read_text()) for out in (whole, cut)]
    assert results[0]["held_out"] == results[1]["held_out"]
    losses = [[line["loss"] for line in RunFiles(out).lines("train")] for out in (whole, cut)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 12


def test_ten_seconds_with_the_defaults(text, tmp_path, capsys):
    """Nothing but a text and a time; small texts are read many times."""
    out = tmp_path / "run"
    assert train("--data", text, "--out", out, "--max-seconds", 8, "--device", "cpu") == 0
    result = json.loads((out / "training.json").read_text())
    assert result["stopped_by"] == "seconds"
    assert result["parameters"] > 3_000_000
    assert result["held_out"]["bits_per_byte"] < 8


def test_adapters_alone_are_trained_from_a_finished_run(text, tmp_path, capsys):
    base, out = tmp_path / "base", tmp_path / "lora"
    assert train("--data", text, "--out", base, *QUICK, "--max_steps", 5) == 0
    lora = ["--checkpoint", base, "--lora_rank", 2, "--lora_alpha", 4, "--lora_train_only"]
    words = ["--data", text, "--out", out, *lora, "--max_steps", 5, "--batch_size", 4]
    assert train(*words) == 0, capsys.readouterr().err
    from qll.bytelm.saved import load_lm

    trained, frozen = load_lm(out), load_lm(base)
    for name, tensor in frozen.state_dict().items():
        assert tensor.equal(trained.state_dict()[name]), name
    assert any(
        tensor.abs().sum() > 0 for name, tensor in trained.state_dict().items() if "_up" in name
    )
    words = ["--data", text, "--out", tmp_path / "x", "--checkpoint", base, "--model_dim", 64]
    assert train(*words) == 3
    assert "another architecture" in capsys.readouterr().err


def test_flags_of_the_founding_scripts(text, tmp_path, capsys):
    words = f"""--checkpoint_dir {tmp_path / "run"} --max_samples 200 --batch_size 2 --seq_length 32
    --model_dim 32 --num_layers 1 --num_heads 2 --dropout 0.1 --phase_coh 0.05 --global_tokens 2
    --lora_rank 2 --lora_alpha 4 --epochs 0.1 --lr 1e-3 --weight_decay 0.01 --streaming
    --gradient_accumulation_steps 2 --energy_weight 0.001 --log_every 2 --save_every 5 --seed 1
    --max_steps 4 --grad_clip 1.0 --warmup_steps 2 --val_max_chunks 4 --no_amp --use_checkpoint
    --buffer_size 50 --num_workers 4 --phase_dim 64 --mode train"""
    assert train("--data", text, *words.split()) == 0
    said = capsys.readouterr().err
    for flag in ("--num_workers", "--phase_dim", "--mode"):
        assert f"{flag} has no effect" in said
    result = json.loads((tmp_path / "run" / "training.json").read_text())
    assert result["precision"] == "float32"
    assert result["model"]["memory"]["global_tokens"] == 2
    assert result["settings"]["losses"]["coherence"] == 0.05


@pytest.mark.parametrize(
    ("make", "flags", "code", "words"),
    [
        (lambda path: path.write_bytes(b"text\0text" * 99), [], 3, "byte 0 at position 4"),
        (lambda path: path.write_bytes(b"caf\xe9 " * 99), [], 3, "not UTF-8 (found byte 0xe9 at"),
        (lambda path: path.write_text(""), [], 3, "too short to hold a part out"),
        (lambda path: path.write_text("tiny " * 200), ["--seq_length", 512], 3, "too short to"),
        (lambda path: path.mkdir(), [], 3, "no text in this folder"),
        (lambda path: None, [], 3, "no such file or folder"),
        (lambda path: path.write_text("text " * 999), ["--lr", "nan"], 2, "--lr: out of range"),
        (lambda path: path.write_text("text " * 999), ["--num_heads", 3], 2, "even number of"),
        (lambda path: path.write_text("text " * 999), ["--dataset", "c4"], 2, "local or named"),
        (lambda path: path.write_text("text " * 999), ["--stages", "no"], 2, "no such curriculum"),
    ],
)
def test_bad_input_is_one_sentence_and_no_folder_is_touched(
    tmp_path, make, flags, code, words, capsys
):
    path, out = tmp_path / "data", tmp_path / "out"
    make(path)
    assert train("--data", path, "--out", out, "--max_steps", 2, *flags) == code
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not out.exists() or not any(out.iterdir())


def test_a_folder_of_another_run_and_a_broken_checkpoint_stay_as_they_are(text, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["--data", text, "--out", out, *QUICK, "--save_every", 1, "--max_steps", 3]
    assert train(*words) == 0
    hashes = {path: store.sha256(path) for path in out.rglob("*") if path.is_file()}
    assert train(*words, "--seed", 5) == 2
    assert "belongs to another run" in capsys.readouterr().err
    other = tmp_path / "other.txt"
    other.write_text(text.read_text() + "more")
    assert train("--data", other, *words[2:]) == 2
    assert hashes == {path: store.sha256(path) for path in out.rglob("*") if path.is_file()}
    # as if killed at the end, with a checkpoint that is not whole
    store.remove(out / "training.json")
    RunFiles(out).checkpoint.write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    assert train(*words) == 3
    assert "not a checkpoint of a run" in capsys.readouterr().err
    assert (out / "model" / "model.safetensors").exists()


def test_bad_models_are_refused_by_eval(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert train("--data", text, "--out", out, *QUICK, "--max_steps", 2) == 0
    capsys.readouterr()

    def said(*words) -> str:
        assert main(["lm", "eval", "--model", str(out), *map(str, words)]) in (2, 3)
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "no such file or folder" in said("--data", tmp_path / "none")
    assert "stride: out of range" in said("--stride", 99)
    facts = json.loads((out / "model" / "model.json").read_text())
    (out / "model" / "model.json").write_text(json.dumps(facts | {"vocabulary": 32000}))
    assert "vocabulary" in said()
    (out / "model" / "model.json").write_text(json.dumps(facts | {"architecture": "llama"}))
    assert "another architecture" in said()
    (out / "model" / "model.json").write_text(json.dumps(facts))
    tensors = out / "model" / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-64])
    assert "cannot be read as safetensors" in said()
    assert "no such folder" in said() if store.remove(out) is None else False


def test_texts_that_cannot_be_read_leave_the_folder_to_others(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    out = tmp_path / "run"
    words = ["--out", out, *QUICK, "--max_steps", 2]
    assert train("--dataset", "wikitext2", *words) == 3
    assert "--data FILE_OR_FOLDER" in capsys.readouterr().err
    assert not (out / "run.json").exists()
    assert train("--data", text, *words) == 0, "the way that the hint shows"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data_weights", "-1"], "--data_weights: out of range"),
        (["--max_samples", 1], "--max_samples: too few"),
        (["--seed", -1], "--seed: out of range"),
        (["--embedding", "ppmi", "--checkpoint", "."], "--embedding: the checkpoint has"),
        (["--set", "concept.kind=sae"], "concept.kind: needs an autoencoder"),
        (["--set", "memory.memory_tokens=2", "memory.segment=32"], "never read"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_the_folder_is_taken(
    text, tmp_path, flags, words, capsys
):
    out = tmp_path / "run"
    assert train("--data", text, "--out", out, *QUICK, "--max_steps", 2, *flags) == 2
    assert words in capsys.readouterr().err
    assert not (out / "run.json").exists()


HUB_TEXT = [f"row {n} of a text that comes from somewhere else. " for n in range(400)]


@pytest.mark.parametrize("streaming", ["True", "False"])
def test_the_documented_commands_read_a_data_set_as_often_as_they_say(
    tmp_path, streaming, monkeypatch
):
    """`--dataset NAME --streaming True|False --max_samples N`, the hub replaced by a list."""
    hub = type(sys)("datasets")
    hub.load_dataset = lambda *names, split, streaming: [{"text": row} for row in HUB_TEXT]
    monkeypatch.setitem(sys.modules, "datasets", hub)
    out = tmp_path / "run"
    words = ["--dataset", "tinystories", "--streaming", streaming, "--max_samples", 40]
    assert train(*words, "--out", out, *QUICK, "--epochs", 2) == 0
    result = json.loads((out / "training.json").read_text())
    # 40 windows of 32 bytes, twice, in batches of 4; packed, an epoch has the last one less
    assert result["bytes"] in {2 * 40 * 32, 2 * 38 * 32}
    more = [*words, "--out", tmp_path / "more", *QUICK, "--epochs", 2, "--max_steps", 10_000]
    assert train(*more) == 0
    assert json.loads((tmp_path / "more" / "training.json").read_text())["bytes"] == result["bytes"]


def test_new_global_tokens_learn_beside_a_frozen_base(text, tmp_path):
    base, out = tmp_path / "base", tmp_path / "more"
    assert train("--data", text, "--out", base, *QUICK, "--max_steps", 3) == 0
    more = ["--checkpoint", base, "--lora_rank", 2, "--lora_train_only", "--global_tokens", 2]
    words = ["--data", text, "--batch_size", 4, *more, "--val_every", 1]
    from qll.bytelm.saved import load_model

    assert train(*words, "--out", out, "--max_steps", 1) == 0
    assert train(*words, "--out", tmp_path / "longer", "--max_steps", 9) == 0
    prefixes = [load_model(f / "last").blocks[0].mixer.prefix for f in (out, tmp_path / "longer")]
    assert not prefixes[0].equal(prefixes[1])


def test_an_embedding_starts_from_the_statistics_of_the_texts(text, tmp_path):
    from qll.bytelm.documents import find_documents
    from qll.bytelm.embedding import bigram_counts, start_of
    from qll.bytelm.saved import load_model

    out = tmp_path / "run"
    words = ["--data", text, *QUICK, "--max_steps", 1, "--lr", 1e-9, "--embedding", "ppmi"]
    assert train(*words, "--out", out) == 0
    assert train(*words, "--out", tmp_path / "averaged", "--ema", 0.9) == 0
    trained, _ = split_documents(find_documents([text]))
    expected = start_of("ppmi", 32, bigram_counts(trained))
    for folder in (out, tmp_path / "averaged"):
        found = load_model(folder / "last").embedding.weight.detach()
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
