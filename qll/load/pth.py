"""PyTorch .pth files: opened without running code, mapped rather than read, and never believed.

A .pth is a zip of one pickle and the raw storages (torch >= 1.6), or a bare pickle stream (older).
Only `torch.load(weights_only=True)` ever touches the pickle; a zip is mapped, so that opening
16 GB costs milliseconds. What a pickle claims about a tensor is compared with the bytes of its
storage, since an expanded stride makes a terabyte out of one number.
"""

from __future__ import annotations

import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qll.errors import (
    CheckpointError,
    HeaderError,
    MissingTensorError,
    ShapeError,
    TruncatedFileError,
    UnsafeCheckpointError,
)
from qll.load.checkpoint import TensorSpec
from qll.load.files import shown

# 405B's pickle is under 1 MB
MAX_PICKLE_BYTES = MAX_DIRECTORY_BYTES = 16 << 20
ZIP_MAGIC, PICKLE_MAGIC = b"PK\x03\x04", b"\x80"
FOREIGN = ("GLOBAL", "REDUCE", "BUILD", "NEWOBJ", "blocked", "Trying to")
END_RECORD, END_RECORD_64 = b"PK\x05\x06", b"PK\x06\x06"
MAX_TOUCHED_BYTES = 64 << 20
logger = logging.getLogger("qll.load")


class PthFile:
    """The tensors of one .pth file, none of them read yet.

    Raises UnsafeCheckpointError for a pickle that wants more than tensors, TruncatedFileError for
    a torn file, ShapeError for a tensor larger than its bytes, HeaderError for the rest.

    >>> import tempfile; path = Path(tempfile.mkdtemp()) / "a.pth"
    >>> torch.save({"w": torch.ones(3, 2)}, path)
    >>> file = PthFile(path); file.specs
    {'w': TensorSpec(shape=(3, 2), dtype=torch.float32)}
    >>> file.rows("w", 0, 1)
    tensor([[1., 1.]])
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_zip = _is_zip(path)
        self._tensors: Mapping[Any, Any] | None = _load(path, self._is_zip)
        self._touched = 0
        self.specs = {name: _spec(tensor, name, path) for name, tensor in self._tensors.items()}
        if not self._is_zip:
            logger.warning("%s is in an old format: all of it is kept in memory", path)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop-1 over mapped memory: copy them and let go."""
        if self._tensors is None:
            self._tensors = _load(self.path, self._is_zip)
        tensor = self._tensors.get(name)
        if tensor is None or _spec(tensor, name, self.path) != self.specs[name]:
            raise HeaderError("file changed while being read", where=self.path, found=shown(name))
        part = tensor.detach()[start:stop]
        self._touched += part.nbytes
        # pages that were read count as this process's memory until the file is unmapped
        if self._is_zip and self._touched > MAX_TOUCHED_BYTES:
            self._tensors, self._touched = None, 0
        return part

    def __reduce__(self) -> tuple[type[PthFile], tuple[Path]]:
        """Sent to another process, the file is opened again there."""
        return PthFile, (self.path,)


def _is_zip(path: Path) -> bool:
    """Whether the file is of today's format, which can be mapped; raises for neither format."""
    with open(path, "rb") as file:
        magic = file.read(4)
    if not magic:
        raise TruncatedFileError("PyTorch file is empty", where=path, hint="download it again")
    if magic == ZIP_MAGIC:
        _require_plain_zip(path)
    elif not magic.startswith(PICKLE_MAGIC):
        raise HeaderError("not a PyTorch file", where=path, found=f"first bytes {magic!r}")
    return magic == ZIP_MAGIC


def _load(path: Path, mapped: bool) -> Mapping[Any, Any]:
    """What the file holds; nothing in it is known to be a tensor yet."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise _unpickling_error(path, error) from None
    except Exception as error:  # a hostile pickle can make its reader raise anything
        raise HeaderError(
            "not a readable PyTorch file",
            where=path,
            found=f"{type(error).__name__}: {shown(error, 120)}",
            hint="the download is incomplete or the file damaged: fetch it again",
        ) from None
    if not isinstance(tensors, Mapping):
        raise HeaderError(
            "not a table of tensors", where=path, expected="a dict", found=type(tensors).__name__
        )
    return tensors


def _unpickling_error(path: Path, error: pickle.UnpicklingError) -> CheckpointError:
    """Unsafe when the pickle asks for a function or a type, a header error when it is garbage."""
    text = str(error)
    if any(word in text for word in FOREIGN):
        # torch's own advice, to allow what the file asks for, is not for files of strangers
        asked = re.search(r"GLOBAL (\S+)", text)
        return UnsafeCheckpointError(
            "pickle asks for more than tensors, so it was not run",
            where=path,
            found=shown(asked[1]) if asked else "an instruction that is not allowed",
            hint="use a checkpoint from a source you trust, as safetensors if there is one",
        )
    return HeaderError(
        "not a readable PyTorch file",
        where=path,
        found="a pickle with instructions that tensors do not need",
        hint="the download is incomplete or the file damaged: fetch it again",
    )


def _spec(tensor: object, name: object, path: Path) -> TensorSpec:
    """The spec of a tensor as the pickle built it, proven to be backed by bytes of the file."""
    where = f"{path}: {shown(name)}"
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise MissingTensorError(
            "entry is not a named tensor", where=where, found=type(tensor).__name__
        )
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise ShapeError("tensor is not a plain one", where=where, found=str(tensor.layout))
    claimed = tensor.numel() * tensor.itemsize
    backed = min(tensor.untyped_storage().nbytes(), path.stat().st_size)
    if claimed > backed:
        raise ShapeError(
            "tensor claims more than is in the file",
            where=where,
            expected=f"at most {backed} bytes",
            found=f"{claimed} bytes, shape {tuple(tensor.shape)}",
            hint="the file is damaged or hostile",
        )
    return TensorSpec(tuple(tensor.shape), tensor.dtype)


def _require_plain_zip(path: Path) -> None:
    """Raise unless the zip is as torch writes it: stored entries that lie inside the file."""
    size = path.stat().st_size
    if (directory := _directory_bytes(path, size)) > MAX_DIRECTORY_BYTES:
        raise HeaderError(
            "zip directory is too large",
            where=path,
            expected=f"at most {MAX_DIRECTORY_BYTES} bytes",
            found=directory,
        )
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile raises struct, value and unicode errors for bad bytes
        raise HeaderError("zip directory is damaged", where=path, found=shown(error, 120)) from None
    names = [entry.filename for entry in entries]
    pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or len(set(names)) != len(names):
        raise HeaderError(
            "zip is not one PyTorch archive", where=path, found=", ".join(map(shown, names[:3]))
        )
    if pickles[0].file_size > MAX_PICKLE_BYTES:
        raise HeaderError("pickle is too large", where=path, found=pickles[0].file_size)
    for entry in entries:
        stored = entry.compress_type == zipfile.ZIP_STORED
        if not stored or entry.file_size != entry.compress_size:
            raise HeaderError("zip entry is compressed", where=path, found=shown(entry.filename))
        if entry.header_offset + entry.file_size > size:
            raise TruncatedFileError("zip entry ends after the file", where=path)


def _directory_bytes(path: Path, size: int) -> int:
    """Size of the zip's central directory; TruncatedFileError when there is no end record."""
    with open(path, "rb") as file:
        file.seek(max(0, size - (1 << 17)))
        tail = file.read()
    place = tail.rfind(END_RECORD)
    if place < 0 or len(tail) - place < 22:
        raise TruncatedFileError(
            "PyTorch file has no end",
            where=path,
            expected="a zip directory at its end",
            found=f"{size} bytes",
            hint="the download is incomplete: fetch it again",
        )
    found = int.from_bytes(tail[place + 12 : place + 16], "little")
    place = tail.rfind(END_RECORD_64, 0, place)
    if found == 0xFFFFFFFF and place >= 0:
        found = int.from_bytes(tail[place + 40 : place + 48], "little")
    return found
