"""The dense model of a Source as a transformers LlamaForCausalLM, every key checked.

transformers' own loader only warns about weights it did not find and then invents them; here each
tensor the architecture needs is read by name and anything else is an error. The modules are built
on the meta device, so memory holds one copy of the weights and nothing else.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from qll.errors import MissingTensorError, ShapeError
from qll.load import Source

# transformers 5.24 renamed the argument that takes the keys and values of earlier tokens
_TAKEN = inspect.signature(LlamaForCausalLM.forward).parameters
CACHE_ARGUMENT = "cache" if "cache" in _TAKEN else "past_key_values"


def load_dense(
    source: Source, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> LlamaForCausalLM:
    """The dense model of `source` in evaluation mode, weights frozen.

    Reads one tensor at a time. Raises MissingTensorError or ShapeError when the source and its
    config disagree.

    >>> import tempfile
    >>> from qll.load import open_source
    >>> config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8,
    ...                      num_hidden_layers=1, num_attention_heads=2)
    >>> folder = tempfile.mkdtemp()
    >>> LlamaForCausalLM(config).save_pretrained(folder)
    >>> load_dense(open_source(folder))(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 32])
    """
    config = sdpa_config(source.config)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    # the rotary table is no weight: the meta device cannot have computed it
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    names = list(source.specs())
    tensors = {name: source.read(name).to(device, dtype) for name in names}
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    assign(model, tensors, where=source.name)
    model.tie_weights()
    model.config.dtype = dtype
    return model.eval().requires_grad_(False)


def sdpa_config(config: LlamaConfig) -> LlamaConfig:
    """A copy of `config` whose attention is torch's own, which is causal without a mask."""
    changed = copy.deepcopy(config)
    changed._attn_implementation = "sdpa"
    return changed


def assign(module: nn.Module, tensors: Mapping[str, Shaped[Tensor, "..."]], where: str) -> None:
    """Make `tensors` the parameters and buffers of `module`; names and shapes must match exactly.

    >>> linear = nn.Linear(2, 1, bias=False, device="meta")
    >>> assign(linear, {"weight": torch.ones(1, 2)}, where="example"); linear.weight.sum().item()
    2.0
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if wrong := sorted(wanted.keys() ^ tensors.keys()):
        missing = wrong[0] in wanted
        raise MissingTensorError(
            "tensor is missing" if missing else "tensor has no place in this architecture",
            where=f"{where}: {wrong[0]}",
            hint="the checkpoint and its config disagree",
        )
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise ShapeError(
                "tensor has the wrong shape",
                where=f"{where}: {name}",
                expected=shape,
                found=tuple(tensors[name].shape),
                hint="the checkpoint and its config disagree",
            )
    module.load_state_dict(tensors, strict=True, assign=True)
