"""Find autoencoders below a folder, and open one of them: sparsify, SAELens or Llama Scope.

>>> import tempfile
>>> import torch
>>> from qll.load.sae_file import LatentMatrix, SAESpec
>>> from qll.load.sae_write import write_sparsify
>>> folder, spec = Path(tempfile.mkdtemp()), SAESpec("layers.3", 2, 4, 2, "topk", k=1)
>>> zeros = {"b_enc": torch.zeros(4), "b_dec": torch.zeros(2)}
>>> matrix = LatentMatrix(torch.ones(4, 2))
>>> write_sparsify(StoredSAE(spec, matrix, matrix, zeros), folder / "layers.3")
>>> sorted(find_saes(folder)), open_sae(folder, "blocks.3.hook_resid_post").spec.d_sae
(['layers.3'], 4)
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from qll.errors import CheckpointError, MissingFileError, UsageError
from qll.load import sae_llamascope, sae_saelens, sae_sparsify
from qll.load.files import read_object, readable, shown
from qll.load.sae_file import StoredSAE
from qll.load.sae_names import LEGACY, hookpoint_of

# repository/layer/width/sparsity is the deepest layout that is published
MAX_DEPTH = 4
MAX_FOLDERS = 4096
# what --sae_dir calls the autoencoders that come with the package, of the model that comes with it
EMBEDDED = "embedded"
EMBEDDED_FOLDER = Path(__file__).parents[1] / "saes" / "smollm2-135m"
SEED = re.compile(r"seed\d+")
# files that make a folder an autoencoder -> its format
MARKS = {
    sae_sparsify.WEIGHTS: "sparsify",
    sae_saelens.WEIGHTS: "saelens",
    sae_llamascope.CONFIG: "llama_scope",
}

logger = logging.getLogger("qll.load")


@dataclass(frozen=True)
class FoundSAE:
    """A folder with an autoencoder, not opened yet."""

    folder: Path
    path: str
    """Relative to the folder that was searched; `.` for itself."""
    format: str
    hookpoint: str | None
    """The place it is about, by the house's name; None when neither path nor config tell."""


def find_saes(folder: str | Path) -> dict[str, FoundSAE]:
    """Every autoencoder in `folder` and below it, by its path relative to `folder`.

    The word `embedded` is the folder that comes with the package. Reads only small JSON files.
    Raises MissingFileError when there is no such folder.
    """
    folder = EMBEDDED_FOLDER if str(folder) == EMBEDDED else Path(folder).expanduser()
    if not folder.is_dir():
        raise MissingFileError(
            "there is no such folder of autoencoders", where=folder, hint="check the path"
        )
    folder, found = folder.resolve(), {}
    with readable(folder):
        for count, (place, inner, files) in enumerate(os.walk(folder)):
            path = Path(place)
            relative = path.relative_to(folder)
            inner.sort()
            if len(relative.parts) >= MAX_DEPTH or count >= MAX_FOLDERS:
                inner.clear()
            kind = _format(set(files))
            if kind is not None:
                name = relative.as_posix()
                found[name] = FoundSAE(path, name, kind, _hookpoint(path, relative, kind))
    return found


def open_sae(folder: str | Path, hookpoint: str | None = None) -> StoredSAE:
    """The autoencoder of `folder` at `hookpoint`: a place's name, or its path below `folder`.

    None is the only one there. Big matrices stay in the file. Raises MissingFileError naming what
    the folder holds when there is none at that place, UsageError when there are several, and what
    the formats raise.
    """
    chosen = _choose(Path(folder), find_saes(folder), hookpoint)
    with readable(chosen.folder):
        if chosen.format == "saelens":
            return sae_saelens.read_saelens(chosen.folder)
        if chosen.format == "llama_scope":
            return sae_llamascope.read_llamascope(chosen.folder)
        place = chosen.hookpoint or hookpoint
        if place is None:
            raise UsageError(
                "the folder's name does not tell where the autoencoder belongs",
                where=chosen.folder,
                hint="name the hookpoint, for instance layers.7",
            )
        _warn_of_legacy(chosen)
        return sae_sparsify.read_sparsify(chosen.folder, place)


def _choose(folder: Path, found: dict[str, FoundSAE], hookpoint: str | None) -> FoundSAE:
    if hookpoint in found:
        return found[hookpoint]
    if hookpoint is None:
        matches = list(found.values())
    else:
        wanted = hookpoint_of(hookpoint)
        matches = [sae for sae in found.values() if sae.hookpoint == wanted]
        if set(found) == {"."} and found["."].hookpoint is None:
            matches = [found["."]]
    if len(matches) == 1:
        return matches[0]
    if not matches:
        raise MissingFileError(
            "there is no autoencoder at this place" if found else "no autoencoder in this folder",
            where=folder,
            expected=shown(hookpoint) if found else "cfg.json beside sae.safetensors",
            found=_listed(found.values()),
            hint="name one of those found" if found else "give the folder of a download",
        )
    raise UsageError(
        "several autoencoders fit",
        where=folder,
        expected="the path of one of them",
        found=", ".join(shown(sae.path) for sae in matches[:6]),
    )


def _listed(found: object, most: int = 40) -> str:
    names = [shown(sae.hookpoint or sae.path) for sae in found]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) + more) or "none"


def _format(files: set[str]) -> str | None:
    for mark, kind in MARKS.items():
        if mark in files:
            return kind
    # a download without its weights is still to be named in an error
    return "sparsify" if sae_sparsify.CONFIG in files else None


def _hookpoint(path: Path, relative: Path, kind: str) -> str | None:
    """What the config says, or the last part of the path that names a place."""
    try:
        if kind == "saelens":
            config = read_object(path / sae_saelens.CONFIG)
            reads, writes = sae_saelens.hook_names(config)
            return hookpoint_of(writes or reads)
        if kind == "llama_scope":
            config = read_object(path / sae_llamascope.CONFIG)
            return hookpoint_of(str(config.get("hook_point_out")))
    except (CheckpointError, UsageError):
        return None  # said when this one is asked for by its path
    parts = relative.parts or (path.name,)
    for part in reversed(parts):
        if not SEED.fullmatch(part):
            try:
                return hookpoint_of(part)
            except UsageError:
                return None
    return None


def _warn_of_legacy(chosen: FoundSAE) -> None:
    if LEGACY.fullmatch(chosen.folder.name):
        logger.warning(
            "%s: the old name %s means the input of that block, so it is used at %s",
            chosen.folder,
            chosen.folder.name,
            chosen.hookpoint,
        )
