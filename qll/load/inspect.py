"""What a checkpoint is made of, before anything is converted: sizes, wiring, counts, bytes.

Everything follows from the config, so a bare config.json of a model of any size is enough; a
Source adds what only files know: the format, the order of the rows of q and k, and bytes on disk.

>>> llama_3_8b = LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336,
...     num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)
>>> describe(llama_3_8b)["parameters"]["total"]
8030261248
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from qll.load.config import hf_config
from qll.load.files import read_object
from qll.load.names import expected_specs
from qll.load.params import meta_config
from qll.load.source import Source, open_source

# What each tensor reads and what it writes; the residual stream is where blocks add their results
WIRING = {
    "embed_tokens": ("token ids", "residual stream"),
    "input_layernorm": ("residual stream", "attention input"),
    "q_proj": ("attention input", "queries, n_heads x d_head"),
    "k_proj": ("attention input", "keys, n_kv_heads x d_head"),
    "v_proj": ("attention input", "values, n_kv_heads x d_head"),
    "o_proj": ("attention output", "residual stream (added)"),
    "post_attention_layernorm": ("residual stream", "MLP input"),
    "gate_proj": ("MLP input", "gate, through SiLU"),
    "up_proj": ("MLP input", "up, times gate"),
    "down_proj": ("gate x up", "residual stream (added)"),
    "norm": ("residual stream", "head input"),
    "lm_head": ("head input", "logits"),
}
TIED_WIRING = ("token ids; head input", "residual stream; logits (tied)")
PARTS = ("embedding", "attention", "mlp", "norms", "lm_head")


def inspect_path(path: str | Path | None) -> dict[str, Any]:
    """`describe` of the checkpoint at `path` (None: the embedded one), or of a bare config.

    A folder may hold only a config.json or params.json, and the file itself may be given: then
    nothing but that file is read. Raises CheckpointError children for what cannot be understood.

    >>> inspect_path(None)["dimensions"]["d_model"]
    576
    """
    file = _bare_config(path)
    if file is None:
        source = open_source(path)
        return describe(source.config, source)
    return {**describe(_read_config(file)), "name": file.parent.name}


def config_of(path: str | Path | None) -> tuple[str, LlamaConfig]:
    """Name and config of what `inspect_path` describes; raises the same.

    >>> config_of(None)[1].num_hidden_layers
    30
    """
    file = _bare_config(path)
    if file is None:
        source = open_source(path)
        return source.name, source.config
    return file.parent.name, _read_config(file)


def _read_config(file: Path) -> LlamaConfig:
    values = read_object(file)
    is_meta = file.name == "params.json"
    # only the weights of a Meta folder tell whether the head is tied; the larger models are not
    return meta_config(values, file, {}, tied=False) if is_meta else hf_config(values, file)


def _bare_config(path: str | Path | None) -> Path | None:
    """The config file to describe when `path` has no weights beside it, else None."""
    if path is None:
        return None
    place = Path(path)
    if place.is_file():
        return place if place.suffix == ".json" else None
    weights = any(any(place.glob(f"**/*{kind}")) for kind in (".safetensors", ".pth", ".gguf"))
    found = [place / name for name in ("config.json", "params.json") if (place / name).is_file()]
    return found[0] if found and not weights else None


def describe(config: LlamaConfig, source: Source | None = None) -> dict[str, Any]:
    """Dimensions, connectivity, parameter counts and bytes of a model, ready for JSON.

    Returns a dict with the keys name, source_format, row_order (of q and k in the file; None
    without files), dimensions, connectivity (one row per kind of tensor: tensor, count, shape,
    reads, writes, params of one), parameters (total, blocks, block_linears, and by part), and
    bytes (dtype, total, by part, on_disk). Without a source, bytes are those of bfloat16.

    >>> tiny = LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=6, num_hidden_layers=2,
    ...     num_attention_heads=2, num_key_value_heads=1)
    >>> facts = describe(tiny)
    >>> facts["parameters"]["total"], facts["parameters"]["block_linears"], facts["bytes"]["total"]
    (324, 240, 648)
    """
    dtypes = _dtypes(config, source)
    counts = {name: math.prod(shape) for name, shape in expected_specs(config).items()}
    blocks = {name: count for name, count in counts.items() if ".layers." in name}
    linears = sum(count for name, count in blocks.items() if name.endswith("_proj.weight"))
    bytes_by_part = _by_part({name: n * dtypes[name].itemsize for name, n in counts.items()})
    return {
        "name": source.name if source else None,
        "source_format": source.format if source else None,
        "row_order": source.row_order if source else None,
        "dimensions": _dimensions(config),
        "connectivity": _connectivity(config),
        "parameters": {
            "total": sum(counts.values()),
            "blocks": sum(blocks.values()),
            "block_linears": linears,
            **_by_part(counts),
        },
        "bytes": {
            "dtype": ", ".join(
                sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()})
            ),
            "total": sum(bytes_by_part.values()),
            **bytes_by_part,
            "on_disk": source.bytes_on_disk if source else None,
        },
    }


def render(facts: dict[str, Any]) -> str:
    """The tables of `describe` as plain text of at most 120 columns.

    >>> tiny = LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=6, num_hidden_layers=2,
    ...     num_attention_heads=2, num_key_value_heads=1)
    >>> print(render(describe(tiny)).splitlines()[1])
    parameters       324 (324 total)
    """
    parameters, sizes = facts["parameters"], facts["bytes"]
    head = [
        ["model", facts["name"] or "(config only)"],
        ["parameters", f"{_short(parameters['total'])} ({parameters['total']:,} total)"],
        ["format", facts["source_format"] or "no weight files"],
        ["q/k rows", _row_order(facts["row_order"])],
        *([key, _value(value)] for key, value in facts["dimensions"].items()),
    ]
    tied = facts["dimensions"]["tied_embeddings"]
    parts = [["part", "parameters", "share", f"bytes ({sizes['dtype']})"]]
    for part in PARTS:
        note = " (= embedding)" if part == "lm_head" and tied else ""
        share = parameters[part] / parameters["total"]
        parts.append([part + note, f"{parameters[part]:,}", f"{share:.1%}", f"{sizes[part]:,}"])
    total, on_disk = parameters["total"], sizes["on_disk"]
    parts.append(["total", f"{total:,}", "100.0%", f"{sizes['total']:,}"])
    for row in ("blocks", "block_linears"):
        count = parameters[row]
        parts.append([f"of which {row}", f"{count:,}", f"{count / total:.1%}", ""])
    if on_disk is not None:
        parts.append(["weight files on disk", "", "", f"{on_disk:,}"])
    wiring = [["tensor", "count", "shape", "reads", "writes"]]
    for row in facts["connectivity"]:
        shape = " x ".join(map(str, row["shape"]))
        wiring.append([row["tensor"], str(row["count"]), shape, row["reads"], row["writes"]])
    tables = (_table(head), _table(parts, right=(1, 2, 3)), _table(wiring, right=(1,)))
    return "\n\n".join(tables)


def _dtypes(config: LlamaConfig, source: Source | None) -> dict[str, torch.dtype]:
    if source is None:
        return dict.fromkeys(expected_specs(config), torch.bfloat16)
    return {name: spec.dtype for name, spec in source.specs().items()}


def _dimensions(config: LlamaConfig) -> dict[str, Any]:
    return {
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "d_head": config.head_dim,
        "d_ff": config.intermediate_size,
        "d_vocab": config.vocab_size,
        "context": config.max_position_embeddings,
        "rope": dict(config.rope_parameters),
        "norm_eps": config.rms_norm_eps,
        "tied_embeddings": bool(config.tie_word_embeddings),
    }


def _connectivity(config: LlamaConfig) -> list[dict[str, Any]]:
    """One row per kind of tensor as data flows; the blocks are alike and stand once."""
    rows = []
    for name, shape in expected_specs(config).items():
        block = ".layers." in name
        if block and ".layers.0." not in name:
            continue
        kind = name.split(".")[-2]
        tied = kind == "embed_tokens" and config.tie_word_embeddings
        reads, writes = TIED_WIRING if tied else WIRING[kind]
        rows.append(
            {
                "tensor": name.replace(".layers.0.", ".layers.{i}."),
                "count": config.num_hidden_layers if block else 1,
                "shape": list(shape),
                "reads": reads,
                "writes": writes,
                "params": math.prod(shape),
            }
        )
    order = list(WIRING)
    return sorted(rows, key=lambda row: order.index(row["tensor"].split(".")[-2]))


def _by_part(amounts: dict[str, int]) -> dict[str, int]:
    """Sums per part of the model of an amount per tensor."""
    sums = dict.fromkeys(PARTS, 0)
    for name, amount in amounts.items():
        sums[_part(name)] += amount
    return sums


def _part(name: str) -> str:
    if name.startswith("lm_head"):
        return "lm_head"
    if "embed_tokens" in name:
        return "embedding"
    if "norm" in name.split(".")[-2]:
        return "norms"
    return "attention" if ".self_attn." in name else "mlp"


def _row_order(order: str | None) -> str:
    """The order in the file; whatever it is, `Source.read` returns half-split rows."""
    words = {
        "half_split": "half_split (Hugging Face): as read",
        "interleaved": "interleaved (Meta, GGUF): permuted to half_split as they are read",
    }
    return words.get(order or "", "not known without weight files")


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)


def _value(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(part)}" for key, part in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(rows: list[list[str]], right: tuple[int, ...] = ()) -> str:
    """Rows as aligned columns two spaces apart."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
