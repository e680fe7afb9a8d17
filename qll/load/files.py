"""Reading files that may lie: bounded JSON, paths that stay inside, exact reads, digests."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qll.errors import (
    CheckpointError,
    ConfigError,
    MissingFileError,
    TruncatedFileError,
    UnsafeCheckpointError,
)

MAX_JSON_BYTES = 64 << 20
LFS_POINTER = b"version https://git-lfs"
SAMPLES, SAMPLE_BYTES = 64, 4096


def read_object(path: Path, error: type[CheckpointError] = ConfigError) -> dict[str, Any]:
    """The JSON object in `path`; raises MissingFileError, or `error` when it is not one object.

    >>> import tempfile; path = Path(tempfile.mkdtemp()) / "config.json"
    >>> _ = path.write_text('{"model_type": "llama"}'); read_object(path)
    {'model_type': 'llama'}
    """
    if not path.is_file():
        raise MissingFileError("file not found", where=path)
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise error("file is too large for JSON", where=path, expected=MAX_JSON_BYTES, found=size)
    return parse_object(path.read_bytes(), path, error)


def parse_object(data: bytes, where: Path, error: type[CheckpointError]) -> dict[str, Any]:
    """The JSON object in `data`, keys not repeated; raises `error` otherwise."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as problem:
        raise error("not valid JSON", where=where, found=str(problem)[:200]) from None
    if not isinstance(value, dict):
        raise error("not a JSON object", where=where, found=type(value).__name__)
    return value


def inside(folder: Path, name: str) -> Path:
    """The existing file `name` of `folder`, proven not to lie elsewhere.

    Raises UnsafeCheckpointError for an absolute path, `..`, or a link that leaves the folder
    (links of a Hugging Face cache, snapshots/X -> blobs, are allowed), MissingFileError if absent.

    >>> inside(Path("."), "pyproject.toml").name
    'pyproject.toml'
    """
    if not name or not name.isprintable():
        raise UnsafeCheckpointError("not a file name", where=folder, found=repr(shown(name, 200)))
    if Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name:
        raise _escapes(folder, name)
    path = folder / name
    root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parent.parent / "blobs")
    if not any(target.is_relative_to(allowed) for allowed in roots):
        raise _escapes(folder, name)
    if not path.is_file():
        raise MissingFileError(
            "file not found", where=path, hint="the download is incomplete: fetch it again"
        )
    reject_pointer(path)
    return path


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what the operating system says about files under `path` into a MissingFileError."""
    try:
        yield
    except OSError as error:
        raise MissingFileError(
            "cannot be read",
            where=error.filename or path,
            found=error.strerror or str(error),
            hint="check the file and its permissions",
        ) from None


def shown(name: object, limit: int = 80) -> str:
    r"""A name from a file as it may be printed: no control characters, not endless.

    >>> print(shown("red\x1b[31m"))
    red\x1b[31m
    """
    return str(name)[:limit].encode("unicode_escape").decode()


def reject_pointer(path: Path) -> None:
    """Raise MissingFileError if `path` is a Git LFS pointer instead of the file itself."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise MissingFileError(
                "file is a Git LFS pointer, not the weights",
                where=path,
                found=f"{path.stat().st_size} bytes",
                hint="run `git lfs pull` in its folder",
            )


def read_tensor(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A fresh tensor from the little-endian bytes of `path` at `offset`; one copy, no mapping.

    Mapped pages would count as this process's memory and a file that shrinks would kill it.
    """
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.numel() == 0:
        return tensor
    with open(path, "rb", buffering=0) as file:
        _fill(file, tensor, offset, path)
    return tensor


def read_pieces(path: Path, offsets: Sequence[int], length: int, dtype: torch.dtype) -> Tensor:
    """A fresh [pieces, length] tensor: one row from the bytes of `path` at each of `offsets`."""
    tensor = torch.empty(len(offsets), length, dtype=dtype)
    if tensor.numel():
        with open(path, "rb", buffering=0) as file:
            for row, offset in zip(tensor, offsets, strict=True):
                _fill(file, row, offset, path)
    return tensor


def _fill(file: BinaryIO, tensor: Tensor, offset: int, path: Path) -> None:
    """Fill the contiguous `tensor` from the bytes of `file` at `offset`."""
    view = memoryview(tensor.view(-1).view(torch.uint8).numpy())
    file.seek(offset)
    done = 0
    while done < len(view):
        if not (count := file.readinto(view[done:])):
            raise TruncatedFileError(
                "file ended inside a tensor",
                where=path,
                expected=f"{offset + len(view)} bytes",
                found=f"{offset + done} bytes",
                hint="it changed while being read, or the download is incomplete",
            )
        done += count


def digest_file(digest: Any, path: Path) -> None:
    """Feed name, size and evenly spaced samples of `path` (all of a small file) to a hash."""
    size = path.stat().st_size
    digest.update(f"{path.name}:{size}".encode())
    with open(path, "rb") as file:
        if size <= SAMPLES * SAMPLE_BYTES:
            digest.update(file.read())
            return
        for sample in range(SAMPLES):
            file.seek(sample * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key is given twice")
    return value


def _escapes(folder: Path, name: str) -> UnsafeCheckpointError:
    return UnsafeCheckpointError(
        "file name points outside its folder",
        where=folder,
        found=repr(shown(name, 200)),
        hint="copy the file into the folder if you trust it",
    )
