"""Safetensors files: a header that is checked lie by lie, and tensors read by offset.

Format: 8 bytes little-endian header length, a JSON object name -> {dtype, shape, data_offsets},
then the data, which the tensors must cover exactly (github.com/huggingface/safetensors, README).
The header is read here rather than by the library so that each lie has its own error and a read
is one copy into our memory instead of a growing mapping.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qll.errors import HeaderError, TruncatedFileError
from qll.load.checkpoint import TensorSpec
from qll.load.files import parse_object, read_pieces, read_tensor, shown

# The library allows 100 MB; the longest real header (405B in one file) is under 0.3 MB
MAX_HEADER_BYTES = 16 << 20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class SafeTensor:
    """One tensor of a safetensors file; see checkpoint.Stored."""

    path: Path
    offset: int
    spec: TensorSpec

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start..stop-1; only their bytes are read."""
        rest, dtype = self.spec.shape[1:], self.spec.dtype
        offset = self.offset + start * math.prod(rest) * dtype.itemsize
        return read_tensor(self.path, offset, (stop - start, *rest), dtype)

    def read_rows(self, rows: Sequence[int]) -> Tensor:
        """The rows `rows` of a matrix in that order; only their bytes are read."""
        width = math.prod(self.spec.shape[1:])
        places = [self.offset + row * width * self.spec.dtype.itemsize for row in rows]
        return read_pieces(self.path, places, width, self.spec.dtype)

    def read_columns(self, start: int, stop: int) -> Tensor:
        """Columns start..stop-1 of a matrix; only their bytes are read."""
        rows, width = self.spec.shape
        places = [
            self.offset + (row * width + start) * self.spec.dtype.itemsize for row in range(rows)
        ]
        return read_pieces(self.path, places, stop - start, self.spec.dtype)


def read_safetensors(path: Path) -> dict[str, SafeTensor]:
    """The tensors of one file, none of them read yet.

    Raises TruncatedFileError when the file is shorter or longer than its header says, HeaderError
    for any other lie.

    >>> import tempfile; from safetensors.torch import save_file
    >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
    >>> save_file({"w": torch.ones(3, 2)}, path)
    >>> read_safetensors(path)["w"].read(1, 3)
    tensor([[1., 1.],
            [1., 1.]])
    """
    header, start = _header(path)
    size = path.stat().st_size - start
    tensors, spans = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = _span(entry, path, name)
        spans.append((begin, end))
        spec = TensorSpec(tuple(entry["shape"]), DTYPES[entry["dtype"]])
        tensors[name] = SafeTensor(path, start + begin, spec)
    _require_covered(sorted(spans), size, path)
    return tensors


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header and where the data starts."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or (length <= MAX_HEADER_BYTES and 8 + length > size):
            raise TruncatedFileError(
                "safetensors file ends inside its header",
                where=path,
                expected=f"{8 + length if len(prefix) == 8 else 8} bytes or more",
                found=f"{size} bytes",
                hint="download it again",
            )
        if length > MAX_HEADER_BYTES:
            raise HeaderError(
                "safetensors header is too long",
                where=path,
                expected=f"at most {MAX_HEADER_BYTES} bytes",
                found=length,
                hint="this is not a safetensors file, or it is damaged",
            )
        return parse_object(file.read(length), path, HeaderError), 8 + length


def _span(entry: Any, path: Path, name: str) -> tuple[int, int]:
    """First and last + 1 byte of a tensor in the data, proven to fit its shape and dtype."""

    def whole(values: Any) -> bool:
        return isinstance(values, list) and all(
            type(value) is int and 0 <= value < 1 << 63 for value in values
        )

    where = f"{path}: {shown(name)}"
    if not isinstance(entry, Mapping) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise HeaderError("tensor entry lacks dtype, shape or data_offsets", where=where)
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not whole(shape) or not whole(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise HeaderError("shape or data_offsets are not sizes", where=where)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise HeaderError("unknown dtype", where=where, found=repr(dtype)[:80])
    if (claimed := math.prod(shape) * DTYPES[dtype].itemsize) != offsets[1] - offsets[0]:
        raise HeaderError(
            "shape and data_offsets disagree",
            where=where,
            expected=f"{claimed} bytes for shape {tuple(shape)}",
            found=offsets[1] - offsets[0],
        )
    return offsets[0], offsets[1]


def _require_covered(spans: list[tuple[int, int]], size: int, path: Path) -> None:
    """Raise unless the tensors lie one after the other from the first byte of data to the last."""
    position = 0
    for begin, end in spans:
        if begin != position:
            raise HeaderError(
                "tensors overlap or leave a gap",
                where=path,
                expected=f"the next tensor at byte {position}",
                found=begin,
            )
        position = end
    if position != size:
        raise TruncatedFileError(
            "safetensors file has another size than its header says",
            where=path,
            expected=f"{position} bytes of tensors",
            found=size,
            hint="the download is incomplete: fetch it again",
        )
