"""What a Llama's tensors are called in Hugging Face, Meta and GGUF files, and their shapes.

HF names and HF row order are the house's. Meta and GGUF store the rows of q and k so that the two
halves of each rotary pair are neighbours (interleaved); HF stores all first halves, then all second
halves (half split). The rest of every matrix is the same in all three.

>>> hf_name_of_meta("layers.3.feed_forward.w2.weight")
'model.layers.3.mlp.down_proj.weight'
>>> hf_name_of_gguf("blk.3.attn_q.weight")
'model.layers.3.self_attn.q_proj.weight'
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor

from qll.errors import MissingTensorError

if TYPE_CHECKING:
    from transformers import LlamaConfig

T = TypeVar("T")

# HF name -> (Meta name, GGUF name), without the block prefix and ".weight"
OUTER = {
    "model.embed_tokens": ("tok_embeddings", "token_embd"),
    "model.norm": ("norm", "output_norm"),
    "lm_head": ("output", "output"),
}
INNER = {
    "self_attn.q_proj": ("attention.wq", "attn_q"),
    "self_attn.k_proj": ("attention.wk", "attn_k"),
    "self_attn.v_proj": ("attention.wv", "attn_v"),
    "self_attn.o_proj": ("attention.wo", "attn_output"),
    "mlp.gate_proj": ("feed_forward.w1", "ffn_gate"),
    "mlp.up_proj": ("feed_forward.w3", "ffn_up"),
    "mlp.down_proj": ("feed_forward.w2", "ffn_down"),
    "input_layernorm": ("attention_norm", "attn_norm"),
    "post_attention_layernorm": ("ffn_norm", "ffn_norm"),
}
# A layer number as it is written, so that no two names mean the same layer
LAYER = "(0|[1-9][0-9]{0,5})"
# Tables of rotary frequencies that files carry along; they follow from the config
SKIPPED = re.compile(
    r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    r"|rope\.freqs|rope_freqs\.weight|blk\.\d+\.attn_rot_embd(\.weight)?"
)


def expected_specs(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor the architecture needs, in model order.

    >>> from transformers import LlamaConfig
    >>> small = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
    ...     num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    >>> expected_specs(small)["model.layers.0.self_attn.k_proj.weight"]
    (8, 16)
    """
    d_model, d_ff, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    d_query = config.num_attention_heads * config.head_dim
    d_key = config.num_key_value_heads * config.head_dim
    block = {
        "self_attn.q_proj": (d_query, d_model),
        "self_attn.k_proj": (d_key, d_model),
        "self_attn.v_proj": (d_key, d_model),
        "self_attn.o_proj": (d_model, d_query),
        "mlp.gate_proj": (d_ff, d_model),
        "mlp.up_proj": (d_ff, d_model),
        "mlp.down_proj": (d_model, d_ff),
        "input_layernorm": (d_model,),
        "post_attention_layernorm": (d_model,),
    }
    specs: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, d_model)}
    for layer in range(config.num_hidden_layers):
        specs |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    specs["model.norm.weight"] = (d_model,)
    if not config.tie_word_embeddings:
        specs["lm_head.weight"] = (vocab, d_model)
    return specs


def is_skipped(name: str) -> bool:
    """Whether a tensor is known and not needed, in any format.

    >>> is_skipped("rope.freqs"), is_skipped("rope.freqs.bias")
    (True, False)
    """
    return SKIPPED.fullmatch(name) is not None


def hf_name_of_meta(name: str) -> str:
    """HF name of a Meta tensor; a name not in the table is returned unchanged."""
    return _translate(name, rf"layers\.{LAYER}\.(.+)\.weight", which=0)


def hf_name_of_gguf(name: str) -> str:
    """HF name of a GGUF tensor; a name not in the table is returned unchanged."""
    return _translate(name, rf"blk\.{LAYER}\.(.+)\.weight", which=1)


def by_hf_name(tensors: Mapping[str, T], to_hf: Callable[[str], str]) -> dict[str, T]:
    """`tensors` by HF name; raises MissingTensorError when two of them get the same.

    >>> by_hf_name({"norm.weight": 1}, hf_name_of_meta)
    {'model.norm.weight': 1}
    """
    result: dict[str, T] = {}
    for name, tensor in tensors.items():
        if (hf_name := to_hf(name)) in result:
            raise MissingTensorError("tensor is there under two names", found=hf_name)
        result[hf_name] = tensor
    return result


def meta_name(name: str) -> str:
    """Meta's name of an HF tensor.

    >>> meta_name("model.layers.0.self_attn.q_proj.weight"), meta_name("lm_head.weight")
    ('layers.0.attention.wq.weight', 'output.weight')
    """
    return _untranslate(name, "layers", which=0)


def gguf_name(name: str) -> str:
    """GGUF's name of an HF tensor.

    >>> gguf_name("model.layers.0.mlp.up_proj.weight")
    'blk.0.ffn_up.weight'
    """
    return _untranslate(name, "blk", which=1)


def half_split_rows(heads: int, head_dim: int) -> Int64[Tensor, "rows"]:
    """For each HF row of q or k, the row of the same number in an interleaved file.

    Row j of a head (j < head_dim/2) is interleaved row 2j, row head_dim/2 + j is row 2j + 1.

    >>> half_split_rows(1, 6).tolist()
    [0, 2, 4, 1, 3, 5]
    """
    return torch.arange(heads * head_dim).view(heads, head_dim // 2, 2).transpose(1, 2).flatten()


def file_rows(name: str, config: LlamaConfig) -> Int64[Tensor, "rows"] | None:
    """The row permutation of `name` in an interleaved file, or None when there is none."""
    if name.endswith("self_attn.q_proj.weight"):
        return half_split_rows(config.num_attention_heads, config.head_dim)
    if name.endswith("self_attn.k_proj.weight"):
        return half_split_rows(config.num_key_value_heads, config.head_dim)
    return None


def _translate(name: str, pattern: str, which: int) -> str:
    outer = {names[which]: hf for hf, names in OUTER.items()}
    inner = {names[which]: hf for hf, names in INNER.items()}
    if (stem := name.removesuffix(".weight")) != name and stem in outer:
        return f"{outer[stem]}.weight"
    match = re.fullmatch(pattern, name)
    if match and match[2] in inner:
        return f"model.layers.{match[1]}.{inner[match[2]]}.weight"
    return name


def _untranslate(name: str, prefix: str, which: int) -> str:
    stem = name.removesuffix(".weight")
    if stem in OUTER:
        return f"{OUTER[stem][which]}.weight"
    _, _, layer, inner = stem.split(".", 3)
    return f"{prefix}.{layer}.{INNER[inner][which]}.weight"
