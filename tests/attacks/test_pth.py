"""PyTorch files that would run code, claim what they do not hold, or are torn."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import shutil
import struct
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from qll.errors import (
    HeaderError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    TruncatedFileError,
    UnsafeCheckpointError,
)
from qll.load import open_source
from qll.load.pth import PthFile
from tests.attacks.harness import mutations, survive, watched
from tests.checkpoints import meta_params, meta_weights, write_meta_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path, tiny_meta_folder) -> Path:
    return Path(shutil.copytree(tiny_meta_folder, tmp_path / "copy"))


class Call:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Storage:
    """Stands for record "0" of the archive, with a claimed number of elements."""

    def __init__(self, elements: int) -> None:
        self.elements = elements


def archive(path: Path, value: object, compression: int = zipfile.ZIP_STORED) -> Path:
    """A torch archive with one record of four floats and any pickle at all."""
    good = io.BytesIO()
    torch.save({"w": torch.arange(4.0)}, good)

    class Pickler(pickle.Pickler):
        def persistent_id(self, found):
            if isinstance(found, Storage):
                return ("storage", torch.FloatStorage, "0", "cpu", found.elements)
            return None

    data = io.BytesIO()
    Pickler(data, 2).dump(value)
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(path, "w", compression) as target:
        for entry in source.infolist():
            is_pickle = entry.filename.endswith("/data.pkl")
            content = data.getvalue() if is_pickle else source.read(entry)
            target.writestr(entry.filename, content)
    return path


def claim(size: tuple, stride: tuple, elements: int = 4, offset: int = 0) -> dict:
    """A table with one tensor of any shape over that record."""
    rebuild = torch._utils._rebuild_tensor_v2
    hooks = collections.OrderedDict()
    return {"w": Call(rebuild, Storage(elements), offset, size, stride, False, hooks)}


def test_no_pickle_is_ever_trusted():
    """The flag that runs code appears nowhere in the project."""
    forbidden = "weights_only" + "=False"
    files = [
        path for room in ("qll", "tests", "benchmarks") for path in (ROOT / room).rglob("*.py")
    ]
    assert len(files) > 20
    assert [path for path in files if forbidden in path.read_text("utf-8").replace(" ", "")] == []


def test_every_torch_load_states_the_flag():
    for path in (ROOT / "qll").rglob("*.py"):
        calls = path.read_text("utf-8").split("torch.load(")[1:]
        assert all("weights_only=True" in call.split("\n")[0] for call in calls), path


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "attack",
    [
        Call(os.system, "touch ran"),
        Call(eval, "open('ran', 'w')"),
        Call(exec, "open('ran', 'w')"),
        Call(io.open, "ran", "w"),
        Call(getattr, "a", "upper"),
        Call(torch.hub.load, "a/b", "c"),
        Call(torch.load, "x"),
    ],
    ids=lambda attack: attack.function.__name__,
)
def test_code_in_a_pickle_is_not_run(folder, monkeypatch, attack, zipped):
    monkeypatch.chdir(folder)
    torch.save(
        {"norm.weight": attack},
        folder / "consolidated.00.pth",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(UnsafeCheckpointError, match=r"consolidated\.00\.pth"):
        open_source(folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_bare_pickles_of_any_protocol(folder, monkeypatch, protocol):
    monkeypatch.chdir(folder)
    data = pickle.dumps(Call(os.system, "touch ran"), protocol)
    (folder / "consolidated.00.pth").write_bytes(data)
    with pytest.raises((UnsafeCheckpointError, HeaderError)):
        open_source(folder)
    assert not (folder / "ran").exists()


def old_format(elements: int, raw_elements: int) -> bytes:
    """A file as before torch 1.6 whose pickle and whose data claim a storage of any size."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, found):
            if isinstance(found, Storage):
                return ("storage", torch.FloatStorage, "0", "cpu", found.elements, None)
            return None

    data = io.BytesIO()
    for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(part, data, 2)
    Pickler(data, 2).dump(claim((4,), (1,), elements))
    pickle.dump(["0"], data, 2)
    return data.getvalue() + struct.pack("<q", raw_elements) + bytes(16)


CLAIMS = {
    "expanded to 10^9": (claim((10**9,), (0,)), ShapeError),
    "expanded to 10^18": (claim((10**9, 10**9), (0, 0)), ShapeError),
    "strided past the end": (claim((2, 2), (2**40, 1)), HeaderError),
    "longer than its record": (claim((10**9,), (1,)), HeaderError),
    "starts past the end": (claim((4,), (1,), offset=10**6), HeaderError),
    "storage of 10^12": (claim((10**6,), (1,), elements=10**12), HeaderError),
    "negative size": (claim((-4,), (1,)), HeaderError),
    "product overflows": (claim((2**62, 4), (0, 0)), HeaderError),
    "negative stride": (claim((2, 2), (-1, 1)), HeaderError),
    "size is text": (claim(("4",), (1,)), HeaderError),
    "not a table": ([1, 2], HeaderError),
    "number for a tensor": ({"w": 5}, MissingTensorError),
    "number for a name": ({5: 5}, MissingTensorError),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_are_compared_with_the_bytes(tmp_path, name):
    value, error = CLAIMS[name]
    with pytest.raises(error, match=r"evil\.pth") as caught:
        PthFile(archive(tmp_path / "evil.pth", value))
    assert type(caught.value) is error


def test_honest_claim_passes(tmp_path):
    file = PthFile(archive(tmp_path / "good.pth", claim((2, 2), (2, 1))))
    assert file.rows("w", 1, 2).tolist() == [[2.0, 3.0]]


def test_honest_old_format_passes(tmp_path, caplog):
    (tmp_path / "good.pth").write_bytes(old_format(4, 4))
    assert PthFile(tmp_path / "good.pth").rows("w", 0, 4).tolist() == [0.0] * 4
    assert "old format" in caplog.text


def test_sparse_and_quantised_tensors_are_refused(tmp_path):
    sparse = torch.eye(4).to_sparse()
    torch.save({"w": sparse}, tmp_path / "sparse.pth")
    with pytest.raises((ShapeError, UnsafeCheckpointError)):
        PthFile(tmp_path / "sparse.pth")


def test_compressed_archive_is_refused(tmp_path):
    path = archive(tmp_path / "a.pth", {"w": b"\0" * 10**6}, zipfile.ZIP_DEFLATED)
    with pytest.raises(HeaderError, match="compressed"):
        PthFile(path)


def test_pickle_bomb_is_refused(tmp_path):
    path = archive(tmp_path / "a.pth", {"w": b"\0" * (17 << 20)})
    with pytest.raises(HeaderError, match="pickle is too large"):
        PthFile(path)


def test_directory_bomb_is_refused(tmp_path, folder):
    data = bytearray((folder / "consolidated.00.pth").read_bytes())
    place = data.rfind(b"PK\x05\x06")
    data[place + 12 : place + 16] = struct.pack("<I", 1 << 31)
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(HeaderError, match="directory"):
        PthFile(tmp_path / "a.pth")


def test_archive_with_the_same_entry_twice(tmp_path):
    path = archive(tmp_path / "a.pth", claim((4,), (1,)))
    with zipfile.ZipFile(path) as source:
        entries = [(entry.filename, source.read(entry)) for entry in source.infolist()]
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w") as target:
        for name, content in [*entries, entries[-1]]:
            target.writestr(name, content)
    with pytest.raises(HeaderError):
        PthFile(path)


GARBAGE = {
    "empty": b"",
    "one byte": b"P",
    "text": b"<html>404 Not Found</html>",
    "zip magic only": b"PK\x03\x04",
    "zip without entries": b"PK\x05\x06" + bytes(18),
    "pickle magic only": b"\x80\x02",
    "pickle of nothing": b"\x80\x02.",
    "memo of 2^31": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "bytes of 2^63": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f",
    "text of 2^32": b"\x80\x02X\xff\xff\xff\xff",
    "long of 2^31": b"\x80\x02\x8b\xff\xff\xff\x7f",
    "frame of 2^63": b"\x80\x04\x95" + b"\xff" * 8,
    "deep tuple": b"\x80\x02" + b"(" * 100_000,
    "old format, storage of 10^11": old_format(10**11, 4),
    "old format, storage of 10^11 twice": old_format(10**11, 10**11),
    "old format, data of 10^11": old_format(4, 10**11),
    "old format, data of -4": old_format(4, -4),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_has_our_error(folder, name):
    (folder / "consolidated.00.pth").write_bytes(GARBAGE[name])
    with pytest.raises((HeaderError, TruncatedFileError, UnsafeCheckpointError)):
        open_source(folder)


def write_sparse_meta_folder(model, folder: Path) -> Path:
    """A Meta folder of 6 GB, mostly a hole: a table and a head of 12 million rows of zeros."""
    folder.mkdir()
    vocab, state = 12_000_000, meta_weights(model)
    for name in ("tok_embeddings.weight", "output.weight"):
        state[name] = torch.empty(vocab, 64)
    with torch.serialization.skip_data():
        torch.save(state, folder / "consolidated.00.pth")
    params = meta_params(model.config) | {"vocab_size": vocab}
    (folder / "params.json").write_text(json.dumps(params))
    assert (folder / "consolidated.00.pth").stat().st_size > 5e9
    return folder


def test_every_attack_is_cheap_and_gigabytes_are_not_read(tmp_path, tiny_meta_folder, tiny_llama):
    folders = []
    for place in range(len(GARBAGE) + len(CLAIMS)):
        folders.append(Path(shutil.copytree(tiny_meta_folder, tmp_path / str(place))))
    for folder, data in zip(folders, GARBAGE.values(), strict=False):
        (folder / "consolidated.00.pth").write_bytes(data)
    for folder, (value, _) in zip(folders[len(GARBAGE) :], CLAIMS.values(), strict=True):
        archive(folder / "consolidated.00.pth", value)
    big = write_sparse_meta_folder(tiny_llama, tmp_path / "big")
    results = watched(tiny_meta_folder, *folders, big)
    # skip_data leaves no numbers, so norm.weight reads as zeros: finite
    found, seconds, _, total = results.pop(big)
    assert found == "opened"
    assert total < 700
    assert seconds < 20
    for folder, (found, seconds, grown, _) in results.items():
        assert found != "opened", folder
        assert seconds < 5, (folder, seconds)
        assert grown < 50, (folder, grown)


def test_truncation_at_every_place(folder):
    path = folder / "consolidated.00.pth"
    data = path.read_bytes()
    for size in (*range(4), *range(4, len(data), len(data) // 25), len(data) - 1, len(data) - 30):
        path.write_bytes(data[:size])
        with pytest.raises((TruncatedFileError, HeaderError)):
            open_source(folder)


def test_truncated_old_format(tmp_path, tiny_llama):
    folder = write_meta_folder(tiny_llama, tmp_path / "m", legacy=True)
    path = folder / "consolidated.00.pth"
    data = path.read_bytes()
    for size in (3, 20, 500, 3000, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises((TruncatedFileError, HeaderError, UnsafeCheckpointError)):
            open_source(folder)


@pytest.mark.parametrize("shape", [(), (0,), (64,), (0, 64), (64, 64, 1)])
@pytest.mark.parametrize("name", ["output.weight", "layers.0.attention.wo.weight", "norm.weight"])
def test_impossible_shapes(folder, tiny_llama, shape, name):
    if shape == (64,) and name == "norm.weight":
        shape = (63,)
    state = meta_weights(tiny_llama) | {name: torch.zeros(shape)}
    torch.save(state, folder / "consolidated.00.pth")
    with pytest.raises(ShapeError, match=name.split(".")[0] if shape != (63,) else "norm"):
        open_source(folder)


def test_bad_numbers_are_found_in_any_shard(tmp_path, tiny_llama):
    folder = write_meta_folder(tiny_llama, tmp_path / "m", 2)
    path = folder / "consolidated.01.pth"
    part = torch.load(path, weights_only=True)
    part["layers.1.attention.wo.weight"][3, 5] = float("inf")
    torch.save(part, path)
    with pytest.raises(NonFiniteError, match="o_proj"):
        open_source(folder).read("model.layers.1.self_attn.o_proj.weight")


def test_tensor_missing_twice_and_unasked(folder, tiny_llama):
    state = meta_weights(tiny_llama)
    del state["norm.weight"]
    torch.save(state, folder / "consolidated.00.pth")
    with pytest.raises(MissingTensorError, match=r"model\.norm\.weight"):
        open_source(folder)


@pytest.mark.parametrize("legacy", [False, True])
def test_mutated_files_open_or_raise_our_error(tmp_path, tiny_llama, legacy):
    folder = write_meta_folder(tiny_llama, tmp_path / "m", legacy=legacy)
    path = folder / "consolidated.00.pth"
    data = path.read_bytes()

    def write(case: bytes) -> Path:
        path.write_bytes(case)
        return folder

    outcomes = survive(mutations(data, 200, seed=3, header=4000), write, seconds=10)
    assert sum(outcomes.values()) == 200
    assert 0 < outcomes["opened"] < 190
