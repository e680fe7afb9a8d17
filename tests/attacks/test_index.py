"""Index files, config files and links that point elsewhere or are not what they should be."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from qll.errors import (
    CheckpointError,
    ConfigError,
    HeaderError,
    MissingFileError,
    MissingTensorError,
    UnsafeCheckpointError,
)
from qll.load import open_source
from tests.checkpoints import write_hf_folder, write_meta_folder

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path, tiny_llama) -> Path:
    """The tiny Llama in several files with an index."""
    return write_hf_folder(tiny_llama, tmp_path / "model", max_shard_size="100KB")


def point(folder: Path, target: object) -> None:
    """Make the index claim that the final norm is in `target`."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = target
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "target",
    [
        "../outside.safetensors",
        "sub/../../outside.safetensors",
        "/etc/passwd",
        "..\\outside.safetensors",
        "",
        "a\0b",
        "a\ud800b",
        "a\nb",
        None,
        7,
        ["model.safetensors"],
    ],
)
def test_index_may_not_point_outside(folder, target):
    shutil.copy(next(folder.glob("*.safetensors")), folder.parent / "outside.safetensors")
    point(folder, target)
    with pytest.raises((UnsafeCheckpointError, HeaderError)):
        open_source(folder)


def test_link_may_not_leave_the_folder(folder):
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.rename(folder.parent / "elsewhere.safetensors")
    shard.symlink_to("../elsewhere.safetensors")
    with pytest.raises(UnsafeCheckpointError, match="outside its folder"):
        open_source(folder)


def test_folder_link_may_not_leave_the_folder(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(next(folder.glob("*.safetensors")), tmp_path / "elsewhere" / "x.safetensors")
    (folder / "sub").symlink_to("../elsewhere")
    point(folder, "sub/x.safetensors")
    with pytest.raises(UnsafeCheckpointError):
        open_source(folder)


def test_cache_layout_does_not_excuse_other_places(folder, tmp_path):
    """Only blobs/ of the same cache may be linked to, not the rest of the disk."""
    snapshot = tmp_path / "cache" / "snapshots" / "abc"
    shutil.copytree(folder, snapshot)
    shard = sorted(snapshot.glob("model-*.safetensors"))[0]
    shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UnsafeCheckpointError):
        open_source(snapshot)


def test_link_that_turns_in_a_circle(folder):
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    shard.unlink()
    shard.symlink_to(shard.name)
    with pytest.raises(CheckpointError):
        open_source(folder)


def test_meta_shard_may_not_leave_the_folder(tmp_path, tiny_llama):
    folder = write_meta_folder(tiny_llama, tmp_path / "m", 2)
    (folder / "consolidated.01.pth").rename(tmp_path / "x.pth")
    (folder / "consolidated.01.pth").symlink_to("../x.pth")
    with pytest.raises(UnsafeCheckpointError):
        open_source(folder)


def test_missing_shard_is_named(folder):
    shard = sorted(folder.glob("model-*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises(MissingFileError, match=shard.name):
        open_source(folder)


def test_shard_that_is_a_folder_or_a_pipe(folder):
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    shard.unlink()
    shard.mkdir()
    with pytest.raises(MissingFileError):
        open_source(folder)
    shard.rmdir()
    os.mkfifo(shard)
    with pytest.raises(MissingFileError):
        open_source(folder)


def test_tensor_the_index_forgot_or_invented(folder):
    index = json.loads((folder / INDEX).read_text())
    full = dict(index["weight_map"])
    index["weight_map"] = {k: v for k, v in full.items() if k != "model.norm.weight"}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(MissingTensorError, match=r"model\.norm\.weight"):
        open_source(folder)
    index["weight_map"] = full | {"model.extra.weight": full["model.norm.weight"]}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(MissingTensorError, match=r"model\.extra\.weight"):
        open_source(folder)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000, '{"a":1,"a":2}'],
)
def test_index_that_is_not_one(folder, text):
    (folder / INDEX).write_text(text)
    with pytest.raises(HeaderError):
        open_source(folder)


@pytest.mark.parametrize("text", ["", "null", "[1]", "{", "\ud800", "[" * 100_000, "1" * 10_000])
@pytest.mark.parametrize("name", ["config.json", "params.json"])
def test_config_that_is_not_one(tmp_path, tiny_hf_folder, tiny_meta_folder, text, name):
    origin = tiny_hf_folder if name == "config.json" else tiny_meta_folder
    folder = Path(shutil.copytree(origin, tmp_path / "copy"))
    (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError, match=name):
        open_source(folder)


def test_config_of_gigabytes_is_not_read(tmp_path, tiny_hf_folder):
    folder = Path(shutil.copytree(tiny_hf_folder, tmp_path / "copy"))
    with open(folder / "config.json", "wb") as file:
        file.truncate(8 << 30)
    with pytest.raises(ConfigError, match="too large"):
        open_source(folder)


def test_code_in_the_folder_is_never_run(tmp_path, tiny_hf_folder, tiny_llama):
    folder = Path(shutil.copytree(tiny_hf_folder, tmp_path / "copy"))
    (folder / "modeling_evil.py").write_text("raise SystemExit('ran')")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_evil.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    assert open_source(folder).config.hidden_size == tiny_llama.config.hidden_size


def test_error_messages_are_one_line_that_names_the_file(folder):
    point(folder, "../x\n\x1b[31m.safetensors")
    with pytest.raises(UnsafeCheckpointError) as caught:
        open_source(folder)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_file_without_permission(folder):
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    shard.chmod(0)
    with pytest.raises(MissingFileError, match="permission"):
        open_source(folder)


def test_endless_file_name(folder):
    point(folder, "x" * 5000)
    with pytest.raises(MissingFileError):
        open_source(folder)
