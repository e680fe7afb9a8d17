"""A model on disk: model.json (what it is) and model.safetensors (its numbers).

What the config promises is compared with the file's header and size before memory is taken.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qll import store
from qll.bytelm.adapter import unmerged
from qll.bytelm.config import VOCAB, ModelConfig
from qll.bytelm.model import ByteModel
from qll.bytelm.runfiles import model_folder
from qll.errors import (
    ConfigError,
    MissingFileError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    TruncatedFileError,
    UsageError,
)

ARCHITECTURE = "qll-byte-model"
CONFIG_NAME = "model.json"
TENSORS_NAME = "model.safetensors"
FLOATS = ("F32", "BF16", "F16", "F64")  # read as float32


def save_model(folder: Path, model: ByteModel) -> None:
    """Write `model` to `folder`, atomically file by file; model.json, written last, completes it.

    Raises OutputError when the folder cannot be written.
    """
    store.make_folder(folder)
    # a model that is read has its adapters beside its weights, never in them
    stored, tensors = _tensors(model), unmerged(model)
    tensors = {name: tensors[name].detach().cpu() for name in stored}
    store.write_tensors(folder / TENSORS_NAME, tensors)
    facts = {"architecture": ARCHITECTURE, "vocabulary": VOCAB, "config": model.config.to_dict()}
    store.write_json(folder / CONFIG_NAME, facts)


def load_model(folder: Path, device: torch.device | str = "cpu") -> ByteModel:
    """The model that `save_model` wrote to `folder`, in eval mode on `device`.

    Raises MissingFileError, ConfigError (another architecture or vocabulary, or a setting this
    version does not have), TruncatedFileError, ShapeError, MissingTensorError or NonFiniteError.

    >>> import tempfile; folder = Path(tempfile.mkdtemp())
    >>> save_model(folder, ByteModel(ModelConfig(d_model=32, n_layers=1)))
    >>> load_model(folder).config.d_model
    32
    """
    config = _read_config(Path(folder) / CONFIG_NAME)
    with torch.device("meta"):
        model = ByteModel(config)
    tensors = _read_tensors(Path(folder) / TENSORS_NAME, _tensors(model))
    model.load_state_dict(tensors, strict=False, assign=True)
    if config.tie:
        model.head.weight = model.embedding.weight
    return model.to(device).eval()


def load_lm(run: Path | str, device: torch.device | str = "cpu") -> ByteModel:
    """The best model of a training run (or the model in this very folder), in eval mode.

    Raises what `load_model` raises.
    """
    return load_model(model_folder(Path(run)), device)


def _tensors(model: ByteModel) -> dict[str, Tensor]:
    """What is stored: a tied head is the embedding and is not written twice."""
    tied = {"head.weight"} if model.config.tie else set()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _read_config(path: Path) -> ModelConfig:
    facts = store.read_json(path)
    found = facts.get("architecture") if isinstance(facts, dict) else None
    if found != ARCHITECTURE:
        raise ConfigError(
            "a model of another architecture",
            where=path,
            expected=ARCHITECTURE,
            found=found,
            hint="give a folder written by `qll lm train`",
        )
    if facts.get("vocabulary") != VOCAB:
        raise ConfigError(
            "another vocabulary", where=path, expected=VOCAB, found=facts.get("vocabulary")
        )
    try:
        return ModelConfig.from_dict(facts.get("config"))
    except UsageError as error:
        raise ConfigError("not a config of ours", where=path, found=error) from None


def _read_tensors(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the file, once names, shapes and size have been compared."""
    if not path.is_file():
        raise MissingFileError("no such file", where=path, hint="train the model again")
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            _compare(path, found, expected)
            tensors = {name: file.get_tensor(name).float() for name in expected}
    except (SafetensorError, OSError) as error:
        raise TruncatedFileError(
            "cannot be read as safetensors", where=path, found=error, hint="copy it again"
        ) from None
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteError("not finite", where=f"{path}: {name}", hint="train it again")
    return tensors


def _compare(path: Path, found: dict[str, Any], expected: dict[str, Tensor]) -> None:
    """Names, shapes and kinds of numbers in the header against those of the config."""
    for name in sorted(found.keys() ^ expected.keys()):
        what = "missing" if name in expected else "not part of this model"
        raise MissingTensorError(what, where=f"{path}: {name}")
    for name, tensor in expected.items():
        shape, dtype = tuple(found[name].get_shape()), found[name].get_dtype()
        if shape != tuple(tensor.shape) or dtype not in FLOATS:
            raise ShapeError(
                "wrong shape or type",
                where=f"{path}: {name}",
                expected=f"{tuple(tensor.shape)} of {', '.join(FLOATS)}",
                found=f"{shape} of {dtype}",
            )
