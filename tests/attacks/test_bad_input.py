"""Every bad checkpoint of the list, given to the command line: one sentence, exit code 3, no trace.

The rooms' own attack tests show which error each lie raises; here it is shown that a user sees it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qll.cli import main
from tests.checkpoints import write_gguf, write_hf_folder, write_meta_folder
from tests.conftest import make_tiny_llama
from tests.e2e.conftest import QUICK

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


class RunsCode:
    """A pickle of it creates the file `ran`."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch ran",)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_config(folder: Path, **changes: object) -> None:
    """Change keys of config.json; None removes one."""
    values = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in values.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def with_tensor(folder: Path, tensor: torch.Tensor) -> None:
    """Put `tensor` in place of the first q projection."""
    state = load_file(folder / "model.safetensors")
    save_file(state | {Q_PROJ: tensor}, folder / "model.safetensors")


def missing_hf_shard(folder: Path) -> Path:
    shutil.rmtree(folder)
    write_hf_folder(make_tiny_llama(), folder, max_shard_size="100KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()
    return folder


def missing_meta_shard(folder: Path) -> Path:
    write_meta_folder(make_tiny_llama(), folder / "meta", 4)
    (folder / "meta" / "consolidated.02.pth").unlink()
    return folder / "meta"


def truncated_safetensors(folder: Path) -> Path:
    cut(folder / "model.safetensors")
    return folder


def truncated_gguf(folder: Path) -> Path:
    path = write_gguf(make_tiny_llama(), folder / "m.gguf")
    cut(path)
    return path


def truncated_pth(folder: Path) -> Path:
    write_meta_folder(make_tiny_llama(), folder / "meta")
    cut(folder / "meta" / "consolidated.00.pth")
    return folder / "meta"


def evil_pth(folder: Path) -> Path:
    write_meta_folder(make_tiny_llama(), folder / "meta")
    torch.save({"norm.weight": RunsCode()}, folder / "meta" / "consolidated.00.pth")
    return folder / "meta"


def evil_bin(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": RunsCode()}, folder / "pytorch_model.bin")
    return folder


def shapes_of_another_config(folder: Path) -> Path:
    with_config(folder, hidden_size=128, head_dim=32)
    return folder


def config_without_rope(folder: Path) -> Path:
    with_config(folder, rope_parameters=None, rope_theta=None, rope_scaling=None)
    return folder


def nan_weights(folder: Path) -> Path:
    weight = load_file(folder / "model.safetensors")[Q_PROJ]
    weight[3, 5] = float("nan")
    with_tensor(folder, weight)
    return folder


def tokenizer_larger_than_the_table(folder: Path) -> Path:
    write_hf_folder(make_tiny_llama(vocab_size=300), folder)
    return folder


def no_tokenizer(folder: Path) -> Path:
    for path in folder.glob("*token*"):
        path.unlink()
    return folder


def other_architecture(folder: Path) -> Path:
    with_config(folder, model_type="mistral", architectures=["MistralForCausalLM"])
    return folder


# What each makes of a good folder, and what the sentence must say
BAD = {
    missing_hf_shard: r"model-00002.*file not found.*download is incomplete",
    missing_meta_shard: r"consolidated\.02\.pth|shard",
    truncated_safetensors: r"model\.safetensors.*expected .*bytes.*found",
    truncated_gguf: r"m\.gguf.*expected .*bytes.*found",
    truncated_pth: r"consolidated\.00\.pth",
    evil_pth: r"consolidated\.00\.pth",
    evil_bin: r"safetensors",
    shapes_of_another_config: r"expected .*128.*found .*64",
    config_without_rope: r"config\.json.*rotary.*found neither\); add the value",
    nan_weights: r"q_proj.*NaN.*1 of 4096.*download or convert",
    tokenizer_larger_than_the_table: r"300.*512|512.*300",
    no_tokenizer: r"tokenizer\.json or tokenizer\.model",
    other_architecture: r"config\.json.*llama.*mistral",
}


def one_sentence(message: str) -> str:
    """The error in what was printed: the last line, and no traceback."""
    assert "Traceback" not in message
    lines = [line for line in message.splitlines() if line and not line.startswith("[")]
    assert len(lines) == 1, message
    assert lines[0].startswith("qll: ")
    assert lines[0].isprintable()
    return lines[0]


@pytest.mark.parametrize("break_it", BAD, ids=lambda function: function.__name__)
def test_each_bad_checkpoint_is_one_sentence(
    break_it,
    tiny_checkpoint,
    tmp_path,
    monkeypatch,
    capsys,
):
    bad = break_it(Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    out = tmp_path / "out"
    capsys.readouterr()
    assert main(["--llama_dir", str(bad), "--out", str(out), *QUICK]) == 3
    message = one_sentence(capsys.readouterr().err)
    assert re.search(BAD[break_it], message), message
    assert str(tmp_path) in message
    assert not list((tmp_path / "here").iterdir())
    if break_it is nan_weights:
        # found while reading: the run has begun, but nothing of it can be taken for a result
        assert not (out / "model").exists()
        assert not (out / "report.json").exists()
    else:
        assert not out.exists()


def test_a_mended_checkpoint_does_not_resume_the_bad_one(tiny_checkpoint, tmp_path, capsys):
    bad = nan_weights(Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")))
    flags = ["convert", "--llama_dir", str(bad), "--out", str(tmp_path / "out"), *QUICK]
    assert main(flags) == 3
    shutil.copy(tiny_checkpoint / "model.safetensors", bad / "model.safetensors")
    capsys.readouterr()
    assert main(flags) == 2
    assert "belongs to another run" in one_sentence(capsys.readouterr().err)


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "--llama_dir", "nowhere"),
        ("plan", "--llama_dir", "nowhere", "--out", "o"),
        ("convert", "--llama_dir", "nowhere", "--out", "o"),
        ("eval", "--model", "nowhere"),
        ("generate", "--model", "nowhere", "--prompt", "a"),
        ("bench", "--model", "nowhere"),
        ("verify", "--model", "nowhere"),
        ("export", "--model", "nowhere", "--out", "o"),
        ("report", "--run", "nowhere"),
    ],
    ids=lambda words: words[0],
)
def test_a_wrong_path_is_one_sentence_in_every_verb(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(list(words)) == 3
    assert "nowhere" in one_sentence(capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["not UTF-8", "too short", "empty"])
def test_texts_that_cannot_be_used(kind, tiny_checkpoint, tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_bytes({"not UTF-8": b"abc\xff" * 999, "too short": b"a", "empty": b""}[kind])
    flags = ["--llama_dir", str(tiny_checkpoint), "--out", str(tmp_path / "out"), *QUICK]
    assert main([*flags, "--calib_text", str(path)]) == 3
    assert "text" in one_sentence(capsys.readouterr().err)
    assert not (tmp_path / "out" / "model").exists()


def test_the_disk_fills_up_midway_and_the_run_resumes(
    tiny_checkpoint,
    tmp_path,
    monkeypatch,
    capsys,
):
    """No root needed: the kernel's answer to a write is replaced after some writes."""
    flags = ["convert", "--llama_dir", str(tiny_checkpoint), *QUICK, "--metric", "activation"]
    fsync, done = os.fsync, []

    def full(handle: int) -> None:
        done.append(handle)
        if len(done) == 25:
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    assert main([*flags, "--out", str(tmp_path / "out")]) == 3
    message = one_sentence(capsys.readouterr().err)
    assert "the disk is full" in message
    assert "bytes free" in message
    assert not list((tmp_path / "out").rglob("*.qll-tmp*"))
    monkeypatch.setattr(os, "fsync", fsync)
    assert main([*flags, "--out", str(tmp_path / "out")]) == 0
    assert main([*flags, "--out", str(tmp_path / "whole")]) == 0
    assert weights_in(tmp_path / "out") == weights_in(tmp_path / "whole")


def weights_in(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "model").iterdir()}
