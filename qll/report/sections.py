"""The parts of report.json, from what the rooms returned; every count is taken from saved files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qll.convert import Plan
from qll.load import Source
from qll.model import LlamaTNConfig, packed_numbers


def model_section(source: Source) -> dict[str, Any]:
    """What was converted: shape and size of the dense model."""
    config, specs = source.config, source.specs()
    return {
        "name": source.name,
        "source_format": source.format,
        "row_order": f"half_split (stored as {source.row_order})",
        "params": sum(prod(spec.shape) for spec in specs.values()),
        "block_params": block_params(source),
        "d_model": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "d_head": config.head_dim,
        "d_ff": config.intermediate_size,
        "d_vocab": config.vocab_size,
        "tied": config.tie_word_embeddings,
        "bytes_on_disk": source.bytes_on_disk,
        "fingerprint": source.fingerprint,
    }


def compression_section(
    source: Source, plan: Plan, made: Mapping[str, Any], model: Path, dtype: str
) -> dict[str, Any]:
    """How small the saved folder is; the ratios compare it with the dense model at one dtype.

    keep: numbers stored for the block linears / those of the dense ones, counted in the files
    (pivot indices included). params_ratio and bytes_ratio: the same for the whole model.
    block_bits_per_weight: 8 x bytes stored for the block linears / numbers of the dense ones. Of
    packed numbers, scales count as bytes and not as parameters. `made` is the manifest of the
    folder: what became of each matrix, and what was trained.
    """
    saved = saved_sizes(model)
    params = sum(count for count, _ in saved.values())
    size = sum(bytes for _, bytes in saved.values())
    dense_params = sum(prod(spec.shape) for spec in source.specs().values())
    dense_size = dense_params * getattr(torch, dtype).itemsize
    linears = [sizes for name, sizes in saved.items() if is_block_linear(name)]
    return {
        "keep": sum(count for count, _ in linears) / block_params(source),
        "block_bits_per_weight": 8 * sum(size for _, size in linears) / block_params(source),
        **asked_for(plan),
        "metric": plan.metric,
        "params_ratio": params / dense_params,
        "bytes_ratio": size / dense_size,
        "params": {"dense": dense_params, "converted": params},
        "bytes": {"dense": dense_size, "converted": size, "source_file": source.bytes_on_disk},
        "dtype": dtype,
        "training": made["training"],
        "measured": [asdict(line) for line in plan.measured],
        "per_matrix": [dict(record) for record in made["matrices"]],
    }


def asked_for(plan: Plan) -> dict[str, float]:
    """The budget of the plan: a share of the numbers, or stored bits per weight."""
    if plan.bits is None:
        return {"keep_requested": plan.keep}
    return {"bits_per_weight_requested": plan.bits.per_weight}


def saved_sizes(model: Path) -> dict[str, tuple[int, int]]:
    """(numbers, bytes) of every tensor in the safetensors files of a folder.

    Packed bytes are counted as the numbers they stand for, their scales as none.
    """
    sizes, packed = {}, packed_numbers(LlamaTNConfig.from_pretrained(model))
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                view = file.get_slice(name)
                count = prod(view.get_shape())
                size = count * _ITEMSIZE[view.get_dtype()]
                sizes[name] = (packed.get(name, count), size)
    return sizes


def is_block_linear(name: str) -> bool:
    """Whether a saved tensor belongs to a linear layer of a block.

    >>> is_block_linear("model.layers.0.mlp.gate_up.cores.0")
    True
    >>> is_block_linear("model.layers.0.input_layernorm.weight")
    False
    """
    return ".self_attn." in name or ".mlp." in name


def block_params(source: Source) -> int:
    """Parameters of the linear layers inside the blocks of the dense model."""
    return sum(prod(s.shape) for name, s in source.specs().items() if is_block_linear(name))


_ITEMSIZE = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1}
_ITEMSIZE |= {"U8": 1, "BOOL": 1}
