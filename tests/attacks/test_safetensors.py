"""Safetensors files that lie: each lie has its error, quickly and in little memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from qll.errors import (
    ConfigError,
    HeaderError,
    MissingFileError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    TruncatedFileError,
)
from qll.load import expected_specs, open_source
from qll.load.safetensors import read_safetensors
from tests.attacks.harness import mutations, survive, watched
from tests.checkpoints import weights, write_hf_folder
from tests.conftest import make_tiny_llama


@pytest.fixture
def folder(tmp_path, tiny_hf_folder) -> Path:
    return Path(shutil.copytree(tiny_hf_folder, tmp_path / "copy"))


def with_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: list, start: int, stop: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def write_sparse_llama_3_8b(folder: Path) -> Path:
    """Llama 3 8B in bfloat16 as one file of 16 GB, all of it a hole but the header."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    config.save_pretrained(folder)
    header, position = {}, 0
    for name, shape in expected_specs(config).items():
        size = 2 * torch.Size(shape).numel()
        header[name] = entry(list(shape), position, position + size, "BF16")
        position += size
    path = folder / "model.safetensors"
    path.write_bytes(with_header(header))
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + position)
    assert path.stat().st_size > 16e9
    return folder


LIES = {
    "empty file": (b"", TruncatedFileError),
    "seven bytes": (b"1234567", TruncatedFileError),
    "length 2^63": ((1 << 63).to_bytes(8, "little") + b"{}", HeaderError),
    "length 10^8 + 1": ((10**8 + 1).to_bytes(8, "little") + b"{}", HeaderError),
    "length past the end": ((1000).to_bytes(8, "little") + b"{}", TruncatedFileError),
    "not UTF-8": (with_header(b"{\xff}"), HeaderError),
    "not JSON": (with_header(b"{'a': 1}"), HeaderError),
    "not an object": (with_header([1, 2]), HeaderError),
    "deep nesting": (with_header(b"[" * 100_000), HeaderError),
    "number of 10^5 digits": (with_header(b'{"a": ' + b"9" * 100_000 + b"}"), HeaderError),
    "key twice": (with_header(b'{"a": 1, "a": 2}'), HeaderError),
    "entry is a list": (with_header({"a": []}), HeaderError),
    "entry without shape": (with_header({"a": {"dtype": "F32"}}), HeaderError),
    "unknown dtype": (with_header({"a": entry([1], 0, 4, "F31")}, bytes(4)), HeaderError),
    "dtype is a list": (with_header({"a": entry([1], 0, 4, ["F32"])}, bytes(4)), HeaderError),
    "negative size": (with_header({"a": entry([-1], 0, 4)}, bytes(4)), HeaderError),
    "fractional size": (with_header({"a": entry([1.0], 0, 4)}, bytes(4)), HeaderError),
    "boolean size": (with_header({"a": entry([True], 0, 4)}, bytes(4)), HeaderError),
    "shape overflows 64 bits": (
        with_header({"a": entry([2**33, 2**33], 0, 4)}, bytes(4)),
        HeaderError,
    ),
    "sizes of wrapping product": (
        with_header({"a": entry([2**32, 2**32], 0, 0)}, b""),
        HeaderError,
    ),
    "offsets backwards": (with_header({"a": entry([1], 4, 0)}, bytes(4)), HeaderError),
    "three offsets": (
        with_header({"a": {**entry([1], 0, 4), "data_offsets": [0, 4, 4]}}, bytes(4)),
        HeaderError,
    ),
    "overlap": (
        with_header({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
        HeaderError,
    ),
    "gap": (with_header({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)), HeaderError),
    "first byte skipped": (with_header({"a": entry([1], 4, 8)}, bytes(8)), HeaderError),
    "data cut": (with_header({"a": entry([4], 0, 16)}, bytes(15)), TruncatedFileError),
    "trailing bytes": (with_header({"a": entry([4], 0, 16)}, bytes(17)), TruncatedFileError),
    "trillion elements": (
        with_header({"a": entry([10**12], 0, 4 * 10**12)}, bytes(64)),
        TruncatedFileError,
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_each_lie_has_its_error(folder, lie):
    data, error = LIES[lie]
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(error, match=r"model\.safetensors") as caught:
        open_source(folder)
    assert type(caught.value) is error


def test_every_lie_is_cheap_and_sixteen_gigabytes_are_not_read(tmp_path, tiny_hf_folder):
    folders = []
    for place, (data, _) in enumerate(LIES.values()):
        folder = Path(shutil.copytree(tiny_hf_folder, tmp_path / str(place)))
        (folder / "model.safetensors").write_bytes(data)
        folders.append(folder)
    big = write_sparse_llama_3_8b(tmp_path / "big")
    results = watched(tiny_hf_folder, *folders, big)
    found, seconds, _, total = results.pop(big)
    assert found == "opened"
    assert total < 700
    assert seconds < 20
    for folder, (found, seconds, grown, _) in results.items():
        assert found in ("HeaderError", "TruncatedFileError"), folder
        assert seconds < 5, (folder, seconds)
        assert grown < 50, (folder, grown)


def test_inspecting_sixteen_gigabytes_takes_little_memory(tmp_path):
    """The whole process of `qll inspect`, torch and all, as a user starts it."""
    folder = write_sparse_llama_3_8b(tmp_path / "big")
    code = (
        "import sys; from pathlib import Path; from qll.cli import main; "
        "code = main(['inspect', '--llama_dir', sys.argv[1], '--json']); "
        "print(Path('/proc/self/status').read_text(), file=sys.stderr); sys.exit(code)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    facts = json.loads(run.stdout)
    assert facts["parameters"]["total"] == 8_030_261_248
    assert facts["row_order"] == "half_split"
    assert facts["bytes"]["on_disk"] > 16e9
    peak = int(run.stderr.split("VmHWM:")[1].split()[0]) / 1024
    assert peak < 700


def test_truncation_at_every_place(folder):
    data = (folder / "model.safetensors").read_bytes()
    for size in (*range(16), *range(16, len(data), len(data) // 40), len(data) - 1):
        (folder / "model.safetensors").write_bytes(data[:size])
        with pytest.raises(TruncatedFileError):
            open_source(folder)


def test_file_that_shrinks_after_opening(folder):
    source = open_source(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    name = max(source.specs(), key=lambda name: source.tensors[name].offset)
    with pytest.raises(TruncatedFileError):
        source.read(name)
    path.unlink()
    with pytest.raises(MissingFileError):
        source.read(name)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_bad_number_is_found(folder, tiny_llama, poison, dtype):
    state = {name: tensor.to(dtype) for name, tensor in weights(tiny_llama).items()}
    name = "model.layers.1.mlp.down_proj.weight"
    state[name][63, 127] = poison
    save_file(state, folder / "model.safetensors")
    source = open_source(folder)
    with pytest.raises(NonFiniteError, match="down_proj"):
        source.read(name)
    assert source.read(name, rows=slice(0, 63)).shape == (63, 128)
    with pytest.raises(NonFiniteError, match="1 of 128"):
        source.read(name, rows=slice(63, 64))


def test_mutated_files_open_or_raise_our_error(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")

    def write(case: bytes) -> Path:
        path.write_bytes(case)
        return folder

    outcomes = survive(mutations(data, 400, seed=0, header=header), write, seconds=10)
    assert outcomes["HeaderError"] > 100
    assert outcomes["opened"] < 100


def test_what_we_accept_the_library_accepts(folder):
    """Our reader is at least as strict as the library's."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    accepted = 0
    for case in mutations(data, 300, seed=1, header=header):
        path.write_bytes(case)
        try:
            ours = read_safetensors(path)
        except (HeaderError, TruncatedFileError):
            continue
        accepted += 1
        theirs = load_file(path)
        assert {name: tensor.spec.shape for name, tensor in ours.items()} == {
            name: tuple(tensor.shape) for name, tensor in theirs.items()
        }
    assert accepted > 10


def test_index_and_file_with_the_same_tensor_twice(folder, tiny_llama):
    state = weights(tiny_llama)
    (folder / "model.safetensors").unlink()
    save_file(state, folder / "a.safetensors")
    save_file({"model.norm.weight": state["model.norm.weight"]}, folder / "b.safetensors")
    weight_map = dict.fromkeys(state, "a.safetensors") | {"model.norm.weight": "b.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(MissingTensorError, match=r"model\.norm\.weight"):
        open_source(folder)


@pytest.mark.parametrize("shape", [(), (0,), (512,), (0, 64), (512, 64, 1)])
@pytest.mark.parametrize("tied", [False, True])
def test_impossible_shapes(tmp_path, shape, tied):
    model = make_tiny_llama(tied=tied)
    folder = write_hf_folder(model, tmp_path)
    wrong = {name: torch.zeros(shape) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    save_file(weights(model) | wrong, folder / "model.safetensors")
    with pytest.raises((ShapeError, ConfigError)):
        open_source(folder)
