"""Writers of the same model in every layout we read: Meta shards, GGUF, Hugging Face folders.

Written against the formats' own descriptions, not against qll.load, so that the tests compare two
independent accounts of each layout.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from qll.load import Source

META_OUTER = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
META_INNER = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
GGUF_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
GGUF_INNER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}

LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def assert_same(source: Source, model) -> None:
    """Every tensor of `source`, whole and in slices, is the model's, bit for bit."""
    state = weights(model)
    assert set(source.specs()) == set(state)
    for name, expected in state.items():
        found = source.read(name)
        assert found.dtype == source.specs()[name].dtype
        assert tuple(found.shape) == source.specs()[name].shape
        assert torch.equal(found, expected), name
        rows = len(expected)
        for piece in (slice(0, 1), slice(rows // 3, rows // 2 + 1), slice(rows - 1, None)):
            assert torch.equal(source.read(name, rows=piece), expected[piece]), (name, piece)


def weights(model) -> dict[str, Tensor]:
    """The model's tensors by HF name, without lm_head when it is tied."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state


def interleaved(matrix: Tensor, heads: int) -> Tensor:
    """Rows of q or k from HF order (all first halves, then all second) to neighbouring pairs."""
    head_dim = matrix.shape[0] // heads
    order = []
    for head in range(heads):
        for pair in range(head_dim // 2):
            order += [head * head_dim + pair, head * head_dim + head_dim // 2 + pair]
    return matrix[order].clone()


def write_hf_folder(model, folder: Path, max_shard_size: str = "5GB") -> Path:
    """A Hugging Face folder; a small `max_shard_size` makes several files and an index."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def write_hf_original(model, folder: Path, shards: int = 1) -> Path:
    """A Hugging Face folder with config.json, whose weights are Meta's files in original/."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    write_meta_folder(model, folder / "original", shards)
    return folder


def write_meta_folder(
    model,
    folder: Path,
    shards: int = 1,
    embedding_cut: int = 0,
    legacy: bool = False,
    changes: Mapping[str, object] | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> Path:
    """A Meta folder cut for `shards`-way model parallelism as fairscale does.

    embedding_cut: 0 as Llama 3 (rows), 1 as Llama 2 (columns). legacy: the pickle stream that torch
    wrote before 1.6. changes: replaces keys of params.json, None removes one. extra: more tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = {**meta_weights(model), **(extra or {})}
    for shard in range(shards):
        part = {
            name: _cut(name, tensor, shard, shards, embedding_cut) for name, tensor in whole.items()
        }
        torch.save(
            part,
            folder / f"consolidated.{shard:02d}.pth",
            _use_new_zipfile_serialization=not legacy,
        )
    params = meta_params(model.config) | dict(changes or {})
    kept = {key: value for key, value in params.items() if value is not None}
    (folder / "params.json").write_text(json.dumps(kept))
    return folder


def meta_weights(model) -> dict[str, Tensor]:
    """The model's tensors with Meta's names and row order."""
    config, result = model.config, {}
    for name, tensor in weights(model).items():
        if name.endswith("q_proj.weight"):
            tensor = interleaved(tensor, config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            tensor = interleaved(tensor, config.num_key_value_heads)
        result[_rename(name, META_OUTER, META_INNER, "layers")] = tensor
    return result


def meta_params(config) -> dict[str, object]:
    """params.json of `config`."""
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        # int(2/3 * 4 * dim) rounded up to a multiple of the width itself is the width
        "multiple_of": config.intermediate_size,
        "ffn_dim_multiplier": config.intermediate_size / (8 * config.hidden_size / 3),
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"],
        "use_scaled_rope": config.rope_parameters["rope_type"] == "llama3",
    }


def write_gguf(
    model,
    path: Path,
    kind: str = "F32",
    metadata: Mapping[str, object] | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> Path:
    """A GGUF file; matrices in `kind` (F32, F16, BF16, Q8_0, Q4_0 ...), norms in F32.

    metadata: string or integer values added. extra: more tensors, written as F32.
    """
    config, quantisation = model.config, gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    _write_metadata(writer, config)
    for key, value in (metadata or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    for name, tensor in weights(model).items():
        if name.endswith("q_proj.weight"):
            tensor = interleaved(tensor, config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            tensor = interleaved(tensor, config.num_key_value_heads)
        data, raw = tensor.float().numpy(), None
        if tensor.ndim == 2 and kind != "F32":
            data, raw = gguf.quants.quantize(data, quantisation), quantisation
        writer.add_tensor(_rename(name, GGUF_OUTER, GGUF_INNER, "blk"), data, raw_dtype=raw)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor.float().numpy())
    if config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_factors(config) -> np.ndarray:
    """llama.cpp's table: what each rotary frequency is divided by, one loop per frequency."""
    rope, factors = config.rope_parameters, []
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    for pair in range(config.head_dim // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * pair / config.head_dim)
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(rope["factor"])
        else:
            smooth = (low * rope["low_freq_factor"] / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def _write_metadata(writer: gguf.GGUFWriter, config) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)


def _cut(name: str, tensor: Tensor, shard: int, shards: int, embedding_cut: int) -> Tensor:
    """The part of a tensor that one of `shards` ranks holds."""
    if tensor.ndim == 1:
        return tensor.clone()
    cut = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
    if name == "tok_embeddings.weight":
        cut = embedding_cut
    return tensor.chunk(shards, dim=cut)[shard].contiguous().clone()


def _rename(name: str, outer: Mapping[str, str], inner: Mapping[str, str], prefix: str) -> str:
    if name in outer:
        return outer[name]
    _, _, layer, rest = name.split(".", 3)
    return f"{prefix}.{layer}.{inner[rest.removesuffix('.weight')]}.weight"
