"""A converted folder in which one bit has turned is never opened, and none runs its own code."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from qll import store
from qll.errors import CheckpointError, IntegrityError
from qll.load import open_tokenizer
from qll.model import load
from tests.conftest import make_tiny_llama
from tests.unit.model.conftest import write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = make_tiny_llama(seed=3)
    path = tmp_path_factory.mktemp("rot") / "model"
    return write_folder(path, model, rank_of=lambda full: full // 4)


def flips(folder, count: int):
    """(file, byte, bit): half of them anywhere in the folder, half spread evenly over the files."""
    hand = random.Random(0)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    for place in range(count):
        even = place % 2
        path = files[place // 2 % len(files)] if even else hand.choices(files, sizes)[0]
        yield path, hand.randrange(path.stat().st_size), hand.randrange(8)


def test_each_of_200_flipped_bits_is_noticed(folder):
    touched = set()
    for path, place, bit in flips(folder, 200):
        good = path.read_bytes()
        bad = bytearray(good)
        bad[place] ^= 1 << bit
        path.write_bytes(bad)
        try:
            with pytest.raises(CheckpointError) as caught:
                load(folder)
            assert str(folder) in str(caught.value), (path.name, place, bit)
        finally:
            path.write_bytes(good)
        touched.add(path.name)
    assert {"config.json", "model.safetensors", store.MANIFEST_NAME} <= touched
    load(folder)


def test_a_changed_number_in_the_manifest_is_noticed(folder):
    path = folder / store.MANIFEST_NAME
    good = path.read_text()
    for change in ({"source": "other"}, {"files": {}}, {"logits_fingerprint": None}):
        path.write_text(json.dumps(json.loads(good) | change))
        with pytest.raises(IntegrityError, match="manifest has changed"):
            load(folder)
    for text in ("[]", "{}", "null", "{"):
        path.write_text(text)
        with pytest.raises(IntegrityError, match="qll_manifest"):
            load(folder)
    # other white space is not another manifest
    path.write_text(json.dumps(json.loads(good)))
    load(folder)
    path.write_text(good)


def test_an_index_that_is_not_one_is_refused_even_without_the_manifest(folder, tmp_path):
    index = folder / "model.safetensors.index.json"
    for text in ("[]", "{}", '{"weight_map": 7}', '{"weight_map": {"a": 7}}', "{", "\xff"):
        index.write_text(text, "latin-1")
        with pytest.raises(IntegrityError, match=r"index\.json"):
            load(folder, verify=False)
    index.unlink()


def test_code_and_pickles_in_the_folder_are_never_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    ran = tmp_path / "ran"
    (copy / "modeling_qll.py").write_text(f"open({str(ran)!r}, 'w')\n")
    auto_map = {"AutoTokenizer": ["modeling_qll.Evil", "modeling_qll.Evil"]}
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(settings | {"auto_map": auto_map}))
    with pytest.raises(IntegrityError, match=r"has changed|another size"):
        load(copy)
    load(copy, verify=False)
    open_tokenizer(copy)
    (copy / "model.safetensors").unlink()
    torch.save({"model.norm.weight": RunsCode(ran)}, copy / "pytorch_model.bin")
    with pytest.raises(IntegrityError, match="no tensors"):
        load(copy, verify=False)
    assert not ran.exists()


class RunsCode:
    """A pickle of it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)
