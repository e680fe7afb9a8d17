"""Jobs on processes: results, errors that name the worker, a worker that dies, memory."""

from __future__ import annotations

import os

import pytest

from qll.errors import (
    MemoryShortError,
    MissingFileError,
    NonFiniteError,
    SourceChangedError,
    WorkerError,
)
from qll.load import open_source
from qll.options import ConvertOptions
from qll.scale import processes
from qll.scale.executor import require_memory
from qll.scale.here import Here
from qll.scale.inputs import Inputs, opened, opened_here
from qll.scale.job import Job
from qll.scale.processes import Processes
from tests.steps import always_dies, complains, dies_once, norm_of, warns


@pytest.fixture
def source(tiny_hf_folder):
    return open_source(tiny_hf_folder)


@pytest.fixture
def inputs(source, tiny_hf_folder):
    return Inputs(tiny_hf_folder, source.fingerprint, ConvertOptions())


@pytest.fixture
def names(source):
    return [name for name in source.specs() if name.startswith("model.layers.0.self_attn")]


def test_a_killed_worker_costs_one_job(inputs, source, names, tmp_path):
    found = list(Processes(inputs, 2, 1).run(dies_once, names, tmp_path))
    expected = {name: float(source.read(name).double().norm()) for name in names}
    assert {name: norm for name, norm, _ in found} == expected
    assert {threads for *_, threads in found} == {1}
    # only the job in flight was begun twice
    assert len(list(tmp_path.glob("*.weight.*"))) == len(names)


def test_a_job_that_kills_every_worker_ends_the_run(inputs, names, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "ATTEMPTS", 2)
    with pytest.raises(WorkerError, match=r"q_proj.*failed 2 times.*memory"):
        list(Processes(inputs, 1, 1).run(always_dies, names[:1], tmp_path))
    assert len(list(tmp_path.glob("try.*"))) == 2


def test_an_error_of_the_step_names_the_worker_and_keeps_its_class(inputs):
    with pytest.raises(NonFiniteError, match=rf"worker {os.uname().nodename}, process \d+: w: "):
        list(Processes(inputs, 1, 1).run(complains, ["w"]))


def test_warnings_of_a_step_come_back(inputs, caplog):
    outcome = Job(inputs, 1, warns, "w")()
    assert outcome.warnings == ("w is singular",)
    with caplog.at_level("WARNING", "qll"):
        assert outcome.heard() == "w"
    assert "w is singular" in caplog.text


def test_a_missing_checkpoint_is_named(inputs, tmp_path):
    gone = Inputs(tmp_path / "gone", inputs.fingerprint, inputs.options)
    with pytest.raises(MissingFileError, match=r"worker .*gone: no such file"):
        Job(gone, 1, norm_of, "w", (tmp_path,))()


def test_a_checkpoint_that_changes_is_noticed(inputs, source, names, tiny_llama, tmp_path):
    folder = tmp_path / "copy"
    tiny_llama.save_pretrained(folder)
    copied = open_source(folder)
    here = opened_here(Inputs(folder, copied.fingerprint, inputs.options), copied, None)
    steps = Here(here, inputs.options).run(norm_of, names, tmp_path)
    next(steps)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(SourceChangedError, match=r"model\.safetensors.*changed"):
        next(steps)
    with pytest.raises(SourceChangedError):
        opened(Inputs(folder, copied.fingerprint, inputs.options))


def test_memory_that_is_not_there_is_refused():
    with pytest.raises(MemoryShortError, match=r"--workers 3: .*3 x 1000000.00 GB.*found"):
        require_memory(3, 10**15)
