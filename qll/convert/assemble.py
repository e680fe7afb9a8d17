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
from qll.convert.plan import Plan
from qll.convert.stored import unit_path, unit_tensors, with_trained
from qll.convert.units import HEAD
from qll.convert.write import saved_dtype
from qll.load import Source
from qll.model import gain_of
from qll.model.files import write_index
from qll.options import ConvertOptions

SCALES = ".scales"  # of packed cores


def assemble(
    source: Source,
    plan: Plan,
    options: ConvertOptions,
    cores: Path,
    model: Path,
    trained: Path | None = None,
    *,
    as_float: bool = False,
) -> None:
    """Write the shards and their index into `model`, in the saved dtype.

    `as_float` leaves out the packing.
    """
    layers, kind = source.config.num_hidden_layers, saved_dtype(source, options)
    total, weight_map, size = layers + 1, {}, 0
    bar = tqdm(range(total), "write", unit="shard", file=sys.stderr, disable=None)
    for k in bar:
        block = k if k < layers else None
        tensors = block_tensors(source, plan, options, cores, block, trained, as_float=as_float)
        tensors = {name: _cast(name, tensor, kind) for name, tensor in sorted(tensors.items())}
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
    *,
    as_float: bool = True,
) -> dict[str, Tensor]:
    """Every tensor of one block (None: of the rest) by its name in the checkpoint.

    `as_float`: before they were packed. Raises IntegrityError when the file of a trained
    block belongs to another plan.
    """
    norms = with_trained(_norms(source, options, block), trained, block)
    tensors: dict[str, Tensor] = {}
    for entry in plan.of_block(block):
        if options.is_packed and not as_float and block is not None:
            packed = load_file(unit_path(cores, entry, packed=True))
            tensors |= with_trained(packed, trained, block)
        else:
            tensors |= unit_tensors(cores, trained, entry)
    if block is None and source.config.tie_word_embeddings:
        tensors = {name: t for name, t in tensors.items() if not name.startswith(HEAD)}
    return tensors | norms


def _cast(name: str, tensor: Tensor, kind: torch.dtype) -> Tensor:
    """Floating point numbers in `kind`; the scales of packed ones stay what they are."""
    stays = name.endswith(SCALES) or not tensor.is_floating_point()
    return tensor if stays else tensor.to(kind)


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
