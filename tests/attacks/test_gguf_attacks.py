"""GGUF files that lie: the header guard answers at once where the reader of gguf 0.19 hangs."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from qll.errors import ConfigError, HeaderError, NonFiniteError, TruncatedFileError
from qll.load import open_source
from qll.load.gguf_header import read_header
from tests.attacks.harness import mutations, survive, watched
from tests.checkpoints import write_gguf
from tests.conftest import make_tiny_llama

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10
FAR = 2**63


def text(value: bytes | str, claimed: int | None = None) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if claimed is None else claimed) + data


def head(tensors: int = 0, keys: int = 0, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys)


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + data


def tensor(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    sizes = b"".join(struct.pack("<Q", size) for size in dims)
    return text(name) + struct.pack("<I", len(dims)) + sizes + struct.pack("<IQ", kind, offset)


def padded(data: bytes, payload: int = 0) -> bytes:
    return data + bytes(-len(data) % 32) + bytes(payload)


LIES = {
    "empty": (b"", TruncatedFileError),
    "magic only": (b"GGUF", TruncatedFileError),
    "other magic": (head(magic=b"GGML"), HeaderError),
    "big-endian version": (head(version=3 << 24), HeaderError),
    "version 1": (head(version=1), HeaderError),
    "version 99": (head(version=99), HeaderError),
    "2^63 tensors": (head(tensors=FAR), HeaderError),
    "2^63 keys": (head(keys=FAR), HeaderError),
    "10^4 keys, none there": (head(keys=10**4), TruncatedFileError),
    "6 10^4 tensors, none there": (head(tensors=6 * 10**4), TruncatedFileError),
    # 51 bytes on which gguf.GGUFReader 0.19 runs for ever
    "array of 2^63 numbers": (head(keys=1) + pair("abc", ARRAY, array(U8, FAR)), HeaderError),
    "array of 10^6 numbers": (
        head(keys=1) + pair("a", ARRAY, array(U64, 10**6)),
        TruncatedFileError,
    ),
    "array of 10^6 strings": (
        head(keys=1) + pair("a", ARRAY, array(STRING, 10**6)),
        TruncatedFileError,
    ),
    "arrays that add up": (
        head(keys=100)
        + b"".join(pair(f"k{i}", ARRAY, array(U8, 10**5, bytes(10**5))) for i in range(100)),
        HeaderError,
    ),
    "array of arrays": (
        head(keys=1) + pair("a", ARRAY, array(ARRAY, 2, array(U8, 0) * 2)),
        HeaderError,
    ),
    "array of unknown": (head(keys=1) + pair("a", ARRAY, array(77, 0)), HeaderError),
    "value of unknown type": (head(keys=1) + pair("a", 13, bytes(8)), HeaderError),
    "string of 2^63 bytes": (head(keys=1) + pair("a", STRING, text("", FAR)), HeaderError),
    "string of 10^6 bytes": (
        head(keys=1) + pair("a", STRING, text("x", 10**6)),
        TruncatedFileError,
    ),
    "key of 2^64 - 1 bytes": (head(keys=1) + text("", 2**64 - 1), HeaderError),
    "string not UTF-8": (head(keys=1) + pair("a", STRING, text(b"\xff\xfe")), HeaderError),
    "key twice": (head(keys=2) + pair("a", U8, b"\1") * 2, HeaderError),
    "alignment 0": (
        head(keys=1) + pair("general.alignment", U32, struct.pack("<I", 0)),
        HeaderError,
    ),
    "alignment 33": (
        head(keys=1) + pair("general.alignment", U32, struct.pack("<I", 33)),
        HeaderError,
    ),
    "alignment 2^31": (
        head(keys=1) + pair("general.alignment", U32, struct.pack("<I", 1 << 31)),
        HeaderError,
    ),
    "alignment is text": (
        head(keys=1) + pair("general.alignment", STRING, text("32")),
        HeaderError,
    ),
    "alignment is a flag": (head(keys=1) + pair("general.alignment", BOOL, b"\1"), HeaderError),
    "no dimensions": (head(tensors=1) + tensor("a", []), HeaderError),
    "five dimensions": (head(tensors=1) + tensor("a", [1] * 5), HeaderError),
    "2^32 - 1 dimensions": (
        head(tensors=1) + text("a") + struct.pack("<I", 2**32 - 1),
        HeaderError,
    ),
    "size 0": (head(tensors=1) + tensor("a", [4, 0]), HeaderError),
    "product wraps to 0": (
        padded(head(tensors=1) + tensor("a", [2**32, 2**32])),
        TruncatedFileError,
    ),
    "product wraps to 4": (
        padded(head(tensors=1) + tensor("a", [2**62, 2**62, 2**62, 4]), 64),
        TruncatedFileError,
    ),
    "unknown type": (padded(head(tensors=1) + tensor("a", [32], 4), 128), HeaderError),
    "type 2^32 - 1": (padded(head(tensors=1) + tensor("a", [32], 2**32 - 1), 128), HeaderError),
    "row is not whole blocks": (padded(head(tensors=1) + tensor("a", [33], 8), 128), HeaderError),
    "offset not aligned": (
        padded(head(tensors=1) + tensor("a", [1], 0, 7), 128),
        HeaderError,
    ),
    "offset past the end": (
        padded(head(tensors=1) + tensor("a", [1], 0, 1 << 20), 128),
        TruncatedFileError,
    ),
    "offset near 2^64": (
        padded(head(tensors=1) + tensor("a", [1], 0, 2**64 - 32), 128),
        TruncatedFileError,
    ),
    "tensor twice": (padded(head(tensors=2) + tensor("a", [1]) * 2, 128), HeaderError),
    "tensors overlap": (
        padded(head(tensors=2) + tensor("a", [16]) + tensor("b", [8], 0, 32), 128),
        HeaderError,
    ),
    "data cut": (padded(head(tensors=1) + tensor("a", [16]), 63), TruncatedFileError),
}


@pytest.mark.parametrize("lie", LIES)
def test_each_lie_has_its_error(tmp_path, lie):
    data, error = LIES[lie]
    (tmp_path / "evil.gguf").write_bytes(data)
    with pytest.raises(error, match=r"evil\.gguf") as caught:
        open_source(tmp_path / "evil.gguf")
    assert type(caught.value) is error


def test_every_lie_is_cheap(tmp_path, tiny_gguf_file):
    """Also in gigabytes of zeros, which make endlessly many strings, or one endless string."""
    paths = []
    for place, (data, _) in enumerate(LIES.values()):
        paths.append(tmp_path / f"{place}.gguf")
        paths[-1].write_bytes(data)
    strings, string = tmp_path / "strings.gguf", tmp_path / "string.gguf"
    strings.write_bytes(head(keys=1) + pair("a", ARRAY, array(STRING, 1 << 28)))
    string.write_bytes(head(keys=1) + pair("a", STRING, text("", 1 << 32)))
    for path in (strings, string):
        with open(path, "r+b") as file:
            file.truncate(8 << 30)
    results = watched(tiny_gguf_file, *paths, strings, string)
    assert {results[strings][0], results[string][0]} == {"HeaderError"}
    for path, (found, seconds, grown, _) in results.items():
        assert found in ("HeaderError", "TruncatedFileError"), path
        assert seconds < 5, (path, seconds)
        assert grown < 50, (path, grown)


def test_file_without_a_model_is_a_config_error(tmp_path):
    (tmp_path / "a.gguf").write_bytes(padded(head()))
    with pytest.raises(ConfigError, match=r"general\.architecture"):
        open_source(tmp_path / "a.gguf")


def test_truncation_at_every_place(tmp_path, tiny_gguf_file):
    data, path = tiny_gguf_file.read_bytes(), tmp_path / "a.gguf"
    # the writer pads the last tensor to the alignment: cutting the padding harms nothing
    last = max(
        entry.offset + entry.nbytes for entry in read_header(tiny_gguf_file).tensors.values()
    )
    for size in (*range(0, 2000, 37), *range(2000, last, last // 40), last - 1):
        path.write_bytes(data[:size])
        with pytest.raises(TruncatedFileError):
            open_source(path)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_bad_numbers_are_found(tmp_path, kind):
    """A NaN in plain numbers, a NaN scale in quantised blocks."""
    path = write_gguf(make_tiny_llama(), tmp_path / "a.gguf", kind)
    entry = read_header(path).tensors["blk.1.ffn_down.weight"]
    nan = struct.pack("<f", float("nan")) if kind == "F32" else struct.pack("<e", float("nan"))
    data = bytearray(path.read_bytes())
    data[entry.offset : entry.offset + len(nan)] = nan
    path.write_bytes(data)
    with pytest.raises(NonFiniteError, match="down_proj"):
        open_source(path).read("model.layers.1.mlp.down_proj.weight")


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_mutated_files_open_or_raise_our_error(tmp_path, tiny_llama, kind):
    good = write_gguf(tiny_llama, tmp_path / "good.gguf", kind)
    data, path = good.read_bytes(), tmp_path / "a.gguf"
    header = min(entry.offset for entry in read_header(good).tensors.values())

    def write(case: bytes) -> Path:
        path.write_bytes(case)
        return path

    outcomes = survive(mutations(data, 500, seed=2, header=header), write, seconds=10)
    assert outcomes["HeaderError"] > 20
    assert outcomes["TruncatedFileError"] > 20
    assert 0 < outcomes["opened"] < 300


def test_chat_template_is_carried_not_rendered(tmp_path, tiny_llama):
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    metadata = {"tokenizer.chat_template": template}
    path = write_gguf(tiny_llama, tmp_path / "a.gguf", metadata=metadata)
    assert torch.is_tensor(open_source(path).read("model.norm.weight"))
    assert read_header(path).metadata["tokenizer.chat_template"] == template
