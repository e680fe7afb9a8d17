"""A checkpoint of the exact shape of a real Llama 3, for runs where the real one cannot be had.

    python benchmarks/make_llama.py --shape llama3-8b --format hf --out /data/standin

Names, shapes, dtype (bfloat16), sharding, config and tokenizer are those of the original; weights
are `llama_weights`. Written one tensor at a time; at last one tensor of each kind is read back
through `qll.open` and compared with what its name says.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import mmap
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import set_default_mmap_options, skip_data
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs as a script

from benchmarks.llama_shapes import HF_SHARD_BYTES, SHAPES, Shape
from benchmarks.llama_weights import Weights
from qll import store
from qll.errors import MissingFileError, UsageError
from qll.load import open_source
from qll.load.meta import CUT_COLUMNS, CUT_ROWS, EMBEDDING
from qll.load.names import expected_specs, file_rows, meta_name

BYTES = 2  # of a bfloat16
BLOCK_CHECKED = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj", "input_layernorm")


def main() -> None:
    """Write the checkpoint asked for and check it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--format", choices=["hf", "meta"], default="hf")
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--shards", type=int, help="files of weights; default: as the original")
    parser.add_argument("--blocks", type=int, help="fewer blocks than the original")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape].with_blocks(arguments.blocks)
    make(shape, arguments.format, arguments.out, arguments.shards)
    print(f"{arguments.out}: {size_of(shape) / 1e9:.2f} GB, checked")


def make(shape: Shape, format: str, out: Path, shards: int | None = None) -> None:
    """Write a checkpoint of `shape` into the new folder `out`.

    Raises UsageError for a folder that is there, DiskFullError, MissingFileError without the
    package llama-models.
    """
    if out.exists() and any(out.iterdir()):
        raise UsageError("the folder is not empty", where=out, hint="choose a new --out")
    store.require_space(out, size_of(shape) + (1 << 24))
    store.make_folder(out)
    shutil.copyfile(tokenizer_file(), out / "tokenizer.model")
    weights = Weights(shape.n_layers)
    if format == "hf":
        write_hf(shape, weights, out, shards)
    else:
        write_meta(shape, weights, out, shards or shape.meta_shards)
    check(shape, weights, out)


def write_hf(shape: Shape, weights: Weights, out: Path, shards: int | None) -> None:
    """safetensors files with their index; config.json last, so that a torn folder does not open."""
    specs = expected_specs(shape.config())
    files = hf_files(specs, shards)
    weight_map = {name: file for file, names in files.items() for name in names}
    for file, names in progress(files.items(), "write", "file"):
        offset, header = 0, {"__metadata__": {"format": "pt"}}
        for name in names:
            end = offset + count(specs[name]) * BYTES
            entry = {"dtype": "BF16", "shape": list(specs[name]), "data_offsets": [offset, end]}
            header[name], offset = entry, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(out / file, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                for piece in pieces(weights, name, specs[name]):
                    stream.write(memoryview(piece.contiguous().view(torch.uint8).numpy()))
    if len(files) > 1:
        index = {"metadata": {"total_size": size_of(shape)}, "weight_map": weight_map}
        store.write_json(out / "model.safetensors.index.json", index)
    store.write_text(out / "config.json", shape.config().to_json_string(use_diff=False))


def hf_files(specs: dict[str, tuple[int, ...]], shards: int | None) -> dict[str, list[str]]:
    """Which tensors go into which file: cut at 5 GB, or into `shards` files of about one size."""
    total = sum(count(shape) for shape in specs.values()) * BYTES
    groups: list[list[str]] = [[]]
    filled = done = 0
    for place, (name, shape) in enumerate(specs.items()):
        size = count(shape) * BYTES
        if shards is None:
            full = filled + size > HF_SHARD_BYTES
        else:
            # one tensor at least is left for every file
            missing = shards - len(groups)
            full = missing and (
                done >= total * len(groups) / shards or len(specs) - place == missing
            )
        if full and groups[-1]:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled, done = filled + size, done + size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {
        f"model-{k + 1:05d}-of-{len(groups):05d}.safetensors": names
        for k, names in enumerate(groups)
    }


def write_meta(shape: Shape, weights: Weights, out: Path, shards: int) -> None:
    """consolidated.NN.pth as fairscale cuts them; params.json last.

    torch.save lays the files out without data, which is then written through a shared mapping.
    """
    config = shape.config()
    specs = expected_specs(config)
    paths = [out / f"consolidated.{k:02d}.pth" for k in range(shards)]
    for path in paths:
        with FakeTensorMode(), skip_data(materialize_fake_tensors=True):
            parts = {meta_name(name): part_shape(name, s, shards) for name, s in specs.items()}
            tensors = {n: torch.empty(s, dtype=torch.bfloat16) for n, s in parts.items()}
            torch.save(tensors, path)
    for name, whole in progress(specs.items(), "write", "tensor"):
        tensor = weights.tensor(name, whole)
        order = file_rows(name, config)
        if order is not None:
            # row order[i] of the file is row i of ours
            tensor = tensor[torch.argsort(order)]
        cut = cut_of(name)
        parts = [tensor] * shards if cut is None else tensor.chunk(shards, dim=cut)
        for path, part in zip(paths, parts, strict=True):
            fill(path, meta_name(name), part)
    store.write_json(out / "params.json", shape.params())


def fill(path: Path, name: str, values: Tensor) -> None:
    """Write the tensor `name` of a file laid out by torch.save; unmapped at once."""
    with set_default_mmap_options(mmap.MAP_SHARED):
        torch.load(path, weights_only=True, mmap=True)[name].copy_(values)


def part_shape(name: str, shape: tuple[int, ...], shards: int) -> tuple[int, ...]:
    """Shape of the part of a tensor in each of `shards` files."""
    cut = cut_of(name)
    return tuple(size // shards if axis == cut else size for axis, size in enumerate(shape))


def cut_of(name: str) -> int | None:
    """The axis along which fairscale cuts the tensor, None for norms."""
    kind = meta_name(name).removesuffix(".weight").rpartition(".")[2]
    if kind in CUT_COLUMNS:
        return 1
    return 0 if kind in CUT_ROWS or meta_name(name) == EMBEDDING else None


def check(shape: Shape, weights: Weights, out: Path) -> None:
    """Open the folder as a user would and compare tensors of every kind with their names."""
    source, specs = open_source(out), expected_specs(shape.config())
    names = [f"model.layers.{shape.n_layers - 1}.{part}.weight" for part in BLOCK_CHECKED]
    for name in ["model.norm.weight", *names]:
        if not torch.equal(source.read(name), weights.tensor(name, specs[name])):
            raise SystemExit(f"{out}: {name} is not what was written")


def tokenizer_file() -> Path:
    """Llama 3's tokenizer.model inside the package llama-models."""
    found = importlib.util.find_spec("llama_models")
    places = list(found.submodule_search_locations or ()) if found else []
    for place in places:
        if (path := Path(place) / "llama3" / "tokenizer.model").is_file():
            return path
    raise MissingFileError(
        "the tokenizer of Llama 3 is not installed",
        where="package llama-models",
        hint="run `pip install --no-deps llama-models`",
    )


def pieces(weights: Weights, name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """The tensor from top to bottom, in parts that fit into little memory."""
    if len(shape) == 1:
        yield weights.tensor(name, shape)
        return
    for _, piece in weights.pieces(name, shape):
        yield piece


def size_of(shape: Shape) -> int:
    """Bytes of all weights."""
    return sum(count(spec) for spec in expected_specs(shape.config()).values()) * BYTES


def count(shape: tuple[int, ...]) -> int:
    """Numbers in a tensor.

    >>> count((3, 4))
    12
    """
    return int(torch.Size(shape).numel())


def progress(items, what: str, unit: str):
    """A bar on a terminal."""
    return tqdm(items, what, unit=unit, file=sys.stderr, disable=None)


if __name__ == "__main__":
    main()
