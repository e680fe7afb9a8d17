"""Hugging Face folders: config.json beside one safetensors file or several with an index.

A folder that has only `original/` (Meta's files as Hugging Face hosts them) is read by
qll.load.meta with this folder's config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qll.errors import HeaderError, MissingFileError, MissingTensorError
from qll.load.checkpoint import Checkpoint, drop_tied_head
from qll.load.config import hf_config
from qll.load.files import inside, read_object, shown
from qll.load.meta import open_meta
from qll.load.names import is_skipped
from qll.load.safetensors import SafeTensor, read_safetensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def open_hf(folder: Path) -> Checkpoint:
    """The checkpoint of a Hugging Face folder.

    Raises MissingFileError, ConfigError, or what the weight files make of themselves.
    """
    config = hf_config(read_object(folder / "config.json"), folder / "config.json")
    if not _has(folder, SINGLE) and not _has(folder, INDEX):
        if (folder / "original").is_dir():
            return open_meta(folder / "original", config=config, path=folder)
        raise _no_weights(folder)
    found = _read_single(folder) if _has(folder, SINGLE) else _read_sharded(folder)
    tensors = {name: tensor for name, tensor in found.items() if not is_skipped(name)}
    if config.tie_word_embeddings:
        drop_tied_head(tensors, folder)
    return Checkpoint(
        path=folder,
        name=folder.name,
        format="hf",
        row_order="half_split",
        config=config,
        files=tuple(sorted({tensor.path for tensor in found.values()})),
        tensors=tensors,
    )


def _has(folder: Path, name: str) -> bool:
    path = folder / name
    return path.is_file() or path.is_symlink()


def _read_single(folder: Path) -> dict[str, SafeTensor]:
    return read_safetensors(inside(folder, SINGLE))


def _read_sharded(folder: Path) -> dict[str, SafeTensor]:
    """The tensors of all files that the index names, where the index says they are."""
    index = read_object(inside(folder, INDEX), HeaderError)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise HeaderError("index has no weight_map", where=folder / INDEX)
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise HeaderError("weight_map holds something else than file names", where=folder / INDEX)
    files = {name: inside(folder, name) for name in dict.fromkeys(weight_map.values())}
    found: dict[str, SafeTensor] = {}
    for file_name, path in files.items():
        for name, tensor in read_safetensors(path).items():
            if weight_map.get(name) != file_name:
                raise MissingTensorError(
                    "tensor is not where the index says",
                    where=folder / INDEX,
                    expected=f"{shown(name)} in {shown(weight_map.get(name))}",
                    found=shown(file_name),
                    hint="index and shards are of different downloads",
                )
            found[name] = tensor
    if missing := sorted(set(weight_map) - set(found)):
        raise MissingTensorError(
            "the index names tensors that no shard holds",
            where=folder / INDEX,
            found=", ".join(map(shown, missing[:3])),
        )
    return found


def _no_weights(folder: Path) -> MissingFileError:
    others = sorted(
        file.name for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern)
    )
    return MissingFileError(
        "no weights in a Hugging Face folder",
        where=folder,
        expected=f"{SINGLE}, {INDEX} or original/",
        found=", ".join(others[:4]) or "none of them",
        hint="download the safetensors files of the model, with their index",
    )
