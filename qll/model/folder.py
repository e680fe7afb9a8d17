"""Open a converted folder, trusting nothing: bytes, keys and logits are all checked.

transformers' `from_pretrained` opens the same folders with the key check alone; this is the way for
everything of ours. No code from the folder is executed.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from qll import store
from qll.errors import IntegrityError, MissingFileError
from qll.model.files import read_weight_map, seal
from qll.model.fingerprint import check_fingerprint, compare, logits_fingerprint
from qll.model.llama_tn import LlamaTNForCausalLM
from qll.model.quantizer import MODEL_TYPE
from qll.model.streamed import is_large, streamed_fingerprint


def load(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> LlamaTNForCausalLM:
    """The converted model in `folder`, in evaluation mode; `dtype` None keeps the stored one.

    With `verify`, every file must match its sha256 in the manifest and 16 tokens must give the
    recorded logits. Missing, unexpected or mismatched tensors raise with or without it. Raises
    MissingFileError or IntegrityError.

    >>> load("no/such/folder")
    Traceback (most recent call last):
    ...
    qll.errors.MissingFileError: no/such/folder: no such folder
    """
    folder = Path(folder)
    require_converted(folder)
    manifest = store.verify_manifest(folder) if verify else None
    read_weight_map(folder)  # refuses an index that points outside the folder
    with _bars_only_on_a_terminal():
        model = LlamaTNForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", local_files_only=True, trust_remote_code=False
        )
    model.to(device)
    if manifest is not None:
        _require_fingerprint(model, manifest, folder)
    return model


def commit_folder(folder: str | Path, facts: Mapping[str, Any]) -> None:
    """Finish a converted folder: open it as a user would, then write its manifest, the last file.

    The manifest holds `facts`, the logits fingerprint and the sha256 of every file. Raises
    IntegrityError when the tensors are not the ones that config.json asks for. A folder above 4 GB
    is opened block by block.
    """
    folder = Path(folder)
    if is_large(folder):
        found = streamed_fingerprint(folder)
    else:
        found = logits_fingerprint(load(folder, verify=False))
    seal(folder, found, facts)


def verify_folder(folder: str | Path) -> None:
    """Check bytes, keys and logits of a converted folder, as `load` does; one above 4 GB block by
    block. Raises MissingFileError or IntegrityError.

    >>> verify_folder("no/such/folder")
    Traceback (most recent call last):
    ...
    qll.errors.MissingFileError: no/such/folder: no such folder
    """
    folder = Path(folder)
    require_converted(folder)
    manifest = store.verify_manifest(folder)
    if not is_large(folder):
        _require_fingerprint(load(folder, verify=False), manifest, folder)
        return
    _require_recorded(manifest, folder)
    compare(streamed_fingerprint(folder), manifest["logits_fingerprint"], where=folder)


def require_converted(folder: Path) -> None:
    """Raise unless `folder` looks like the output of a conversion."""
    if not folder.is_dir():
        raise MissingFileError("no such folder", where=folder)
    if not (folder / "config.json").is_file():
        raise MissingFileError("no config.json in this folder", where=folder)
    config = store.read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
        raise IntegrityError(
            "not a converted checkpoint",
            where=folder,
            expected=f"model_type {MODEL_TYPE}",
            found=config.get("model_type") if isinstance(config, dict) else type(config).__name__,
            hint="convert it first, or open it with qll.open",
        )


@contextlib.contextmanager
def _bars_only_on_a_terminal() -> Iterator[None]:
    """transformers draws its progress bar even into files; ours are silent there."""
    quiet = not sys.stderr.isatty() and logging.is_progress_bar_enabled()
    if quiet:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if quiet:
            logging.enable_progress_bar()


def _require_fingerprint(model: PreTrainedModel, manifest: dict, folder: Path) -> None:
    _require_recorded(manifest, folder)
    check_fingerprint(model, manifest["logits_fingerprint"], where=folder)


def _require_recorded(manifest: dict, folder: Path) -> None:
    if "logits_fingerprint" not in manifest:
        raise IntegrityError(
            "manifest without a logits fingerprint",
            where=folder / store.MANIFEST_NAME,
            hint="run the conversion again with the same --out to finish it",
        )
