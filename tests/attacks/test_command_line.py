"""Wrong flags, wrong paths, wrong disks: one sentence, the right exit code, nothing left behind."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess

import pytest
import torch

from qll import store
from qll.cli import main
from qll.errors import DiskFullError, OutputError
from tests.e2e.conftest import QUICK

USAGE = {
    ("--keep", "0"): "--keep",
    ("--keep", "1.5"): "--keep",
    ("--keep", "-0.1"): "--keep",
    ("--keep_embeddings", "2"): "--keep_embeddings",
    ("--context", "1"): "--context",
    ("--sites", "1"): "--sites",
    ("--sweeps", "-1"): "--sweeps",
    ("--sae_layers", "0"): "--sae_dir",
    ("--sae_dir", ".", "--sae_layers", "zero"): "not a list of blocks",
    ("--sae_dir", ".", "--sae_layers", "0,99"): "no such blocks",
    ("--calib_text", "no/such/file"): "no such file",
    ("--config", "no/such/run.json"): "cannot read the settings",
    ("nonsense",): "no such verb",
}


@pytest.mark.parametrize("words", USAGE, ids=" ".join)
def test_usage_errors_name_the_flag_and_exit_with_two(words, capsys, tmp_path):
    code = main([*words, *(("--out", str(tmp_path / "out")) if words[0][0] == "-" else ())])
    message = capsys.readouterr().err
    assert code == 2
    assert USAGE[words] in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda(capsys, tmp_path):
    assert main(["--device", "cuda", "--out", str(tmp_path / "out")]) == 2
    assert "this machine has no such device" in capsys.readouterr().err


def test_wrong_path_and_empty_folder(capsys, tmp_path):
    assert main(["--llama_dir", str(tmp_path / "no"), "--out", str(tmp_path / "out")]) == 3
    assert main(["--llama_dir", str(tmp_path), "--out", str(tmp_path.parent / "out")]) == 3
    for message in capsys.readouterr().err.splitlines():
        assert message.startswith("qll: ")
        assert str(tmp_path) in message


def test_output_inside_the_checkpoint(capsys, tiny_checkpoint):
    inside = tiny_checkpoint / "out"
    assert main(["--llama_dir", str(tiny_checkpoint), "--out", str(inside)]) == 2
    assert "the output would go into the checkpoint" in capsys.readouterr().err
    assert not inside.exists()


def test_output_that_holds_something_else(capsys, tiny_checkpoint, tmp_path):
    (tmp_path / "notes.json").write_text("{}")
    assert main(["--llama_dir", str(tiny_checkpoint), "--out", str(tmp_path), *QUICK]) == 2
    assert "something else" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.json"]


def test_a_living_lock_is_respected_and_a_dead_one_is_not(tmp_path):
    process = subprocess.Popen(["sleep", "30"])
    (tmp_path / store.LOCK_NAME).write_text(str(process.pid))
    with pytest.raises(Exception, match="another run is writing here"), store.lock(tmp_path):
        pass
    process.kill()
    process.wait()
    with store.lock(tmp_path):
        assert (tmp_path / store.LOCK_NAME).read_text() == f"{os.getpid()} {platform.node()}"
    assert not (tmp_path / store.LOCK_NAME).exists()


@pytest.fixture
def small_disk(tmp_path):
    """A 1 MB file system, where the kernel lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here (needs root)")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_old_file_and_no_temporaries(small_disk):
    path = small_disk / "tensors.safetensors"
    store.write_tensors(path, {"a": torch.zeros(10)})
    before = path.read_bytes()
    with pytest.raises(DiskFullError, match="full"):
        store.write_tensors(path, {"a": torch.zeros(1 << 20)})
    with pytest.raises(DiskFullError):
        store.write_bytes(path, bytes(2 << 20))
    assert path.read_bytes() == before
    assert [entry.name for entry in small_disk.iterdir()] == ["tensors.safetensors"]


def test_too_little_space_is_said_before_starting(small_disk, capsys, tiny_checkpoint):
    code = main(["--llama_dir", str(tiny_checkpoint), "--out", str(small_disk / "run"), *QUICK])
    message = capsys.readouterr().err
    assert code == 3
    assert "not enough disk space" in message
    assert "GB" in message


def test_a_read_only_disk(small_disk, capsys, tiny_checkpoint):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OutputError, match="Read-only"):
        store.make_folder(small_disk / "run")
    assert main(["--llama_dir", str(tiny_checkpoint), "--out", str(small_disk / "r"), *QUICK]) == 3
    assert "cannot write here" in capsys.readouterr().err
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)


def test_a_source_that_changed_under_the_run(capsys, tiny_checkpoint, tmp_path):
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    flags = ["--llama_dir", str(copy), "--out", str(tmp_path / "out"), "--keep", "1.0", *QUICK]
    assert main(["plan", *flags]) == 0
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    assert main(["plan", *flags]) == 2
    assert "fingerprint" in capsys.readouterr().err


def test_weights_only_false_is_nowhere_in_the_tree():
    from tests.e2e.conftest import ROOT

    word = "weights_only=" + "False"
    found = [path for path in (ROOT / "qll").rglob("*.py") if word in path.read_text()]
    assert not found
