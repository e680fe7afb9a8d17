"""The header of a GGUF file, read with limits: the guard before any number in it is believed.

Format (github.com/ggml-org/ggml, docs/gguf.md): magic, version, counts, key/value metadata, tensor
infos, padding, data. Every length in it is a claim that a hostile or torn file can get wrong; the
reader of the gguf package (0.19) then loops for hours or takes all memory. Here each claim is
compared with the bytes that are there, as Python integers, before anything is allocated.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from qll.errors import CheckpointError, HeaderError, TruncatedFileError
from qll.load.files import shown

# Llama 3's header is 8 MB with 410 thousand strings; 405B has 1,137 tensors
MAX_HEADER_BYTES, MAX_ELEMENTS, MAX_KEYS, MAX_TENSORS = 64 << 20, 1 << 22, 1 << 14, 1 << 16
MAX_DIMS, MAX_NAME_BYTES, DEFAULT_ALIGNMENT = 4, 1 << 16, 32
VERSIONS = (2, 3)
STRING, ARRAY, BOOL = 8, 9, 7
# GGUF value type -> numpy dtype, all little-endian
SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1"}
SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}
LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class GGUFEntry:
    """One tensor as the header describes it: rows first, and its byte range in the file."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata by key (numbers, strings, booleans, lists) and tensors by name."""

    metadata: dict[str, Any] = field(repr=False)
    tensors: dict[str, GGUFEntry] = field(repr=False)


def read_header(path: Path) -> GGUFHeader:
    """The header of the GGUF file `path`.

    Raises TruncatedFileError when the file ends before its header or its tensors do, HeaderError
    for every other lie.

    >>> import tempfile; from gguf import GGUFWriter
    >>> path = Path(tempfile.mkdtemp()) / "a.gguf"; writer = GGUFWriter(path, "llama")
    >>> writer.add_tensor("w", np.zeros((2, 3), np.float32))
    >>> writer.write_header_to_file(); writer.write_kv_data_to_file()
    >>> writer.write_tensors_to_file(); writer.close()
    >>> header = read_header(path); header.metadata["general.architecture"]
    'llama'
    >>> header.tensors["w"].shape
    (2, 3)
    """
    size = path.stat().st_size
    if size < 24:
        raise TruncatedFileError(
            "GGUF file ends inside its header", where=path, expected="24 bytes", found=size
        )
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), min(size, MAX_HEADER_BYTES), access=mmap.ACCESS_READ) as data,
    ):
        reader = _Reader(data, path, size)
        tensor_count, key_count = _counts(reader)
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = reader.strings(1, MAX_NAME_BYTES)[0]
            if key in metadata:
                raise HeaderError("metadata key is given twice", where=path, found=shown(key))
            metadata[key] = reader.value(reader.number("<I"))
        infos = [_tensor_info(reader) for _ in range(tensor_count)]
        position = reader.position
    return GGUFHeader(metadata, _place(infos, position, _alignment(metadata, path), size, path))


class _Reader:
    """A position in the mapped header that cannot leave it."""

    def __init__(self, data: mmap.mmap, path: Path, file_size: int) -> None:
        self.data, self.path, self.file_size = data, path, file_size
        self.position, self.elements = 0, 0

    def take(self, count: int) -> int:
        """Advance by `count` bytes; returns where they start."""
        start = self.position
        if count > len(self.data) - start:
            raise self.ends(start + count)
        self.position = start + count
        return start

    def number(self, layout: str) -> int:
        """One integer of struct layout `layout`."""
        return struct.unpack_from(layout, self.data, self.take(struct.calcsize(layout)))[0]

    def strings(self, count: int, limit: int = MAX_HEADER_BYTES) -> list[str]:
        """`count` strings, each a length and that many bytes of UTF-8.

        One loop that calls nothing of ours: Llama 3's vocabulary has 410 thousand strings.
        """
        data, end, start = self.data, len(self.data), self.position
        texts = []
        for _ in range(count):
            if (first := start + LENGTH.size) > end:
                raise self.ends(first)
            length = LENGTH.unpack_from(data, start)[0]
            if length > limit:
                self.position = first
                raise self.lie("string is longer than allowed", limit, length)
            if (stop := first + length) > end:
                raise self.ends(stop)
            try:
                texts.append(data[first:stop].decode("utf-8"))
            except UnicodeDecodeError as error:
                self.position = first
                raise self.lie("string is not UTF-8", "UTF-8", str(error)[:120]) from None
            start = stop
        self.position = start
        return texts

    def value(self, kind: int) -> Any:
        """A metadata value of GGUF type `kind`."""
        if kind == STRING:
            return self.strings(1)[0]
        if kind == ARRAY:
            return self.array()
        return self.scalars(kind, 1)[0]

    def array(self) -> list[Any]:
        """An array of numbers or strings; arrays of arrays do not occur in Llama files."""
        kind, count = self.number("<I"), self.number("<Q")
        self.elements += count
        if self.elements > MAX_ELEMENTS:
            raise self.lie("metadata arrays are longer than allowed", MAX_ELEMENTS, self.elements)
        if kind != STRING:
            return self.scalars(kind, count)
        if count * 8 > len(self.data) - self.position:
            raise self.ends(self.position + count * 8)
        return self.strings(count)

    def scalars(self, kind: int, count: int) -> list[Any]:
        """`count` numbers or booleans."""
        if kind not in SCALARS:
            raise self.lie("metadata value of unknown type", "GGUF types 0 to 12", kind)
        dtype = np.dtype(SCALARS[kind])
        start = self.take(count * dtype.itemsize)
        values = np.frombuffer(self.data[start : self.position], dtype=dtype).tolist()
        return [bool(value) for value in values] if kind == BOOL else values

    def lie(self, what: str, expected: object, found: object) -> HeaderError:
        """The error for a header that contradicts itself or its limits."""
        return HeaderError(
            what,
            where=f"{self.path} at byte {self.position}",
            expected=expected,
            found=found,
            hint="this is not a valid GGUF file: download it again",
        )

    def ends(self, needed: int) -> CheckpointError:
        """The error for a header that claims bytes that are not there."""
        if len(self.data) < self.file_size:
            return self.lie("header is longer than allowed", f"{MAX_HEADER_BYTES} bytes", needed)
        return TruncatedFileError(
            "GGUF file ends inside its header",
            where=self.path,
            expected=f"{needed} bytes or more",
            found=f"{self.file_size} bytes",
            hint="the download is incomplete: fetch it again",
        )


def _counts(reader: _Reader) -> tuple[int, int]:
    """Number of tensors and of metadata keys, after magic and version."""
    start = reader.take(4)
    if (magic := reader.data[start : start + 4]) != b"GGUF":
        raise reader.lie("not a GGUF file", "magic b'GGUF'", magic)
    if (version := reader.number("<I")) not in VERSIONS:
        raise reader.lie("GGUF version is not read", "version 2 or 3, little-endian", version)
    tensors, keys = reader.number("<Q"), reader.number("<Q")
    if tensors > MAX_TENSORS:
        raise reader.lie("too many tensors", f"at most {MAX_TENSORS}", tensors)
    if keys > MAX_KEYS:
        raise reader.lie("too many metadata keys", f"at most {MAX_KEYS}", keys)
    return tensors, keys


def _tensor_info(reader: _Reader) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    """Name, shape (rows first), type and offset in the data of one tensor."""
    name = reader.strings(1, MAX_NAME_BYTES)[0]
    count = reader.number("<I")
    if not 1 <= count <= MAX_DIMS:
        raise reader.lie(f"{shown(name)} has an impossible rank", f"1 to {MAX_DIMS}", count)
    dims = tuple(reader.number("<Q") for _ in range(count))
    if 0 in dims:
        raise reader.lie(f"{shown(name)} is empty", "sizes above 0", dims)
    kind = reader.number("<I")
    try:
        quantisation = GGMLQuantizationType(kind)
    except ValueError:
        raise reader.lie(f"{shown(name)} has an unknown type", "a GGML type", kind) from None
    return name, dims[::-1], quantisation, reader.number("<Q")


def _alignment(metadata: dict[str, Any], path: Path) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or not 0 < value <= 1 << 20 or value & (value - 1):
        raise HeaderError(
            "alignment is not a power of two",
            where=path,
            expected="1 to 1048576",
            found=repr(value)[:80],
        )
    return value


def _place(
    infos: list[tuple[str, tuple[int, ...], GGMLQuantizationType, int]],
    header_end: int,
    alignment: int,
    size: int,
    path: Path,
) -> dict[str, GGUFEntry]:
    """The tensors with their byte ranges, proven to lie in the file and not on each other."""
    data_start = -(-header_end // alignment) * alignment
    tensors: dict[str, GGUFEntry] = {}
    for name, shape, kind, offset in infos:
        where = f"{path}: {shown(name)}"
        if name in tensors:
            raise HeaderError("tensor is given twice", where=where)
        if offset % alignment:
            raise HeaderError(
                "offset is not aligned", where=where, expected=alignment, found=offset
            )
        nbytes = _nbytes(shape, kind, where)
        if (end := data_start + offset + nbytes) > size:
            raise TruncatedFileError(
                "tensor ends after the file",
                where=where,
                expected=f"{end} bytes or more",
                found=f"{size} bytes",
                hint="the download is incomplete: fetch it again",
            )
        tensors[name] = GGUFEntry(name, shape, kind, data_start + offset, nbytes)
    _require_disjoint(tensors, path)
    return tensors


def _nbytes(shape: tuple[int, ...], kind: GGMLQuantizationType, where: str) -> int:
    """Bytes of a tensor; a row must be whole blocks."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise HeaderError(
            "row is not a whole number of blocks",
            where=where,
            expected=f"a multiple of {block} for {kind.name}",
            found=shape[-1],
        )
    return math.prod(shape) // block * block_bytes


def _require_disjoint(tensors: dict[str, GGUFEntry], path: Path) -> None:
    position = 0
    for entry in sorted(tensors.values(), key=lambda entry: entry.offset):
        if entry.offset < position:
            raise HeaderError("tensors overlap", where=f"{path}: {shown(entry.name)}")
        position = entry.offset + entry.nbytes
