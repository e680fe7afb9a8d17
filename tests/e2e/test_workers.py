"""Runs on several processes: the same bytes as on one, also after any of them was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from qll.cli import main
from tests.e2e.conftest import ROOT
from tests.e2e.test_main_job import tree_bytes

FLAGS = ("--calib_tokens", "256", "--context", "128", "--effort", "fast", "--format", "mpo")
FLAGS += ("--keep", "0.7", "--bits", "4")


def flags_of(checkpoint: Path, out: Path, workers: int) -> list[str]:
    """The command line of a conversion."""
    words = ["convert", "--llama_dir", checkpoint, "--out", out, "--workers", workers, *FLAGS]
    return [str(word) for word in words]


@pytest.fixture(scope="module")
def undisturbed(tiny_checkpoint, tmp_path_factory):
    """What one worker writes: model folder and plan."""
    out = tmp_path_factory.mktemp("workers") / "one"
    assert main(flags_of(tiny_checkpoint, out, 1)) == 0
    return finished_bytes(out)


def finished_bytes(out: Path) -> dict[str, bytes]:
    """Everything of a finished conversion but run.json and the log of events."""
    return tree_bytes(out / "model") | {"plan.json": (out / "plan.json").read_bytes()}


def started(checkpoint: Path, out: Path) -> subprocess.Popen:
    """A run with two workers in a process of its own."""
    command = [sys.executable, str(ROOT / "main.py"), *flags_of(checkpoint, out, 2)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process: subprocess.Popen) -> None:
    """Until `condition` holds; fails when the run ends before."""
    for _ in range(12000):
        if condition():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    raise AssertionError("the run did not come that far")


def test_killed_worker_then_killed_whole_it_ends_with_the_same_bytes(
    undisturbed, tiny_checkpoint, tmp_path
):
    out = tmp_path / "out"
    cores = out / "work" / "cores"
    process = started(tiny_checkpoint, out)
    wait_for(lambda: any(cores.glob("*.safetensors")), process)
    workers = psutil.Process(process.pid).children(recursive=True)
    # those forked from the server that has read torch
    forked = [child for child in workers if child.parent().pid != process.pid]
    if forked:
        forked[0].send_signal(signal.SIGKILL)
    wait_for(lambda: len(list(cores.glob("*.safetensors"))) > 3, process)
    everyone = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _, alive = psutil.wait_procs(everyone, timeout=20)
    assert not alive  # no orphan goes on writing
    assert not (out / "model").exists()
    assert main(flags_of(tiny_checkpoint, out, 2)) == 0
    assert finished_bytes(out) == undisturbed
    assert not list(out.rglob("*.qll-tmp*"))


def test_two_runs_into_one_folder(tiny_checkpoint, tmp_path, capsys):
    from qll import store

    with store.lock(tmp_path / "out"):
        assert main(flags_of(tiny_checkpoint, tmp_path / "out", 2)) == 3
    assert "another run is writing here" in capsys.readouterr().err
