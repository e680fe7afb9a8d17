"""The shards of a converted checkpoint from what conversion and training left behind.

One shard per block and one for the rest: the cores of every entry, the matrices left dense, the
norm gains; a tensor that was trained replaces the one of the closed form.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from qll import store
from qll.config import ConvertOptions
from qll.convert.plan import Plan
from qll.convert.units import HEAD
from qll.convert.write import saved_dtype
from qll.errors import IntegrityError
from qll.load import Source
from qll.model import gain_of
from qll.model.files import write_index


def assemble(
    source: Source,
    plan: Plan,
    options: ConvertOptions,
    cores: Path,
    model: Path,
    trained: Path | None = None,
) -> None:
    """Write the shards and their index into `model`, in the saved dtype."""
    layers, kind = source.config.num_hidden_layers, saved_dtype(source, options)
    total, weight_map, size = layers + 1, {}, 0
    bar = tqdm(range(total), "write", unit="shard", file=sys.stderr, disable=None)
    for k in bar:
        tensors = block_tensors(source, plan, options, cores, k if k < layers else None, trained)
        tensors = {name: _cast(tensor, kind) for name, tensor in sorted(tensors.items())}
        name = f"model-{k + 1:05d}-of-{total:05d}.safetensors"
        store.write_tensors(model / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    write_index(model, weight_map, size)


def block_tensors(
    source: Source,
    plan: Plan,
    options: ConvertOptions,
    cores: Path,
    block: int | None,
    trained: Path | None = None,
) -> dict[str, Tensor]:
    """Every tensor of one block (None: of the rest) by its name in the checkpoint.

    Raises IntegrityError when the file of a trained block holds other tensors.
    """
    tensors: dict[str, Tensor] = {}
    for entry in plan.of_block(block):
        tensors |= load_file(cores / f"{entry.unit.name}.safetensors")
    tensors |= _norms(source, options, block)
    if block is None and source.config.tie_word_embeddings:
        tensors = {name: t for name, t in tensors.items() if not name.startswith(HEAD)}
    if trained is None or not (path := trained / trained_name(block)).is_file():
        return tensors
    changed = load_file(path)
    if strange := [name for name, t in changed.items() if _shape(tensors.get(name)) != t.shape]:
        raise IntegrityError(
            "trained tensors of another plan",
            where=path,
            found=strange[0],
            hint="delete the work folder of the run and start it again",
        )
    return tensors | changed


def trained_name(block: int | None) -> str:
    """File of the trained tensors of a block, or of what is in none."""
    return "rest.safetensors" if block is None else f"block.{block:04d}.safetensors"


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


def _cast(tensor: Tensor, kind: torch.dtype) -> Tensor:
    return tensor.to(kind) if tensor.is_floating_point() else tensor


def _norms(source: Source, options: ConvertOptions, block: int | None) -> dict[str, Tensor]:
    """The RMSNorm gains of a block (None: the final norm); ones where they were folded."""
    kind = saved_dtype(source, options)
    prefix = "model.norm" if block is None else f"model.layers.{block}."
    readers = (
        {
            gain_of(f"model.layers.{block}.{path}", source.config)
            for path in ("self_attn.q_proj", "mlp.gate_proj")
        }
        if block is not None
        else {gain_of(HEAD, source.config)}
    )
    norms = {}
    for name in source.specs():
        if not (name.startswith(prefix) and name.endswith("norm.weight")):
            continue
        gain = source.read(name)
        folded = options.norms == "fold" and name in readers
        norms[name] = (torch.ones_like(gain) if folded else gain).to(kind)
    return norms
