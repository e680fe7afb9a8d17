"""What a model costs in closed form: parameters, bytes and FLOPs, dense or converted.

Counted from the modules themselves, so a converted model, a dense one and any mixture are counted
by the same rule. A pivot index of an interpolative bond counts as one parameter; tied tensors count
once. One multiply-add is two FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn
from transformers import PreTrainedModel

from qll.model.layers import NetworkModule, TNEmbedding, TNTiedHead
from qll.model.packed import PackedLinear, PackedTensor
from qll.tn.packed import SCALE_DTYPE


@dataclass(frozen=True)
class ParamCount:
    """Numbers stored, by where they are."""

    total: int
    """All of the model."""
    blocks: int
    """The linear layers inside the blocks: what `keep` is a share of."""
    embeddings: int
    """Token embeddings and lm_head; once when they are tied."""
    norms: int
    """Gains of the norms."""


def count_params(model: PreTrainedModel) -> ParamCount:
    """Stored numbers of `model`, pivot indices included; scales of packed ones cost bytes only.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=10, hidden_size=4, intermediate_size=6, num_hidden_layers=1,
    ...                      num_attention_heads=2, tie_word_embeddings=True)
    >>> count_params(LlamaForCausalLM(config))
    ParamCount(total=188, blocks=136, embeddings=40, norms=12)
    """
    counts = {"blocks": 0, "embeddings": 0, "norms": 0}
    packed = {
        f"{name}.packed": prod(module.shape)
        for name, module in model.named_modules()
        if isinstance(module, PackedTensor)
    }
    for name, tensor in _stored(model):
        scales = name.removesuffix(".scales") + ".packed" in packed
        counts[_part(name)] += packed.get(name, 0 if scales else tensor.numel())
    return ParamCount(total=sum(counts.values()), **counts)


def bytes_by_dtype(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of the stored tensors of `model` per dtype, as a saved folder holds them.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=10, hidden_size=4, intermediate_size=6, num_hidden_layers=1,
    ...                      num_attention_heads=2, tie_word_embeddings=True)
    >>> bytes_by_dtype(LlamaForCausalLM(config).bfloat16())
    {'bfloat16': 376}
    """
    sizes: dict[str, int] = {}
    packed = {n for n, module in model.named_modules() if isinstance(module, PackedTensor)}
    for name, tensor in _stored(model):
        kind = SCALE_DTYPE if name.removesuffix(".scales") in packed else tensor.dtype
        dtype = str(kind).removeprefix("torch.")
        sizes[dtype] = sizes.get(dtype, 0) + tensor.numel() * kind.itemsize
    return sizes


def forward_flops(model: PreTrainedModel, tokens: int, context: int) -> int:
    """FLOPs of one forward pass over `tokens` new tokens that attend to `context` positions.

    Matrix products only: norms, rotations, softmax and embedding lookups are left out, as is the
    saving that a kernel may draw from causality. Decoding one token behind c others is
    `forward_flops(model, 1, c + 1)`, reading a prompt of T tokens `forward_flops(model, T, T)`.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=10, hidden_size=4, intermediate_size=6, num_hidden_layers=1,
    ...                      num_attention_heads=2, tie_word_embeddings=True)
    >>> forward_flops(LlamaForCausalLM(config), 1, 5)  # 2 (136 + 40) + 2 heads x 2 x 5 x 4
    432
    """
    config = model.config
    attention = 4 * config.num_attention_heads * config.head_dim * tokens * context
    linears = sum(_flops(module, tokens) for module in model.modules())
    return linears + config.num_hidden_layers * attention


def _stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers, each tensor once."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _part(name: str) -> str:
    if name.endswith("norm.weight"):
        return "norms"
    return "blocks" if name.startswith("model.layers.") else "embeddings"


def _flops(module: nn.Module, tokens: int) -> int:
    if isinstance(module, nn.Linear | PackedLinear):
        return 2 * tokens * module.in_features * module.out_features
    if isinstance(module, TNTiedHead):
        return module.embedding.network().flops(tokens)
    if isinstance(module, NetworkModule) and not isinstance(module, TNEmbedding):
        return module.network().flops(tokens)
    return 0
