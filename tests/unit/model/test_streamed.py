"""A folder checked block by block says what a whole load says."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from qll import store
from qll.errors import IntegrityError, QLLError
from qll.model import load, logits_fingerprint, verify_folder
from qll.model import streamed as streamed_room
from qll.model.fingerprint import compare
from qll.model.streamed import is_large, streamed_fingerprint


@pytest.fixture
def large(monkeypatch):
    monkeypatch.setattr(streamed_room, "LARGE", 0)


def test_same_logits_as_the_whole_model(small_folder):
    whole = logits_fingerprint(load(small_folder, dtype=torch.float32))
    assert compare(streamed_fingerprint(small_folder), whole, where=small_folder) < 1e-4


def test_a_large_folder_is_verified_without_loading_it(small_folder, large, monkeypatch):
    monkeypatch.setattr("qll.model.folder.load", None)
    assert is_large(small_folder)
    verify_folder(small_folder)


@pytest.mark.parametrize("kind", ["missing", "extra", "shape", "value"])
def test_what_is_wrong_is_found(small_folder, tmp_path, large, kind):
    folder = tmp_path / "copy"
    shutil.copytree(small_folder, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    manifest = store.read_manifest(folder)
    if kind == "missing":
        del tensors["model.norm.weight"]
    elif kind == "extra":
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.ones(2)
    elif kind == "shape":
        tensors["model.norm.weight"] = torch.ones(3)
    else:
        tensors["model.norm.weight"] = torch.randn_like(tensors["model.norm.weight"])
    store.write_tensors(path, tensors)
    with pytest.raises(IntegrityError):
        verify_folder(folder)
    # also when the bytes are those of the manifest
    (folder / store.MANIFEST_NAME).unlink()
    store.write_manifest(folder, {"logits_fingerprint": manifest["logits_fingerprint"]})
    with pytest.raises(QLLError):
        verify_folder(folder)
