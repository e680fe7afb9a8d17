"""Atomic writes, manifests, journals."""

from __future__ import annotations

import json
import os
import platform
import stat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qll import store
from qll.errors import IntegrityError, LockedError, OutputError


def test_files_get_the_mode_the_umask_asks_for(tmp_path):
    old = os.umask(0o027)
    try:
        store.write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
        store.write_text(tmp_path / "b.txt", "b")
    finally:
        os.umask(old)
    for name in ("a.safetensors", "b.txt"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640


def test_tensors_round_trip_even_when_not_contiguous(tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3).T
    store.write_tensors(tmp_path / "t.safetensors", {"x": tensor})
    assert torch.equal(load_file(tmp_path / "t.safetensors")["x"], tensor)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    store.write_json(path, {"old": 1})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(13, "denied")))
    with pytest.raises(OutputError, match="denied"):
        store.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write_json(tmp_path / "a.json", float("nan"))
    assert not (tmp_path / "a.json").exists()


@given(st.lists(st.integers(0, 999), max_size=6), st.integers(0, 40))
@settings(max_examples=25, derandomize=True, deadline=None)
def test_a_torn_journal_keeps_its_whole_lines(tmp_path_factory, values, cut):
    path = tmp_path_factory.mktemp("journal") / "j.jsonl"
    for value in values:
        store.append_line(path, {"value": value})
    if path.exists():
        path.write_bytes(path.read_bytes()[: max(0, path.stat().st_size - cut)])
    found = [line["value"] for line in store.read_lines(path) if isinstance(line, dict)]
    assert found == values[: len(found)]
    if cut == 0:
        assert found == values


def test_a_line_after_a_torn_one_is_not_lost(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_text('{"value": 1}\n{"val')
    store.append_line(path, {"value": 2})
    assert {"value": 2} in store.read_lines(path)


def test_the_manifest_notices_every_change(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b").write_bytes(b"xyz")
    store.write_manifest(tmp_path, {"fact": 1})
    assert store.verify_manifest(tmp_path)["fact"] == 1
    for change, words in {b"12346": "has changed", b"1234": "another size"}.items():
        (tmp_path / "a").write_bytes(change)
        with pytest.raises(IntegrityError, match=words):
            store.verify_manifest(tmp_path)
    (tmp_path / "a").unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        store.verify_manifest(tmp_path)
    with pytest.raises(IntegrityError, match="never finished"):
        store.read_manifest(tmp_path / "deep")


def test_clean_removes_temporaries_only(tmp_path):
    (tmp_path / f".x.1{store.TEMP_SUFFIX}").write_bytes(b"")
    (tmp_path / "kept").write_bytes(b"")
    store.clean(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]


def test_a_lock_of_another_machine_stays(tmp_path):
    path = tmp_path / store.LOCK_NAME
    path.write_text("999999999 elsewhere")
    with pytest.raises(LockedError, match="process 999999999 on elsewhere"), store.lock(tmp_path):
        pass


def test_a_lock_of_an_earlier_process_with_our_number_is_stale(tmp_path):
    path = tmp_path / store.LOCK_NAME
    path.write_text(f"{os.getpid()} {platform.node()}")
    with store.lock(tmp_path), pytest.raises(LockedError), store.lock(tmp_path):
        pass
    assert not path.exists()
