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
from typing import Any

import torch
from transformers import LlamaConfig

from qll.load.names import expected_specs
from qll.load.source import Source

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
    by_part = dict.fromkeys(PARTS, 0)
    bytes_by_part = dict.fromkeys(PARTS, 0)
    for name, count in counts.items():
        by_part[_part(name)] += count
        bytes_by_part[_part(name)] += count * dtypes[name].itemsize
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
            **by_part,
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
