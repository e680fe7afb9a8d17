"""Jobs on a real Dask cluster: killed workers, a killed scheduler, a worker that lacks a file."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import distributed
import pytest

from qll.cli import main
from qll.errors import MemoryShortError, SchedulerError, UsageError, WorkerError
from qll.load import open_source
from qll.options import ConvertOptions, ScaleOptions
from qll.scale import cluster as cluster_room
from qll.scale.cluster import Cluster
from qll.scale.inputs import Inputs
from tests.e2e.conftest import ROOT, tiny_checkpoint  # noqa: F401
from tests.e2e.test_main_job import tree_bytes
from tests.steps import complains, dies_once, norm_of, slow

QUICK = ("--calib_tokens", "256", "--context", "128", "--effort", "fast", "--keep", "0.7")
# a scheduler with one worker, whose process can be killed as a whole
SCHEDULER = """
import sys, time
from distributed import LocalCluster
if __name__ == "__main__":
    cluster = LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None,
                           processes=False, protocol="tcp://", host="127.0.0.1")
    print(cluster.scheduler_address, flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def cluster():
    """Two workers of one thread on this machine."""
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1"
        ) as made,
        distributed.Client(made, set_as_default=False) as client,
    ):
        yield made, client


@pytest.fixture
def inputs(tiny_hf_folder):
    fingerprint = open_source(tiny_hf_folder).fingerprint
    return Inputs(tiny_hf_folder, fingerprint, ConvertOptions())


def test_results_are_those_of_this_process(cluster, inputs, tmp_path):
    source = open_source(inputs.llama_dir)
    names = [name for name in source.specs() if "layers.0.self_attn" in name]
    executor = Cluster(inputs, cluster[0].scheduler_address, tmp_path, 1, 1)
    found = list(executor.run(dies_once, names, tmp_path))
    assert {name: norm for name, norm, _ in found} == {
        name: float(source.read(name).double().norm()) for name in names
    }
    assert {threads for *_, threads in found} == {1}
    assert (tmp_path / "died").exists()


def test_an_error_of_a_step_ends_the_run(cluster, inputs, tmp_path):
    executor = Cluster(inputs, cluster[0].scheduler_address, tmp_path, 1, 1)
    with pytest.raises(Exception, match=r"worker \S+, process \d+: w: weights hold NaN"):
        list(executor.run(complains, ["w"]))


def test_a_shard_that_one_machine_lacks_is_named(cluster, inputs, tmp_path):
    made, client = cluster
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for place in (whole, broken):
        shutil.copytree(inputs.llama_dir, place / "checkpoint")
    (broken / "checkpoint" / "model.safetensors").unlink()
    client.wait_for_workers(2, timeout=60)  # one of them was killed above
    here = client.run(os.getcwd)
    first, second = sorted(here)
    client.run(os.chdir, str(whole), workers=[first])
    client.run(os.chdir, str(broken), workers=[second])
    # a relative path is another place on each worker
    away = Inputs(Path("checkpoint"), inputs.fingerprint, inputs.options)
    executor = Cluster(away, made.scheduler_address, tmp_path, 1, 1)
    try:
        with pytest.raises(WorkerError, match=rf"worker {second} .*no weights.*same paths"):
            list(executor.run(norm_of, ["model.norm.weight"], tmp_path))
    finally:
        client.run(os.chdir, next(iter(here.values())))
    gone = Cluster(inputs, made.scheduler_address, tmp_path / "gone", 1, 1)
    with pytest.raises(WorkerError, match="gone: no such folder"):
        list(gone.run(norm_of, ["model.norm.weight"], tmp_path))


def test_too_little_memory_is_named(cluster, inputs, tmp_path):
    executor = Cluster(inputs, cluster[0].scheduler_address, tmp_path, 1, 10**15)
    with pytest.raises(MemoryShortError, match=r"worker tcp.* 1000000.00 GB for each.* GB"):
        list(executor.run(norm_of, ["model.norm.weight"], tmp_path))


def test_a_scheduler_that_is_killed_or_never_was(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_room, "CONNECT_SECONDS", 3)
    process = subprocess.Popen(
        [sys.executable, "-c", SCHEDULER],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    )
    address = process.stdout.readline().strip()
    try:
        results = Cluster(inputs, address, tmp_path, 1, 1).run(slow, [0.0, 600.0], tmp_path)
        assert next(results) == 0.0
        process.send_signal(signal.SIGKILL)
        with pytest.raises(SchedulerError, match=r"no Dask scheduler answers.*same command again"):
            next(results)
    finally:
        process.kill()
        process.communicate()
    with pytest.raises(SchedulerError, match="no Dask scheduler answers"):
        list(Cluster(inputs, address, tmp_path, 1, 1).run(slow, [0.0], tmp_path))


def test_the_flag_is_checked(tmp_path):
    with pytest.raises(UsageError, match="scheduler file"):
        ScaleOptions(dask="localhost8786")
    with pytest.raises(UsageError, match="either processes"):
        ScaleOptions(dask="tcp://a:1", workers=2)


def test_a_conversion_survives_a_killed_worker(cluster, tiny_checkpoint, tmp_path):  # noqa: F811
    made, client = cluster
    flags = ["convert", "--llama_dir", str(tiny_checkpoint), *QUICK]
    assert main([*flags, "--workers", "1", "--out", str(tmp_path / "one")]) == 0
    out, killed = tmp_path / "out", []

    def kill_one() -> None:
        while not any((out / "work" / "cores").glob("*.safetensors")):
            time.sleep(0.005)
        killed.append(next(iter(client.run(os.getpid).values())))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    file = tmp_path / "scheduler.json"
    file.write_text(json.dumps(client.scheduler_info() | {"address": made.scheduler_address}))
    assert main([*flags, "--dask", str(file), "--out", str(out)]) == 0
    killer.join(timeout=10)
    assert killed
    assert tree_bytes(out / "model") == tree_bytes(tmp_path / "one" / "model")
    assert (out / "plan.json").read_bytes() == (tmp_path / "one" / "plan.json").read_bytes()
