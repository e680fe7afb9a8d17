"""The dense model one block at a time, for calibration and refinement of models larger than memory.

`run_block(build_block(source, i), ...)` for i = 0, 1, ... on `embed(source, ids)` and then `head`
is the whole Llama: the same modules of transformers, the same numbers. Only the block in hand is in
memory. Gradients flow from a block's output to its input; its weights are frozen.

    hidden = embed(source, ids)
    for index in range(source.config.num_hidden_layers):
        hidden = run_block(build_block(source, index), hidden)
    norm, weight = head(source)
    logits = norm(hidden) @ weight.T
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from qll.errors import UsageError
from qll.load import Source
from qll.model.dense import assign, sdpa_config
from qll.model.swap import Entries, insert_networks

EMBEDDING = "model.embed_tokens.weight"
# Rows of the embedding table in memory at a time: 8,192 x 8,192 x 4 bytes = 256 MB for 70B.
TABLE_ROWS = 8192


def embed(
    source: Source, ids: Int[Tensor, "*batch seq"], *, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*batch seq d_model"]:
    """Embedding vectors of `ids`, on the CPU; the table is read in slices and never held whole.

    Raises UsageError for an id outside the vocabulary.
    """
    vocab, d_model = source.specs()[EMBEDDING].shape
    wanted, places = torch.unique(ids.cpu(), return_inverse=True)
    if wanted.numel() and not 0 <= int(wanted[0]) <= int(wanted[-1]) < vocab:
        raise UsageError(
            "token id outside the vocabulary",
            where=source.name,
            expected=f"0 to {vocab - 1}",
            found=int(wanted[0]) if int(wanted[0]) < 0 else int(wanted[-1]),
            hint="the tokenizer belongs to another model",
        )
    vectors = torch.empty(len(wanted), d_model, dtype=dtype)
    for start in range(0, vocab, TABLE_ROWS):
        stop = min(start + TABLE_ROWS, vocab)
        here = (wanted >= start) & (wanted < stop)
        if here.any():
            table = source.read(EMBEDDING, rows=slice(start, stop))
            vectors[here] = table[wanted[here] - start].to(dtype)
    return vectors[places]


def build_block(
    source: Source,
    index: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> LlamaDecoderLayer:
    """Block `index` of the dense model in evaluation mode, with frozen weights."""
    prefix = f"model.layers.{index}."
    names = [name for name in source.specs() if name.startswith(prefix)]
    with torch.device("meta"):
        block = LlamaDecoderLayer(sdpa_config(source.config), index)
    tensors = {name.removeprefix(prefix): source.read(name).to(device, dtype) for name in names}
    assign(block, tensors, where=f"{source.name}: block {index}")
    return block.eval().requires_grad_(False)


def build_network_block(
    config: LlamaConfig,
    index: int,
    entries: Entries,
    tensors: Mapping[str, Shaped[Tensor, "..."]],
    device: str | torch.device = "cpu",
) -> LlamaDecoderLayer:
    """Block `index` with the networks `entries` in the places of their matrices, in float32.

    `tensors` are those of the block in a converted checkpoint, by their names there. Raises
    MissingTensorError or ShapeError when they are not what the entries ask for.
    """
    prefix = f"model.layers.{index}."
    with torch.device("meta"):
        model = LlamaForCausalLM(sdpa_config(config))
        insert_networks(model, entries)
    block = model.model.layers[index]
    moved = {
        name.removeprefix(prefix): t.to(device, torch.float32 if t.is_floating_point() else t.dtype)
        for name, t in tensors.items()
    }
    assign(block, moved, where=f"block {index}")
    return block.eval().requires_grad_(False)


def run_block(
    block: LlamaDecoderLayer, hidden: Float[Tensor, "batch seq d_model"]
) -> Float[Tensor, "batch seq d_model"]:
    """Output of `block` on `hidden`, causal, positions 0 to seq - 1, no padding, no cache.

    >>> from transformers import LlamaConfig
    >>> config = LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=2)
    >>> run_block(LlamaDecoderLayer(sdpa_config(config), 0), torch.zeros(1, 3, 8)).shape
    torch.Size([1, 3, 8])
    """
    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
    # a new table per call costs microseconds and is right for every rope type and length
    rotary = LlamaRotaryEmbedding(block.self_attn.config).to(hidden.device)
    return block(
        hidden,
        attention_mask=None,  # torch's attention and ours are causal without one
        position_embeddings=rotary(hidden, position_ids=positions),
        position_ids=positions,
    )


def head(
    source: Source, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[LlamaRMSNorm, Float[Tensor, "vocab d_model"]]:
    """The final norm and the output matrix; the matrix of a tied model is its embedding table."""
    return final_norm(source, dtype, device), head_matrix(source, dtype, device)


def final_norm(
    source: Source, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> LlamaRMSNorm:
    """The norm between the last block and the output matrix."""
    config = source.config
    with torch.device("meta"):
        norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    gain = source.read("model.norm.weight").to(device, dtype)
    assign(norm, {"weight": gain}, where=source.name)
    return norm.eval().requires_grad_(False)


def head_matrix(
    source: Source, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Float[Tensor, "vocab d_model"]:
    """The output matrix; of a tied model its embedding table."""
    name = EMBEDDING if source.config.tie_word_embeddings else "lm_head.weight"
    return source.read(name).to(device, dtype)
