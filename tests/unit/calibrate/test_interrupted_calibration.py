"""A calibration stopped anywhere ends with the same bytes as an undisturbed one."""

from __future__ import annotations

import pytest
import torch

from qll import store
from qll.calibrate import MomentStore, collect, passes, streams
from qll.errors import (
    ForeignRunError,
    IntegrityError,
    MissingFileError,
    NonFiniteError,
    TextError,
    UsageError,
)
from qll.load import open_source

WINDOWS = torch.randint(0, 512, (2, 8), generator=torch.Generator().manual_seed(2))


class Crash(Exception):
    """Stands for a kill."""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Waiting for a second thread costs more than the tiny model does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def source(tiny_hf_folder):
    return open_source(tiny_hf_folder)


@pytest.fixture(params=["memory", "files"])
def place(request, monkeypatch):
    if request.param == "files":
        monkeypatch.setattr(streams, "MEMORY_LIMIT", 0)
    return request.param


def contents(folder):
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix == ".safetensors" or path.name == "moments.json"
    }


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    results = {}
    for gradients in (False, True):
        folder = tmp_path_factory.mktemp("undisturbed")
        collect(source, WINDOWS, folder, gradients=gradients)
        results[gradients] = contents(folder)
    return results


def crash_at(monkeypatch, owner, name, number):
    """Make the `number`-th call of owner.name raise Crash; returns the list of calls made."""
    original, calls = getattr(owner, name), []

    def crashing(*arguments, **options):
        calls.append(name)
        if len(calls) == number:
            raise Crash
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, crashing)
    return calls


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    ("owner", "name", "step"),
    [(passes, "run_block", 3), (store, "append_line", 1), (store, "write_json", 1)],
)
def test_same_bytes_after_a_crash_anywhere(
    source, undisturbed, tmp_path, monkeypatch, place, gradients, owner, name, step
):
    """Crash in the 1st, then the 1 + step-th, ... call; the last try has no such call left."""
    number, crashed = 1, True
    while crashed:
        folder = tmp_path / str(number)
        with monkeypatch.context() as patch:
            crash_at(patch, owner, name, number)
            try:
                collect(source, WINDOWS, folder, gradients=gradients)
                crashed = False
            except Crash:
                collect(source, WINDOWS, folder, gradients=gradients)
        assert contents(folder) == undisturbed[gradients], f"{name}, call {number}"
        assert not (folder / "streams").exists()
        number += step
    assert number > 2


def test_a_resumed_run_with_files_does_not_repeat_the_forward_pass(source, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "MEMORY_LIMIT", 0)
    with monkeypatch.context() as patch:
        crash_at(patch, passes, "build_block", 4)  # two forward, one backward, then the crash
        with pytest.raises(Crash):
            collect(source, WINDOWS, tmp_path, gradients=True)
    calls = crash_at(monkeypatch, passes, "build_block", -1)
    collect(source, WINDOWS, tmp_path, gradients=True)
    assert len(calls) == 1


def test_a_finished_run_returns_at_once(source, tmp_path, monkeypatch):
    collect(source, WINDOWS, tmp_path, gradients=False)
    calls = crash_at(monkeypatch, passes, "build_block", 1)
    assert collect(source, WINDOWS, tmp_path, gradients=False).tokens == WINDOWS.numel()
    assert calls == []


def test_a_lost_or_cut_file_is_measured_again(source, undisturbed, tmp_path, place):
    collect(source, WINDOWS, tmp_path, gradients=True)
    (tmp_path / "block.0000.safetensors").unlink()
    (tmp_path / "block.0001.safetensors").write_bytes(b"cut")
    collect(source, WINDOWS, tmp_path, gradients=True)
    assert contents(tmp_path) == undisturbed[True]


@pytest.mark.parametrize("other", ["windows", "gradients"])
def test_folder_of_another_job_is_refused(source, tmp_path, other):
    collect(source, WINDOWS, tmp_path, gradients=False)
    windows = WINDOWS.flip(0) if other == "windows" else WINDOWS
    with pytest.raises(ForeignRunError, match=other):
        collect(source, windows, tmp_path, gradients=other == "gradients")


class Poisoned:
    """A source whose block 1 has one NaN in its down projection."""

    def __init__(self, source):
        self._source = source

    def __getattr__(self, name):
        return getattr(self._source, name)

    def read(self, name, rows=None):
        tensor = self._source.read(name, rows).clone()
        if name == "model.layers.1.mlp.down_proj.weight":
            tensor[3, 5] = float("nan")
        return tensor


@pytest.mark.parametrize("gradients", [False, True])
def test_nan_names_the_block(source, tmp_path, monkeypatch, gradients):
    import qll.calibrate.passes as module

    poisoned = Poisoned(source)
    build = module.build_block
    monkeypatch.setattr(
        module, "build_block", lambda _, index, **options: build(poisoned, index, **options)
    )
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1"):
        collect(source, WINDOWS, tmp_path, gradients=gradients)
    assert not (tmp_path / "moments.json").exists()
    assert not (tmp_path / "block.0001.safetensors").exists()


def test_windows_of_one_token_are_refused(source, tmp_path):
    with pytest.raises(TextError, match="two tokens"):
        collect(source, WINDOWS[:, :1], tmp_path, gradients=False)


def test_unfinished_or_broken_folders_are_refused(source, tmp_path):
    with pytest.raises(MissingFileError, match="no finished calibration"):
        MomentStore(tmp_path)
    moments = collect(source, WINDOWS, tmp_path, gradients=False)
    with pytest.raises(UsageError, match="no such block"):
        moments.block(2)
    (tmp_path / "block.0000.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(IntegrityError, match=r"block\.0000"):
        moments.block(0)
